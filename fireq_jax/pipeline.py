"""From a float model to a quantised one, one decoder layer at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax import calibrate, keys, offline, rotate, smooth, solve, tune
from fireq_jax.config import KVFormat, LlamaConfig
from fireq_jax.errors import ConfigError, QuantizationError
from fireq_jax.models import llama
from fireq_jax.qtensor import QTensor
from fireq_jax.quantize import quantize_weight
from fireq_jax.recipe import PROJECTIONS, Recipe, Solver, WeightFormat
from fireq_jax.smooth import Factors

Params = dict[str, Any]

# Calibration windows that run through a layer at once.
_WINDOWS = 8
# Bytes moved to the device at once. A GPU's runtime holds as much pinned host
# memory as was ever in flight, and gives none of it back.
_BLOCK = 1 << 27


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
  """Where a float model comes from, a part at a time.

  Attributes:
    embedding: returns `{"embed_tokens": {"embedding": [V, D]}}`.
    layer: index -> a decoder layer of float kernels (in, out).
    head: returns `{"norm": {"weight": [D]}}`, and `"lm_head"` unless tied.
  """

  embedding: Callable[[], Params]
  layer: Callable[[int], Params]
  head: Callable[[], Params]

  @classmethod
  def from_params(cls, params: Params) -> "Source":
    """A model that is in memory already."""
    model = params["model"]
    head = {"norm": model["norm"]}
    if "lm_head" in params:
      head["lm_head"] = params["lm_head"]
    return cls(
      embedding=lambda: {"embed_tokens": model["embed_tokens"]},
      layer=lambda i: model["layers"][i],
      head=lambda: head,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
  """How one layer went.

  Attributes:
    index: of the layer, from 0.
    seconds: reading it included.
    weight_error: root of the squared error of its quantised weights over
      their own squares, after smoothing; 0 if none is quantised.
  """

  index: int
  seconds: float
  weight_error: float


def quantize_model(
  source: Source,
  config: LlamaConfig,
  recipe: Recipe,
  tokens: np.ndarray | None = None,
  *,
  on_layer: Callable[[LayerReport], None] = lambda report: None,
) -> Params:
  """Quantises a model; one float layer is in memory at a time.

  Calibration runs each layer on what the float layers before it give for
  `tokens`, window by window; and on what the quantised ones give, where the
  solver reads inputs. Floats that stay are stored as bf16.

  Args:
    source: the float model.
    config: its shape.
    recipe: what to do.
    tokens: i32 [windows, length] for calibration, if the recipe needs it.
    on_layer: called after every layer.

  Returns:
    the parameter tree on the host, as `llama.abstract_params` describes.

  Raises:
    ConfigError: the recipe does not fit the model, or needs tokens.
    QuantizationError: the model is quantised already, or weights or
      activations are not finite; names the layer.
  """
  recipe.check_model(config)
  if not recipe.needs_calibration:
    tokens = None
  elif tokens is None:
    raise ConfigError(
      "calibration tokens are missing", where=f"recipe {recipe.name}"
    )
  rotation = None
  if recipe.rotation.residual:
    rotation = jnp.asarray(rotate.orthogonal(config.hidden_size))

  original = _checked(source.embedding(), "embedding")
  embedding = original
  if rotation is not None:
    embedding = offline.jit(rotate.rotate_embedding)(original, rotation)
  embedding = llama.cast_floats(embedding, jnp.bfloat16)
  exact = []
  if tokens is not None:
    exact = _embed(embedding["embed_tokens"]["embedding"], tokens)
  real = exact if recipe.reads_inputs else []
  head = _checked(source.head(), "head")
  tied = original["embed_tokens"]["embedding"]
  if rotation is not None:
    head = offline.jit(rotate.rotate_head)(head, tied, rotation)
  if recipe.head is not None:
    kernel = head["lm_head"]["kernel"] if "lm_head" in head else tied.T
    head["lm_head"] = {"kernel": _quantize_head(kernel, recipe=recipe)}
    del kernel
  params = {"model": {**jax.device_get(embedding), "layers": []}}
  head = jax.device_get(llama.cast_floats(head, jnp.bfloat16))
  params["model"]["norm"] = head.pop("norm")
  params.update(head)
  del original, embedding, tied

  for index in range(config.num_hidden_layers):
    start = time.perf_counter()
    layer = _checked(source.layer(index), f"layer {index}")
    if rotation is not None:
      layer = offline.jit(rotate.rotate_layer)(layer, rotation)
    smoothed, exact_next = _smooth(
      layer, exact, config=config, recipe=recipe, index=index
    )
    formats = _formats(recipe, index, config)
    if recipe.solver.reads_inputs:
      quantized = solve.quantize_in_order(
        smoothed,
        dict(formats),
        real,
        solver=recipe.solver,
        config=config,
        kv=recipe.kv,
      )
    else:
      quantized = _quantize(smoothed, formats=formats, recipe=recipe)
    candidates = [quantized]
    if recipe.tuning.steps:
      tuned, _ = tune.tune_layer(
        smoothed,
        quantized,
        jnp.concatenate(real),
        jnp.concatenate(exact_next),
        formats=formats,
        tuning=recipe.tuning,
        config=config,
        kv=recipe.kv,
      )
      candidates.append(tuned)
    quantized, real = _best(
      candidates, real, exact_next, config=config, kv=recipe.kv
    )
    exact = exact_next
    error = float(_weight_error(quantized, smoothed))
    params["model"]["layers"].append(jax.device_get(quantized))
    on_layer(
      LayerReport(
        index=index,
        seconds=time.perf_counter() - start,
        weight_error=error,
      )
    )
  return params


def _smooth(
  layer: Params,
  windows: list[jax.Array],
  *,
  config: LlamaConfig,
  recipe: Recipe,
  index: int,
) -> tuple[Params, list[jax.Array]]:
  """Returns the layer ready to be rounded, and its outputs.

  The published solver rounds bf16 weights; a search gets unrounded ones.
  """
  stats, before_rope, outputs = None, None, []
  if windows:
    moment = recipe.keys.fit or recipe.rotation.value
    outputs, stats, before_rope = _run_windows(layer, windows, config, moment)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(stats)):
      raise QuantizationError(
        "calibration activations are not finite", where=f"layer {index}"
      )
  dtype = _solved_dtype(recipe.solver)
  layer, factors = _choose_factors(
    _with_dtypes(layer, dtype), stats, before_rope, config=config, recipe=recipe
  )
  if recipe.scaling.awq:
    formats = _formats(recipe, index, config)
    factors = _search_awq(
      layer, factors, stats, windows, outputs, formats, config, recipe
    )
  return offline.jit(smooth.fold)(layer, factors), outputs


@functools.partial(offline.jit, static_argnames=("config", "recipe"))
def _choose_factors(layer, stats, before_rope, *, config, recipe):
  """Returns the layer in its value basis, and all factors but AWQ's."""
  if recipe.rotation.value:
    layer = rotate.change_value_basis(layer, stats.qkv_moment, config.head_dim)
  factors = smooth.channel_factors(layer, recipe.scaling, config)
  if recipe.keys.fit:
    power = keys.query_power(
      layer["self_attn"]["q_proj"]["kernel"], stats.qkv_moment, config
    )
    scale, shift = keys.fit_scales(before_rope, power, config)
    factors = dataclasses.replace(factors, key_scale=scale, key_shift=shift)
  elif stats is not None:
    key, key_scale = keys.published_scales(stats, recipe.keys)
    factors = dataclasses.replace(factors, key=key, key_scale=key_scale)
  return layer, factors


