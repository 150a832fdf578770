"""The PTX that turns INT4 codes into tensor core operands, case by case."""

import itertools

import ml_dtypes
import numpy as np
import ptx
import pytest

from fireq_jax.pallas import dequant, int4_quarters

E4M3 = ml_dtypes.float8_e4m3fn
SCALED = "sign_magnitude", "twos_complement"
LOWEST = {"sign_magnitude": -7, "twos_complement": -8, "subnormal": -7}


def every_scale():
  """All positive finite e4m3 values."""
  values = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
  return values[np.isfinite(values) & (values > 0)]


def rounded(values):
  return np.clip(values, -448, 448).astype(E4M3).astype(np.float32)


def nibble(code, encoding):
  return code & 15 if encoding == "twos_complement" else abs(code)


def word_of(codes, encoding):
  """The 32-bit word of 8 codes, as `dequant` describes it."""
  nibbles = [nibble(code, encoding) for code in codes]
  if encoding == "subnormal":
    nibbles = [nibbles[i] for i in (0, 5, 1, 6, 2, 7, 3, 4)]
  if encoding != "twos_complement":
    for i in range(4):
      nibbles[2 * i + 1] |= (codes[i] < 0) << 3
      nibbles[2 * i] |= (codes[4 + i] < 0) << 3
  return sum(n << 4 * i for i, n in enumerate(nibbles))


def e4m3_bytes(word):
  parts = [(word >> 8 * i) & 255 for i in range(4)]
  return np.stack(parts, -1).astype(np.uint8).view(E4M3).astype(np.float32)


def tables(encoding, scales):
  registers = []
  bits = scales.astype(np.float16).view(np.uint16).astype(np.int64)
  for values in dequant.CODES[encoding]:
    env = ptx.run(dequant.table_ptx(values), {"$2": bits})
    registers += [env["$0"], env["$1"]]
  return registers


def look_up(word, table, encoding):
  """Words of what the codes of a word mean."""

  def run(text, inputs, count):
    names = {f"${count + i}": register for i, register in enumerate(inputs)}
    env = ptx.run(text, names)
    return [env[f"${i}"] for i in range(count)]

  picked = []
  if table:
    picked = run(dequant.PICK_PTX[encoding], [word, *table], len(table))
  return run(dequant.JOIN_PTX[encoding], [word, *picked], 2)


@pytest.mark.parametrize("encoding", SCALED)
def test_scaled_codes_round_to_nearest_e4m3(encoding):
  scales = every_scale()
  words = tables(encoding, scales)
  # Every code with every scale, at every place in the word.
  for place, code in itertools.product(range(8), range(LOWEST[encoding], 8)):
    codes = np.roll(np.arange(-3, 5), place)
    codes[place] = code
    word = np.int64(word_of(codes, encoding))
    low, high = look_up(word, words, encoding)
    got = np.concatenate([e4m3_bytes(low), e4m3_bytes(high)], -1)
    np.testing.assert_array_equal(got, rounded(codes * scales[:, None]))


@pytest.mark.parametrize("encoding", LOWEST)
def test_exact_codes_are_the_codes(encoding):
  words = [
    np.int64(word)
    for values in dequant.CODES[encoding]
    for word in np.asarray(values, E4M3).view(np.uint32)
  ]
  for start in range(LOWEST[encoding], 1):
    codes = np.arange(start, start + 8)
    word = np.int64(word_of(codes, encoding))
    low, high = look_up(word, words, encoding)
    got = np.concatenate([e4m3_bytes(low), e4m3_bytes(high)], -1)
    np.testing.assert_array_equal(got, codes * dequant.unit(encoding))


def test_bf16_codes_are_the_codes():
  for place, code in itertools.product(range(8), range(-8, 8)):
    codes = np.arange(-4, 4)
    codes[place] = code
    word = sum((int(c) + 8) << 4 * i for i, c in enumerate(codes))
    for i in range(4):
      pair = ptx.run(dequant.bf16_ptx(i), {"$1": np.int64(word)})["$0"]
      bits = np.array([pair & 0xFFFF, pair >> 16], np.uint16)
      got = bits.view(ml_dtypes.bfloat16).astype(np.float32)
      np.testing.assert_array_equal(got, codes[[i, 4 + i]])


@pytest.mark.parametrize("halves", [1, 2])
def test_a_thread_finds_its_words_in_swizzled_rows(halves):
  thread = np.arange(256)
  place = int4_quarters.place_ptx(halves)
  start = ptx.run(place, {"%tid.x": thread})["$0"]
  lane, warp = thread % 32, thread // 32 % 4
  row = 16 // halves * warp + lane // 4
  np.testing.assert_array_equal(start >> 6, row)
  for unit in range(4):  # of 16 bytes; four threads share one
    swizzled = unit ^ (row // 2 % 4)
    wanted = 64 * row + 16 * swizzled + 4 * (lane % 4)
    np.testing.assert_array_equal(start ^ 16 * unit, wanted)
