"""Keys and values held between steps: INT4, e4m3 or bf16, of fixed capacity.

All knowledge of how a cache lies in memory is in this file. Attention sees
only `KeyValues`, the logical codes and scales.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fireq_jax.config import KVFormat, LlamaConfig
from fireq_jax.errors import UnsupportedError
from fireq_jax.pallas import kv_layout
from fireq_jax.qtensor import round_bf16, round_e4m3, to_e4m3

_SCALE_DTYPES = {
  "bf16": jnp.bfloat16,
  "e4m3": jnp.float8_e4m3fn,
  "f32": jnp.float32,
}
_CODE_DTYPES = {"e4m3": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}
# The lowest INT4 code, and how far below and above 0 numbers may reach, in
# steps: to the code itself, or as far beyond as still rounds to it, whichever
# way a bf16 scale was rounded.
INT4 = {"symmetric": (-7, 7.0, 7.0), "full": (-8, 8.46, 7.47)}


@flax.struct.dataclass
class KeyValues:
  """Keys and values of S tokens as attention multiplies them.

  Law: key = k * k_scale and value = v * v_scale, per token and kv head.

  Attributes:
    k: [B, S, K, H] int8 codes in [-8, 7], e4m3 codes, or bf16 or f32 keys.
    v: the same for values.
    k_scale: f32 [B, S, K], or None where k holds the keys themselves.
    v_scale: the same for values.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