@functools.partial(offline.jit, static_argnames=("formats", "recipe"))
def _quantize(layer, *, formats, recipe: Recipe) -> Params:
  """Quantises a layer's weights, each on its own; the rest becomes bf16."""
  quantized = {name: dict(block) for name, block in layer.items()}
  for name, weight_format in formats:
    if weight_format is not None:
      kernel = layer[PROJECTIONS[name]][name]["kernel"]
      quantized[PROJECTIONS[name]][name] = {
        "kernel": quantize_weight(kernel, weight_format, solver=recipe.solver)
      }
  return llama.cast_floats(quantized, jnp.bfloat16)


@functools.partial(offline.jit, static_argnames=("recipe",))
def _quantize_head(kernel: jax.Array, *, recipe: Recipe) -> QTensor:
  """Quantises lm_head [D, V] on its own, whatever inputs the solver reads."""
  assert recipe.head is not None
  return quantize_weight(
    kernel.astype(_solved_dtype(recipe.solver)),
    recipe.head,
    solver=Solver(scale=recipe.solver.scale),
  )


def _solved_dtype(solver: Solver) -> jax.typing.DTypeLike:
  """Of the weights it rounds."""
  return jnp.float32 if solver.scale == "search" else jnp.bfloat16


@offline.jit
def _weight_error(quantized: Params, layer: Params) -> jax.Array:
  """Root of the squared error of quantised weights over their squares."""
  miss = total = jnp.float32(0.0)
  for name, block in PROJECTIONS.items():
    weight = quantized[block][name]["kernel"]
    if isinstance(weight, QTensor):
      exact = layer[block][name]["kernel"].astype(jnp.float32)
      miss += jnp.square(weight.dequantize().T - exact).sum()
      total += jnp.square(exact).sum()
  return jnp.sqrt(miss / jnp.maximum(total, 1e-30))


def _search_awq(
  layer, factors, stats, windows, outputs, formats, config, recipe
) -> Factors:
  """Tries each exponent at each input in turn; keeps the least layer error.

  Candidates are rounded on their own, without reading inputs.
  """
  rounding = dataclasses.replace(
    recipe, solver=Solver(scale=recipe.solver.scale)
  )

  def loss(factors: Factors) -> float:
    folded = offline.jit(smooth.fold)(layer, factors)
    quantized = _quantize(folded, formats=formats, recipe=rounding)
    return sum(
      float(_miss(quantized, x, y, config=config, kv=recipe.kv))
      for x, y in zip(windows, outputs)
    )

  least = loss(factors)
  for site in ("qkv", "gate_up", "down"):
    base = getattr(factors, site)
    for exponent in recipe.scaling.awq:
      more = smooth.activation_factors(stats, site, exponent)
      candidate = dataclasses.replace(factors, **{site: base * more})
      now = loss(candidate)
      if now < least:
        least, factors = now, candidate
  return factors


