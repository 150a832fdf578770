"""From a float model to a quantised one, one decoder layer at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax import calibrate, rotate, smooth
from fireq_jax.calibrate import LayerStats
from fireq_jax.config import KVFormat, LlamaConfig
from fireq_jax.errors import ConfigError, QuantizationError
from fireq_jax.models import llama
from fireq_jax.quantize import quantize_weight
from fireq_jax.recipe import PROJECTIONS, Recipe, Solver, WeightFormat
from fireq_jax.smooth import Factors

Params = dict[str, Any]

# The statistics of the input of each projection.
_SITE = {
  "q_proj": "qkv",
  "k_proj": "qkv",
  "v_proj": "qkv",
  "o_proj": "o",
  "gate_proj": "gate_up",
  "up_proj": "gate_up",
  "down_proj": "down",
}


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

  Calibration runs each layer on what the layers before it give for `tokens`,
  window by window: the float layers, or the quantised ones if the recipe
  lets codes correct errors (GPTQ). Floats that stay are stored as bf16.

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
    embedding = jax.jit(rotate.rotate_embedding)(original, rotation)
  embedding = _bf16(embedding)
  windows = []
  if tokens is not None:
    windows = _embed(embedding["embed_tokens"]["embedding"], tokens)
  head = _checked(source.head(), "head")
  if rotation is not None:
    tied = original["embed_tokens"]["embedding"]
    head = jax.jit(rotate.rotate_head)(head, tied, rotation)
  params = {"model": {**jax.device_get(embedding), "layers": []}}
  head = jax.device_get(_bf16(head))
  params["model"]["norm"] = head.pop("norm")
  params.update(head)
  del original, embedding

  for index in range(config.num_hidden_layers):
    start = time.perf_counter()
    where = f"layer {index}"
    layer = _checked(source.layer(index), where)
    if rotation is not None:
      layer = jax.jit(rotate.rotate_layer)(layer, rotation)
    layer, windows, error = _process_layer(
      layer, windows, config=config, recipe=recipe, index=index
    )
    params["model"]["layers"].append(jax.device_get(layer))
    on_layer(
      LayerReport(
        index=index,
        seconds=time.perf_counter() - start,
        weight_error=float(error),
      )
    )
  return params


def quantize_layer(
  layer: Params,
  formats: tuple[WeightFormat | None, ...],
  *,
  solver: Solver,
  moments: dict[str, jax.Array],
) -> tuple[Params, jax.Array]:
  """Quantises the projections of one layer; the rest becomes bf16.

  Args:
    layer: float, smoothed.
    formats: one for each of `PROJECTIONS`, in order.
    solver: how to choose scales and codes.
    moments: site -> f32 [C, C], where the solver needs it.

  Returns:
    the layer, and its relative root-mean-square weight error.
  """
  quantized = {name: dict(block) for name, block in layer.items()}
  miss = total = jnp.float32(0.0)
  for (name, block), weight_format in zip(PROJECTIONS.items(), formats):
    if weight_format is None:
      continue
    kernel = layer[block][name]["kernel"]
    weight = quantize_weight(
      kernel, weight_format, solver=solver, moment=moments.get(_SITE[name])
    )
    quantized[block][name] = {"kernel": weight}
    exact = kernel.astype(jnp.float32)
    miss += jnp.square(weight.dequantize().T - exact).sum()
    total += jnp.square(exact).sum()
  return _bf16(quantized), jnp.sqrt(miss / jnp.maximum(total, 1e-30))


def _process_layer(
  layer: Params,
  windows: list[jax.Array],
  *,
  config: LlamaConfig,
  recipe: Recipe,
  index: int,
) -> tuple[Params, list[jax.Array], jax.Array]:
  """Smooths and quantises one layer.

  Returns the quantised layer, the input of the next one, and the error.
  """
  formats = tuple(
    recipe.weight_format(index, name, config.num_hidden_layers)
    for name in PROJECTIONS
  )
  solver = recipe.solver
  stats, outputs = None, windows
  if windows:
    moments = solver.weighted or solver.gptq
    outputs, stats = _run_windows(layer, windows, config, moments)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(stats)):
      raise QuantizationError(
        "calibration activations are not finite", where=f"layer {index}"
      )
  factors = _choose_factors(layer, stats, config=config, recipe=recipe)
  quantize = lambda factors: _fold_and_quantize(
    layer, factors, stats, formats=formats, solver=solver
  )
  if recipe.scaling.awq:
    factors = _search_awq(
      factors, stats, windows, outputs, quantize, config, recipe
    )
  quantized, error = quantize(factors)
  if solver.gptq:
    outputs = [_run(quantized, x, config=config, kv=recipe.kv) for x in windows]
  return quantized, outputs, error


@functools.partial(jax.jit, static_argnames=("config", "recipe"))
def _choose_factors(
  layer: Params,
  stats: LayerStats | None,
  *,
  config: LlamaConfig,
  recipe: Recipe,
) -> Factors:
  factors = smooth.channel_factors(layer, recipe.scaling, config)
  if stats is not None:
    key, key_scale = smooth.key_factors(stats, recipe.keys)
    factors = dataclasses.replace(factors, key=key, key_scale=key_scale)
  return factors


@functools.partial(jax.jit, static_argnames=("formats", "solver"))
def _fold_and_quantize(
  layer: Params,
  factors: Factors,
  stats: LayerStats | None,
  *,
  formats: tuple[WeightFormat | None, ...],
  solver: Solver,
) -> tuple[Params, jax.Array]:
  """Applies factors and quantises what they give.

  The published solver works on bf16 weights; a search on unrounded ones.
  """
  dtype = jnp.float32 if solver.scale == "search" else jnp.bfloat16
  as_dtype = lambda p: {"kernel": p["kernel"].astype(dtype)}
  layer = _bf16(layer) if dtype == jnp.bfloat16 else layer
  wide = {name: dict(block) for name, block in layer.items()}
  for name, block in PROJECTIONS.items():
    wide[block][name] = as_dtype(layer[block][name])
  moments = {}
  if stats is not None:
    moments = smooth.fold_stats(stats, factors).moment
  return quantize_layer(
    smooth.fold(wide, factors), formats, solver=solver, moments=moments
  )


def _search_awq(
  factors, stats, windows, outputs, quantize, config, recipe
) -> Factors:
  """Tries each exponent at each site in turn; keeps the least layer error."""

  def loss(factors: Factors) -> float:
    quantized, _ = quantize(factors)
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


@functools.partial(jax.jit, static_argnames=("config", "kv"))
def _miss(layer, x, y, *, config, kv) -> jax.Array:
  """Squared error of a layer's output against `y`."""
  got = _decode(layer, x, config, kv)[0]
  return jnp.square(got.astype(jnp.float32) - y.astype(jnp.float32)).sum()


