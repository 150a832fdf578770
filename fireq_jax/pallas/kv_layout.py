"""How INT4 codes of keys and values lie in 32-bit words.

Codes are two's complement nibbles, code i of a word in bits 4i to 4i + 3.

K words: uint32 [..., S, H / 8]. Word j of a token holds channels 8j to 8j + 7.

V words: uint32 [..., ceil(S / 32), 4 H]. The tensor cores want the tokens of a
channel side by side, so a word holds one channel of 8 tokens: word
16 g + 4 t + e of a block of 32 tokens holds channel 4 g + e of the tokens 8 t
to 8 t + 7. That is the order in which the threads of a warp load them. The
words of a block stand in rows of 128 (`values_shape`), a good size to copy.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32  # tokens of a block of V words
_OCTET = 8  # codes of a word
_TILE = 128  # tokens that operands of prefill are padded to
VALUE_UNIT = 448 / 1024
WEIGHT_ROWS = 8
# Position 4t + j of 16 tokens holds token 2t + j, or 8 + 2t + j - 2 from j = 2.
KV_ORDER = np.array(
  [2 * t + j if j < 2 else 6 + 2 * t + j for t in range(4) for j in range(4)]
)


def values_shape(tokens: int, head_dim: int) -> tuple[int, int, int]:
  """Shape of the V words of one head."""
  words = 4 * head_dim
  width = math.gcd(words, 128)
  return -(-tokens // BLOCK), words // width, width


def pack_words(codes: jax.Array) -> jax.Array:
  """int8 codes in [-8, 7] [..., 8 n] -> uint32 words [..., n]."""
  nibbles = (codes.astype(jnp.int32) & 15).astype(jnp.uint32)
  nibbles = nibbles.reshape(*codes.shape[:-1], -1, _OCTET)
  return jnp.sum(nibbles << _shifts(), axis=-1, dtype=jnp.uint32)


def unpack_words(words: jax.Array) -> jax.Array:
  """uint32 words [..., n] -> int8 codes in [-8, 7] [..., 8 n]."""
  nibbles = (words[..., None] >> _shifts()).astype(jnp.int8) << jnp.int8(4)
  codes = nibbles >> jnp.int8(4)
  return codes.reshape(*words.shape[:-1], -1)


def pack_values(codes: jax.Array) -> jax.Array:
  """int8 codes [..., S, H], S a multiple of 32 -> V words."""
  *batch, s, h = codes.shape
  n = len(batch)
  # block, t, i, g, e -> block, g, t, e, i
  x = codes.reshape(*batch, s // BLOCK, 4, 8, h // 4, 4)
  x = x.transpose(*range(n), *(n + axis for axis in (0, 3, 1, 4, 2)))
  return pack_words(x).reshape(*batch, *values_shape(s, h))


def unpack_values(words: jax.Array) -> jax.Array:
  """V words -> int8 codes [..., S, H], S a multiple of 32."""
  *batch, blocks, rows, width = words.shape
  n, quads = len(batch), rows * width // 16
  x = unpack_words(words).reshape(*batch, blocks, quads, 4, 4, _OCTET)
  x = x.transpose(*range(n), *(n + axis for axis in (0, 2, 4, 1, 3)))
  return x.reshape(*batch, blocks * BLOCK, quads * 4)


def append_values(
  words: jax.Array, codes: jax.Array, starts: jax.Array, counts: jax.Array
) -> jax.Array:
  """Writes tokens into the middle of V words; others keep their bits.

  Args:
    words: V words [B, K, blocks, ...].
    codes: int8 [B, T, K, H].
    starts: i32 [B], where each row's first token goes.
    counts: i32 [B], how many of the T tokens are written; none may go beyond
      the last block.

  Returns:
    The words, of which only those of written tokens were read or written.
  """
  batch, kv_heads, blocks = words.shape[:3]
  length, head_dim = codes.shape[1], codes.shape[3]
  quads = head_dim // 4
  octets = (length + _OCTET - 1) // _OCTET + 1  # the first may start midway
  octet = starts[:, None] // _OCTET + jnp.arange(octets, dtype=jnp.int32)
  token = octet[..., None] * _OCTET + jnp.arange(_OCTET, dtype=jnp.int32)
  token -= starts[:, None, None]
  written = (token >= 0) & (token < counts[:, None, None])

  source = jnp.clip(token, 0, length - 1).reshape(batch, -1)
  new = jnp.take_along_axis(codes, source[..., None, None], axis=1)
  new = new.reshape(batch, octets, _OCTET, kv_heads, head_dim)
  new = pack_words(new.transpose(0, 3, 1, 4, 2))[..., 0]
  new = new.reshape(batch, kv_heads, octets, quads, 4)
  mask = jnp.where(written, jnp.uint32(15) << _shifts(), jnp.uint32(0))
  mask = jnp.sum(mask, axis=-1, dtype=jnp.uint32)[:, None, :, None, None]

  # Octets in which nothing is written go out of bounds, each to its own place.
  block = jnp.where(
    written.any(-1), octet // 4, blocks + jnp.arange(octets, dtype=jnp.int32)
  )
  index = (
    jnp.arange(batch)[:, None, None],
    jnp.arange(kv_heads)[:, None],
    block[:, None],
    slice(None),
    (octet % 4)[:, None],
  )
  split = words.reshape(batch, kv_heads, blocks, quads, 4, 4)
  old = split.at[index].get(mode="fill", fill_value=0)
  merged = (old & ~mask) | (new & mask)
  split = split.at[index].set(merged, mode="drop", unique_indices=True)
  return split.reshape(words.shape)


def prefill_operands(
  k: jax.Array, k_scale: jax.Array, v: jax.Array, v_scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Codes [B, S, K, H], scales [B, S, K] -> operands of `prefill_attention`.

  Tokens are padded to a multiple of 128 with zeros. Value scales are counted in
  units of `VALUE_UNIT` times the largest of the head, and those below 1 / 1024
  of the largest are raised to that.

  Returns:
    k: e4m3 [B, K, S, H].
    v: e4m3 [B, K, H, S], tokens of each 16 in `KV_ORDER`.
    weights: e4m3 [B, K, 8, S], more rows of v: four times 1 / scale and what
      rounding took from it, each time of every fourth token alone.
    scales: f32 [B, K, S / 2, 4], of two tokens the scales of their keys and
      the log2 of those of their values.
    unit: f32 [B, K].
  """
  by_head = lambda x: jnp.swapaxes(_pad(x, 1), 1, 2)
  k, v = by_head(k), jnp.moveaxis(_pad(v, 1), 1, 3)
  weights, scales, unit = token_operands(
    jnp.swapaxes(k_scale, 1, 2), jnp.swapaxes(v_scale, 1, 2), (v != 0).any(2)
  )
  e4m3 = jnp.float8_e4m3fn
  return k.astype(e4m3), _in_order(v.astype(e4m3)), weights, scales, unit