@functools.partial(offline.jit, static_argnames=("config", "kv"))
def _miss(layer, x, y, *, config, kv) -> jax.Array:
  """Squared error of a layer's output against `y`."""
  got, _ = solve.run_layer(layer, x, config=config, kv=kv)
  return jnp.square(got.astype(jnp.float32) - y.astype(jnp.float32)).sum()


def _best(
  layers: list[Params],
  inputs: list[jax.Array],
  wanted: list[jax.Array],
  *,
  config: LlamaConfig,
  kv: KVFormat,
) -> tuple[Params, list[jax.Array]]:
  """The first of the layers of least error, and its outputs."""
  run = functools.partial(_run, config=config, kv=kv)
  outputs: list[list[jax.Array]] = [
    [run(layer, x) for x in inputs] for layer in layers
  ]
  errors = [
    float(sum(len(x) * _error(x, y) for x, y in zip(got, wanted)))
    for got in outputs
  ]
  least = np.argmin(np.nan_to_num(errors, nan=np.inf))
  return layers[least], outputs[least]


_error = offline.jit(tune.relative_error)


@functools.partial(offline.jit, static_argnames=("config", "kv"))
def _run(layer, x, *, config, kv) -> jax.Array:
  return solve.run_layer(layer, x, config=config, kv=kv)[0]


def _run_windows(layer, windows, config, moment):
  """Runs the float layer; returns outputs, statistics, keys before RoPE."""
  outputs, stats, before_rope = [], None, []
  for x in windows:
    y, seen, keys_seen = _run_and_look(layer, x, config=config, moment=moment)
    stats = seen if stats is None else calibrate.merge_stats(stats, seen)
    outputs.append(y)
    before_rope.append(keys_seen)
  return outputs, stats, jnp.concatenate(before_rope)


@functools.partial(offline.jit, static_argnames=("config", "moment"))
def _run_and_look(layer, x, *, config, moment):
  layer = llama.cast_floats(layer, x.dtype)
  y, captured = solve.run_layer(layer, x, config=config, kv=None)
  stats = calibrate.window_stats(captured, moment=moment)
  keys_seen = captured["k_pre_rope"]
  return y, stats, keys_seen.reshape(-1, *keys_seen.shape[2:])


def _formats(
  recipe: Recipe, index: int, config: LlamaConfig
) -> tuple[tuple[str, WeightFormat | None], ...]:
  count = config.num_hidden_layers
  return tuple(
    (name, recipe.weight_format(index, name, count)) for name in PROJECTIONS
  )


def _with_dtypes(layer: Params, kernels: jax.typing.DTypeLike) -> Params:
  """Returns the layer with bf16 gains and the given dtype of kernels."""
  cast = llama.cast_floats(layer, jnp.bfloat16)
  for name, block in PROJECTIONS.items():
    cast[block][name] = llama.cast_floats(layer[block][name], kernels)
  return cast


def _embed(table: jax.Array, tokens: np.ndarray) -> list[jax.Array]:
  """i32 [windows, T] -> bf16 [B, T, D], B windows each, the last maybe less."""
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ConfigError(
      "not calibration windows",
      expected="integers [windows, length]",
      got=f"{tokens.dtype}{list(tokens.shape)}",
    )
  return [
    table[jnp.asarray(tokens[i : i + _WINDOWS])]
    for i in range(0, len(tokens), _WINDOWS)
  ]


def _checked(tree: Params, where: str) -> Params:
  """Returns the tree as JAX arrays, all float and finite."""

  def check(path, leaf):
    name = "/".join(str(key.key) for key in path if hasattr(key, "key"))
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise QuantizationError(
        "the model is quantised already, or not a float model",
        where=f"{where} {name}",
        got=str(leaf.dtype),
      )
    leaf = _on_device(leaf)
    bad = leaf.size - int(jnp.isfinite(leaf).sum())
    if bad:
      raise QuantizationError(
        "weights are not finite", where=f"{where} {name}", got=f"{bad} of them"
      )
    return leaf

  return jax.tree_util.tree_map_with_path(check, tree)


def _on_device(x: np.ndarray | jax.Array) -> jax.Array:
  """The same as a JAX array; a transposed view is transposed over there."""
  if isinstance(x, jax.Array):
    return x
  if not x.flags.c_contiguous and x.T.flags.c_contiguous:
    return _on_device(x.T).T
  rows = max(1, _BLOCK * len(x) // x.nbytes)
  blocks = [
    jax.block_until_ready(jnp.asarray(x[i : i + rows]))
    for i in range(0, len(x), rows)
  ]
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)