@functools.partial(jax.jit, static_argnames=("config", "kv"))
def _run(layer, x, *, config, kv) -> jax.Array:
  return _decode(layer, x, config, kv)[0]


@functools.partial(jax.jit, static_argnames=("config", "moments"))
def _run_and_look(layer, x, *, config, moments):
  y, captured = _decode(_bf16(layer), x, config, None, capture=True)
  return y, calibrate.window_stats(captured, moments=moments)


def _run_windows(layer, windows, config, moments):
  """Runs the float layer on every window; returns outputs and statistics."""
  outputs, stats = [], None
  for x in windows:
    y, seen = _run_and_look(layer, x, config=config, moments=moments)
    outputs.append(y)
    stats = seen if stats is None else calibrate.merge_stats(stats, seen)
  return outputs, stats


def _decode(layer, x, config, kv: KVFormat | None, capture=False):
  batch, length, _ = x.shape
  span = llama.make_span(
    config,
    jnp.zeros(batch, jnp.int32),
    jnp.full(batch, length, jnp.int32),
    length,
  )
  y, _, captured = llama.decoder_layer(
    layer, x, span=span, config=config, kv=kv, capture=capture
  )
  return y, cast(dict[str, jax.Array], captured)


def _embed(table: jax.Array, tokens: np.ndarray) -> list[jax.Array]:
  """i32 [windows, T] -> as many bf16 [1, T, D]."""
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ConfigError(
      "not calibration windows",
      expected="integers [windows, length]",
      got=f"{tokens.dtype}{list(tokens.shape)}",
    )
  return [table[jnp.asarray(window)][None] for window in tokens]


def _checked(tree: Params, where: str) -> Params:
  """Returns the tree as JAX arrays, all float and finite."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = "/".join(str(key.key) for key in path if hasattr(key, "key"))
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise QuantizationError(
        "the model is quantised already, or not a float model",
        where=f"{where} {name}",
        got=str(leaf.dtype),
      )
    leaf = jnp.asarray(leaf)
    bad = leaf.size - int(jnp.isfinite(leaf).sum())
    if bad:
      raise QuantizationError(
        "weights are not finite", where=f"{where} {name}", got=f"{bad} of them"
      )
  return jax.tree.map(jnp.asarray, tree)


def _bf16(tree: Params) -> Params:
  """Casts float weights and gains; leaves `QTensor` and `key_scale` alone."""

  def narrow(path, leaf):
    name = path[-1]
    keep = getattr(name, "key", None) not in ("embedding", "kernel", "weight")
    return leaf if keep else leaf.astype(jnp.bfloat16)

  return jax.tree_util.tree_map_with_path(narrow, tree)
