"""Numbers of a row in the registers of threads, and their INT4 codes.

Functions of a `threads.Threads` and of its registers, for programs that round
rows. The laws of scales and codes are those of `kv_cache.encode`.
"""

import functools

import numpy as np

from fireq_jax.kv_cache import INT4

SCALE_BITS = {"bf16": 16, "e4m3": 8, "f32": 32}
TINY = float(np.finfo(np.float32).tiny)
_TO_INTEGER = 1.5 * 2**23  # its sum with x ends in the bits of round(x)
# With the sums of 8 numbers, each 4 bits above the one before, it makes a word
# of the codes plus 8.
_WORD = (0x88888888 - 0x4B400000 * 0x11111111) % 2**32


def floats(t, ref, index, when=None):
  """8 f32 from `index` on."""
  words = t.load(ref, index, 4, when) + t.load(ref, index + 4, 4, when)
  return [t.as_f32(word) for word in words]


def unpack_bf16(t, words):
  return [
    t.as_f32(bits) for word in words for bits in (word << 16, word & 0xFFFF0000)
  ]


def each(function, *lists):
  return [function(*items) for items in zip(*lists)]


def largest(t, values, lanes):
  """The largest magnitude in `lanes` neighbouring lanes."""
  amax = functools.reduce(t.maximum, [t.absolute(x) for x in values])
  return _over_lanes(t, amax, lanes)


def _over_lanes(t, x, lanes):
  while lanes > 1:
    lanes //= 2
    x = t.maximum(x, t.shuffle_xor(x, lanes))
  return x


def scale(t, values, lanes, codes, dtype):
  """The scale of INT4 codes of all values in `lanes` neighbouring lanes,
  rounded to `dtype`; and the bits to store."""
  _, down, up = INT4[codes]
  high = functools.reduce(t.maximum, values)
  low = functools.reduce(t.minimum, values)
  scale = t.maximum(
    high * float(np.float32(1 / up)), low * float(np.float32(-1 / down))
  )
  scale = _over_lanes(t, scale, lanes)
  match dtype:
    case "bf16":
      scale = t.as_f32(t.pack_bf16(scale, scale) & 0xFFFF0000)
    case "e4m3":
      scale = t.unpack_e4m3(t.pack_e4m3(scale, scale))
  scale = t.select(scale < TINY, 1.0, scale)
  match dtype:
    case "bf16":
      return scale, t.bits(scale) >> 16
    case "e4m3":
      return scale, t.pack_e4m3(scale, scale)
  return scale, t.bits(scale)


def word(t, values, codes, dtype):
  """Codes round(x / scale) of at most 8 (x, scale), as nibbles.

  Scales are of `scale`: only those rounded to e4m3 may be so much too small
  that another code would follow.
  """
  lowest = float(INT4[codes][0])
  total = _WORD
  for n, (x, scale) in enumerate(values):
    x = t.divide(x, scale)
    if dtype == "e4m3":
      x = t.minimum(t.maximum(x, lowest), 7.0)
    total = (t.bits(x + _TO_INTEGER) << (4 * n)) + total
  return total ^ 0x88888888