@flax.struct.dataclass
class LayerCache:
  """One layer's keys and values for S tokens of B sequences.

  Attributes:
    k: [B, K, S, H] e4m3 or bf16, or uint32 [B, K, S, H / 8], the K words of
      `pallas.kv_layout`.
    v: [B, K, S, H] e4m3 or bf16, or uint32 [B, K, ceil(S / 32), ...], its
      V words.
    k_scale: [B, K, S] of dtype `format.scale`, or None for bf16.
    v_scale: the same for values.
    format: what is held (static).
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None
  v_scale: jax.Array | None
  format: KVFormat = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class KVCache:
  """What a model remembers of B sequences.

  Attributes:
    layers: a `LayerCache` per decoder layer.
    lengths: i32 [B], tokens held per sequence; what lies beyond is undefined.
  """

  layers: list[LayerCache]
  lengths: jax.Array

  @property
  def format(self) -> KVFormat:
    return self.layers[0].format

  @property
  def capacity(self) -> int:
    return self.layers[0].k.shape[2]


def init_cache(
  config: LlamaConfig, batch: int, capacity: int, kv: KVFormat
) -> KVCache:
  """Returns an empty cache of `capacity` tokens for each of `batch` rows."""
  heads, head_dim = config.num_key_value_heads, config.head_dim
  shape = (batch, heads, capacity)

  def codes(for_values):
    if kv.cache != "int4":
      return jnp.zeros((*shape, head_dim), _CODE_DTYPES[kv.cache])
    if head_dim % 8:
      raise UnsupportedError(
        "an INT4 cache needs head_dim to be a multiple of 8", got=head_dim
      )
    if for_values:
      words = kv_layout.values_shape(capacity, head_dim)
      return jnp.zeros((batch, heads, *words), jnp.uint32)
    return jnp.zeros((*shape, head_dim // 8), jnp.uint32)

  def layer():
    scale = lambda: (
      None if kv.cache == "bf16" else jnp.ones(shape, _SCALE_DTYPES[kv.scale])
    )
    return LayerCache(
      k=codes(False),
      v=codes(True),
      k_scale=scale(),
      v_scale=scale(),
      format=kv,
    )

  return KVCache(
    layers=[layer() for _ in range(config.num_hidden_layers)],
    lengths=jnp.zeros(batch, jnp.int32),
  )


def bytes_per_token(config: LlamaConfig, kv: KVFormat) -> int:
  """Bytes that one token of one sequence takes in all layers together."""
  tokens = kv_layout.BLOCK
  cache = jax.eval_shape(lambda: init_cache(config, 1, tokens, kv))
  leaves = jax.tree.leaves(cache.layers)
  return sum(x.size * x.dtype.itemsize for x in leaves) // tokens


def encode(k: jax.Array, v: jax.Array, kv: KVFormat) -> KeyValues:
  """Rounds keys and values to a format, per token and kv head.

  A scale is the largest of `wanted_scales`, rounded to its dtype; INT4 codes
  are round(x / scale), clipped, e4m3 ones x / scale. Codes are computed against
  the rounded scale; a scale that would round to zero is 1 with codes 0 (FireQ
  3.3).

  Args:
    k: [B, S, K, H] of any float dtype, after RoPE.
    v: [B, S, K, H].
    kv: the format.
  """
  if kv.cache == "bf16":
    return KeyValues(k=k.astype(jnp.bfloat16), v=v.astype(jnp.bfloat16))
  k, k_scale = _quantize(k, kv)
  v, v_scale = _quantize(v, kv)
  return KeyValues(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def wanted_scales(x: jax.Array, kv: KVFormat) -> jax.Array:
  """The least scale at which codes reach each of x, any float dtype, in f32."""
  x = x.astype(jnp.float32)
  down = up = 448.0
  if kv.cache == "int4":
    _, down, up = INT4[kv.codes]
  return jnp.maximum(x * (1 / up), x * (-1 / down))


def _quantize(x: jax.Array, kv: KVFormat) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  scale = jnp.max(wanted_scales(x, kv), axis=-1)
  match kv.scale:
    case "e4m3":
      scale = round_e4m3(scale)
    case "bf16":
      scale = round_bf16(scale)
  zero = scale < jnp.finfo(jnp.float32).tiny
  scale = jnp.where(zero, 1.0, scale)
  codes = jnp.where(zero[..., None], 0.0, x / scale[..., None])
  if kv.cache == "int4":
    lowest = INT4[kv.codes][0]
    return jnp.clip(jnp.round(codes), lowest, 7).astype(jnp.int8), scale
  return to_e4m3(codes), scale


def append(
  layer: LayerCache,
  k: jax.Array,
  v: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
) -> LayerCache:
  """Writes new tokens at each row's own position.

  Under `jit` with the cache donated, or inside a loop, the update is in place.
  A token beyond the capacity is dropped.

  Args:
    layer: the cache.
    k: [B, T, K, H] of any float dtype, after RoPE.
    v: [B, T, K, H].
    starts: i32 [B], where each row's first token goes.
    counts: i32 [B], how many of the T tokens are real.
  """
  new = encode(k, v, layer.format)
  batch, length, kv_heads = new.k.shape[:3]
  offsets = jnp.arange(length, dtype=jnp.int32)
  capacity = layer.k.shape[2]
  # Padding goes out of bounds, each token to a place of its own.
  slots = jnp.where(
    offsets < counts[:, None], starts[:, None] + offsets, capacity + offsets
  )
  index = (
    jnp.arange(batch)[:, None, None],
    jnp.arange(kv_heads)[:, None],
    slots[:, None],
  )

  def write(old: Any, values: Any) -> Any:
    if old is None:
      return None
    return old.at[index].set(
      jnp.swapaxes(values, 1, 2).astype(old.dtype),
      mode="drop",
      unique_indices=True,
    )

  if layer.format.cache == "int4":
    room = jnp.clip(capacity - starts, 0, counts)
    new_k = write(layer.k, kv_layout.pack_words(new.k))
    new_v = kv_layout.append_values(layer.v, new.v, starts, room)
  else:
    new_k, new_v = write(layer.k, new.k), write(layer.v, new.v)
  return dataclasses.replace(
    layer,
    k=new_k,
    v=new_v,
    k_scale=write(layer.k_scale, new.k_scale),
    v_scale=write(layer.v_scale, new.v_scale),
  )


def read(layer: LayerCache) -> KeyValues:
  """Returns all S tokens of a layer in logical order."""
  k, v = layer.k, layer.v
  if layer.format.cache == "int4":
    k = kv_layout.unpack_words(k)
    v = kv_layout.unpack_values(v)[:, :, : k.shape[2]]
  scale = lambda x: None if x is None else x.astype(jnp.float32)
  return jax.tree.map(
    lambda x: jnp.swapaxes(x, 1, 2),
    KeyValues(
      k=k,
      v=v,
      k_scale=scale(layer.k_scale),
      v_scale=scale(layer.v_scale),
    ),
  )