def token_operands(
  k_scale: jax.Array, v_scale: jax.Array, taken: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Operands that are a number or two of each token.

  Args:
    k_scale: [B, K, S].
    v_scale: [B, K, S].
    taken: bool [B, K, S], S padded: which tokens have values other than zero.

  Returns:
    weights, scales and unit, see `prefill_operands`.
  """
  k_scale, v_scale = (
    _pad(x.astype(jnp.float32), 2) for x in (k_scale, v_scale)
  )
  # The scale of a token without values is arbitrary.
  v_scale = jnp.where(taken, v_scale, 0.0)
  largest = jnp.max(v_scale, axis=-1, keepdims=True)
  largest = jnp.where(largest > 0, largest, 1.0)
  unit = largest * VALUE_UNIT
  v_scale = jnp.where(v_scale > 0, v_scale, largest)
  v_scale = jnp.maximum(v_scale / unit, 1 / 448)
  weight = 1 / v_scale  # at most 448, the largest e4m3
  high = weight.astype(jnp.float8_e4m3fn)
  low = (weight - high.astype(jnp.float32)).astype(jnp.float8_e4m3fn)
  groups = WEIGHT_ROWS // 2
  rows = jnp.stack([high, low] * groups, axis=2)
  of_row = jnp.arange(WEIGHT_ROWS, dtype=jnp.int32)[:, None] // 2
  of_token = jnp.arange(rows.shape[-1], dtype=jnp.int32) % groups
  rows = jnp.where(of_row == of_token, rows, jnp.zeros((), rows.dtype))
  pairs = lambda x: x.reshape(*x.shape[:2], -1, 2)
  scales = [pairs(k_scale), pairs(jnp.log2(v_scale))]
  return _in_order(rows), jnp.concatenate(scales, axis=-1), unit[..., 0]


def padded(tokens: int) -> int:
  """Tokens of the operands of prefill: whole tiles."""
  return -(-tokens // _TILE) * _TILE


def _pad(x, axis):
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, padded(x.shape[axis]) - x.shape[axis]
  return jnp.pad(x, widths)


def _in_order(x):
  """Tokens [..., S] with those of each 16 in `KV_ORDER`."""
  halves = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
  return jnp.swapaxes(halves, -3, -2).reshape(x.shape)


def _shifts() -> jax.Array:
  return jnp.arange(0, 32, 4, dtype=jnp.uint32)
