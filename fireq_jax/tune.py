"""A quantised layer, trained to give what the float layer gives.

A solver looks at one projection at a time and takes the error of activations,
keys and values as given. Here all that is stored of a decoder layer moves at
once, by gradient descent on the error of the layer's output with everything
rounded as at run time: weights, activations, queries, keys, values and
probabilities. Roundings pass gradients straight through (Bengio et al. 2013,
arXiv 1308.3432); a layer is the block of Li et al. 2021 (arXiv 2102.05426).
Formats, scales and bytes stay what they were.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fireq_jax import kv_cache, offline
from fireq_jax.codebook import nearest
from fireq_jax.config import KVFormat, LlamaConfig
from fireq_jax.linear import RMSNorm
from fireq_jax.models import llama
from fireq_jax.qtensor import (
  QTensor,
  code_values,
  pack_int4,
  quantize_e4m3,
  unpack_int4,
)
from fireq_jax.recipe import PROJECTIONS, Tuning, WeightFormat
from fireq_jax.rope import apply_rope

Params = dict[str, Any]
Formats = tuple[tuple[str, WeightFormat | None], ...]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_KEYS = ("key_scale", "key_shift")
# Weights start this far from their code's value on the way to the float weight,
# or to the border of the code's cell if that is beyond: from the border the
# first steps would undo what the solver chose, and from the value all codes
# change at once.
_START = 0.6
# Codes end at 7 or 8, so beyond this, in units of scales, nothing changes.
_FARTHEST = 8.0
# What a relative offset of key_shift is relative to: the size of fitted keys.
_KEY_SIZE = 8.0
_DECAY = (0.9, 0.95)


@functools.partial(
  offline.jit, static_argnames=("formats", "tuning", "config", "kv")
)
def tune_layer(
  exact: Params,
  quantized: Params,
  inputs: jax.Array,
  targets: jax.Array,
  *,
  formats: Formats,
  tuning: Tuning,
  config: LlamaConfig,
  kv: KVFormat,
) -> tuple[Params, jax.Array]:
  """Moves codes, norms' gains and factors of keys to where the output is best.

  The error is `relative_error`; that of steps falls, but whether the result
  is better is for the caller to see.

  Args:
    exact: the float layer that was quantised, f32 or bf16 kernels.
    quantized: the layer to start from.
    inputs: bf16 [W, T, D], what the layer gets in the quantised model.
    targets: bf16 [W, T, D], what the float model has after the layer.
    formats: of every projection.
    tuning: how long and how fast.
    config: the model.
    kv: format of keys and values.

  Returns:
    the layer, of the same formats and dtypes; and f32 [steps], the error of
    each step's windows before the step.
  """
  weight_formats = {name: f for name, f in formats if f is not None}
  moved = _start(exact, quantized, weight_formats)
  rates = {
    name: jax.tree.map(lambda _, rate=rate: rate, moved[name])
    for name, rate in (
      ("weights", tuning.weight_rate),
      ("gains", tuning.factor_rate),
      ("keys", tuning.factor_rate),
    )
  }
  rounded = lambda moved: _rounded(quantized, moved, weight_formats)
  windows = inputs.shape[0]
  batch = min(tuning.batch, windows)
  batches = windows // batch

  def error(at, x, y):
    layer = _layer(quantized, at)
    return relative_error(_forward(layer, x, config=config, kv=kv), y)

  def step(i, state):
    moved, at, moments, errors = state
    epoch = jax.random.fold_in(jax.random.key(0), i // batches)
    order = jax.random.permutation(epoch, windows)
    chosen = jax.lax.dynamic_slice_in_dim(order, i % batches * batch, batch)
    # Slopes at the values of codes move the weights before rounding; that they
    # are per value, not per scale, makes no difference to Adam.
    value, slope = jax.value_and_grad(error)(
      at, inputs[chosen], targets[chosen]
    )
    fade = 0.5 * (1 + jnp.cos(jnp.pi * i / tuning.steps))
    moved, moments = _adam(moved, slope, moments, i, rates, fade)
    moved["weights"] = _within(moved["weights"])
    # Rounded here, in the same pass over the weights.
    at = rounded(moved)
    share = tuning.settling * i / tuning.steps
    moved["weights"] = _settled(quantized, moved, at, share)
    return moved, at, moments, errors.at[i].set(value)

  zeros = (jax.tree.map(jnp.zeros_like, moved),) * 2
  state = moved, rounded(moved), zeros, jnp.zeros(tuning.steps)
  moved, _, _, errors = jax.lax.fori_loop(0, tuning.steps, step, state)
  return _stored(quantized, moved, weight_formats), errors


def relative_error(got: jax.Array, wanted: jax.Array) -> jax.Array:
  """Squared difference of bf16 [..., D] over the square of `wanted`, a mean
  over tokens."""
  got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
  size = jnp.square(wanted).mean(axis=-1)
  miss = jnp.square(got - wanted).mean(axis=-1)
  return (miss / jnp.maximum(size, 1e-20)).mean()


def _adam(values, slope, moments, i, rates, fade):
  """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980)."""
  decay1, decay2 = _DECAY
  slope = jax.tree.map(lambda g: g.astype(jnp.float32), slope)
  first = jax.tree.map(
    lambda m, g: decay1 * m + (1 - decay1) * g, moments[0], slope
  )
  second = jax.tree.map(
    lambda v, g: decay2 * v + (1 - decay2) * g * g, moments[1], slope
  )
  unbias1, unbias2 = (1 / (1 - d ** (i + 1.0)) for d in _DECAY)

  def move(value, m, v, rate):
    size = jnp.sqrt(v * unbias2) + 1e-12
    return value - fade * rate * (m * unbias1) / size

  return jax.tree.map(move, values, first, second, rates), (first, second)


def _start(
  exact: Params, quantized: Params, formats: dict[str, WeightFormat]
) -> Params:
  """What moves, where it starts: weights f32 [N, C] in units of their scales,
  inside the cells of their codes; norms' gains and factors of keys as offsets.
  """
  weights = {}
  for name, weight_format in formats.items():
    block = PROJECTIONS[name]
    weight = quantized[block][name]["kernel"]
    wanted = exact[block][name]["kernel"].T.astype(jnp.float32)
    wanted = wanted * weight.tensor_scale
    codes, scale = unpack_int4(weight.codes), _scales(weight)
    value = code_values(codes, scale)
    low, high = (
      (value + code_values(codes + jnp.int8(step), scale)) / 2
      for step in (-1, 1)
    )
    low = jnp.where(codes <= weight_format.lowest_code, -jnp.inf, low)
    high = jnp.where(codes >= 7, jnp.inf, high)
    begin = value + _START * (jnp.clip(wanted, low, high) - value)
    weights[name] = begin / scale.astype(jnp.float32)
  attn = quantized["self_attn"]
  still = lambda x: jnp.zeros(x.shape, jnp.float32)
  return {
    "weights": _within(weights),
    "gains": {name: still(quantized[name]["weight"]) for name in _NORMS},
    "keys": {name: still(attn[name]) for name in _KEYS if name in attn},
  }


def _within(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
  clip = lambda x: jnp.clip(x, -_FARTHEST, _FARTHEST)
  return jax.tree.map(clip, weights)


def _scales(weight: QTensor) -> jax.Array:
  """The scale of every weight, [N, C]; wide types, to repeat on any device."""
  wide = jnp.repeat(weight.scale.astype(jnp.float32), weight.group, axis=1)
  return wide.astype(weight.scale.dtype)


def _nearest(
  weight: QTensor, moved: jax.Array, weight_format: WeightFormat
) -> tuple[jax.Array, jax.Array]:
  """Codes int8 [N, C] of a weight in units of its scales, and their values."""
  scale = _scales(weight)
  wanted = moved * scale.astype(jnp.float32)
  return nearest(wanted, scale, lowest=weight_format.lowest_code)


def _rounded(
  quantized: Params, moved: Params, formats: dict[str, WeightFormat]
) -> Params:
  """`moved` with weights as they multiply: the values of their codes, tensor
  scale applied, in the narrowest type that holds them."""
  weights = {}
  for name, x in moved["weights"].items():
    weight = quantized[PROJECTIONS[name]][name]["kernel"]
    _, value = _nearest(weight, x, formats[name])
    exact = weight.scale.dtype == jnp.float8_e4m3fn
    weights[name] = value.astype(jnp.bfloat16 if exact else jnp.float32)
  return moved | {"weights": weights}


def _settled(
  quantized: Params, moved: Params, at: Params, share: jax.Array
) -> dict[str, jax.Array]:
  """The weights of `moved`, a share of the way to what they round to.

  A weight whose error is least between two codes is drawn to the border, where
  the codes take turns until the end. Settled, it keeps one of them, and others
  move to make up for it (Nagel et al. 2022, arXiv 2203.11086).
  """

  def settle(name, x):
    weight = quantized[PROJECTIONS[name]][name]["kernel"]
    value = at["weights"][name].astype(jnp.float32)
    return x + share * (value / _scales(weight).astype(jnp.float32) - x)

  return {name: settle(name, x) for name, x in moved["weights"].items()}


def _layer(quantized: Params, at: Params) -> Params:
  """The layer at `at`, which is `_rounded`: differentiable."""
  attn = dict(quantized["self_attn"])
  mlp = dict(quantized["mlp"])
  blocks = {"self_attn": attn, "mlp": mlp}
  for name, value in at["weights"].items():
    block = blocks[PROJECTIONS[name]]
    block[name] = block[name] | {"value": value}
  keys = at["keys"]
  if "key_scale" in keys:
    attn["key_scale"] = attn["key_scale"] * jnp.exp(keys["key_scale"])
  if "key_shift" in keys:
    attn["key_shift"] = attn["key_shift"] + _KEY_SIZE * keys["key_shift"]
  gains = {
    name: {
      "weight": quantized[name]["weight"].astype(jnp.float32)
      * (1 + at["gains"][name])
    }
    for name in _NORMS
  }
  return {**blocks, **gains}


def _forward(
  layer: Params, x: jax.Array, *, config: LlamaConfig, kv: KVFormat
) -> jax.Array:
  """`llama.decoder_layer` on [W, T, D], with gradients through roundings."""
  batch, length, _ = x.shape
  attn, mlp, dtype = layer["self_attn"], layer["mlp"], x.dtype
  span = llama.make_span(
    config,
    jnp.zeros(batch, jnp.int32),
    jnp.full(batch, length, jnp.int32),
    length,
  )
  heads = lambda x: x.reshape(*x.shape[:-1], -1, config.head_dim)
  norm = lambda name, x: RMSNorm(layer[name]["weight"], config.rms_norm_eps)(x)

  def project(projection, x, residual=None):
    weight = projection["kernel"]
    if isinstance(weight, QTensor):
      y = _multiply(weight, projection["value"], x, dtype)
    else:
      y = _einsum("btc,cn->btn", x.astype(dtype), weight)
    if residual is not None:
      y = y + residual.astype(jnp.float32)
    return y.astype(dtype)

  h = norm("input_layernorm", x)
  q, k, v = (heads(project(attn[n], h)) for n in ("q_proj", "k_proj", "v_proj"))
  q, k = (apply_rope(a, span.cos, span.sin) for a in (q, k))
  if "key_scale" in attn:
    k = k * attn["key_scale"]
    groups = q.shape[2] // k.shape[2]
    q = q / jnp.repeat(attn["key_scale"], groups, axis=0)
  if "key_shift" in attn:
    k = k - attn["key_shift"]
  out = _attention(q, k, v.astype(jnp.float32), kv, dtype)
  x = project(attn["o_proj"], out.reshape(batch, length, -1), x)
  h = norm("post_attention_layernorm", x)
  gate, up = (
    project(mlp[n], h).astype(jnp.float32) for n in ("gate_proj", "up_proj")
  )
  return project(mlp["down_proj"], (jax.nn.silu(gate) * up).astype(dtype), x)


def _multiply(weight: QTensor, value: jax.Array, x: jax.Array, dtype):
  """x [B, T, C] -> f32 [B, T, N], as `fireq_jax.linear.linear` computes it."""
  row_scale = 1.0
  if weight.activation == "e4m3":
    x, row_scale = _rows(x)
  else:
    x = x.astype(dtype)
  y = _einsum("btc,nc->btn", x.astype(value.dtype), value)
  return y * (row_scale / weight.tensor_scale)


def _attention(q, k, v, kv: KVFormat, dtype) -> jax.Array:
  """`attention` of f32 [W, T, N, H] to [W, T, K, H] twice."""
  batch, length, heads, head_dim = q.shape
  q_scale = k_scale = v_scale = None
  if kv.query == "e4m3":
    q, q_scale = _rows(q)
  if kv.cache != "bf16":
    held = kv_cache.encode(k, v, kv)
    k, k_scale = _cached(k, held.k, held.k_scale, kv)
    v, v_scale = _cached(v, held.v, held.v_scale, kv)
  kv_heads = k.shape[2]

  def by_head(x):
    """[W, T, N, C] -> [W, K, N / K * T, C]: the rows that share keys."""
    x = x.reshape(batch, length, kv_heads, -1, x.shape[-1])
    return jnp.moveaxis(x, 1, 3).reshape(batch, kv_heads, -1, x.shape[-1])

  q, k, v = (by_head(x.astype(jnp.bfloat16)) for x in (q, k, v))
  scores = _einsum("bkrh,bksh->bkrs", q, k) * head_dim**-0.5
  if q_scale is not None:
    scores *= by_head(q_scale)
  over_tokens = lambda scale: jnp.moveaxis(scale, 1, -1)[:, :, None]
  if k_scale is not None:
    scores *= over_tokens(k_scale)
  causal = jnp.tril(jnp.ones((length, length), bool))
  visible = jnp.tile(causal, (heads // kv_heads, 1))
  p = jax.nn.softmax(scores, axis=-1, where=visible)
  p_scale = 1.0
  if v_scale is not None:
    p = p * over_tokens(v_scale)
    if q_scale is not None:
      p, p_scale = _rows(p)
  out = _einsum("bkrs,bksh->bkrh", p.astype(jnp.bfloat16), v) * p_scale
  out = out.reshape(batch, kv_heads, -1, length, head_dim)
  out = jnp.moveaxis(out, 3, 1)
  return out.reshape(batch, length, heads, head_dim).astype(dtype)


def _rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """e4m3 codes of each row in f32, and scales [..., 1]."""
  x = x.astype(jnp.float32)
  codes, scale = jax.lax.stop_gradient(quantize_e4m3(x, jnp.float32))
  return _straight(x / scale[..., None], codes), scale[..., None]


def _cached(x, codes, scale, kv: KVFormat):
  """Codes of keys or values in f32 and their scales [..., K]; the scale
  follows the channel that reaches farthest, in gradients too."""
  # Not `max`: its gradient divides by how many channels equal the result,
  # which is none where XLA computes x twice and not to the same bit.
  wanted = kv_cache.wanted_scales(jax.lax.stop_gradient(x), kv)
  index = jnp.argmax(wanted, axis=-1, keepdims=True)
  farthest = jnp.take_along_axis(x, index, axis=-1)[..., 0]
  zero = farthest == 0
  ratio = jax.lax.stop_gradient(scale / jnp.where(zero, 1.0, farthest))
  scale = jnp.where(zero, 1.0, farthest * ratio)
  return _straight(x / scale[..., None], codes.astype(jnp.float32)), scale


def _straight(x: jax.Array, rounded: jax.Array) -> jax.Array:
  """`rounded`, with the gradient of x."""
  return x + jax.lax.stop_gradient(rounded - x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Einsum of two arrays of one dtype, in f32; gradients keep that dtype.

  Those of `jnp.einsum` are products with an f32 operand, which take longer.
  """
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_forward(spec, a, b):
  return _einsum(spec, a, b), (a, b)


def _einsum_backward(spec, operands, slope):
  a, b = operands
  of_a, of_b, of_y = spec.replace("->", ",").split(",")
  slope = slope.astype(a.dtype)
  return (
    jnp.einsum(f"{of_y},{of_b}->{of_a}", slope, b),
    jnp.einsum(f"{of_y},{of_a}->{of_b}", slope, a),
  )


_einsum.defvjp(_einsum_forward, _einsum_backward)


def _stored(
  quantized: Params, moved: Params, formats: dict[str, WeightFormat]
) -> Params:
  """The layer at `moved`, in its formats."""
  layer = _layer(quantized, moved | {"weights": {}})
  for name in _NORMS:
    dtype = quantized[name]["weight"].dtype
    layer[name] = {"weight": layer[name]["weight"].astype(dtype)}
  for name, x in moved["weights"].items():
    block = PROJECTIONS[name]
    weight = quantized[block][name]["kernel"]
    codes, _ = _nearest(weight, x, formats[name])
    weight = dataclasses.replace(weight, codes=pack_int4(codes))
    layer[block][name] = {"kernel": weight}
  return layer
