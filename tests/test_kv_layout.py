"""The words of an INT4 cache, against their description bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax.pallas import kv_layout


def random_codes(*shape):
  return np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)


def nibble(word, i):
  code = (int(word) >> (4 * i)) & 15
  return code - 16 if code > 7 else code


def test_k_words():
  codes = random_codes(3, 5, 16)
  words = np.asarray(kv_layout.pack_words(jnp.asarray(codes)))
  assert words.dtype == np.uint32 and words.shape == (3, 5, 2)
  for index in np.ndindex(codes.shape):
    *token, channel = index
    assert nibble(words[*token, channel // 8], channel % 8) == codes[index]
  np.testing.assert_array_equal(kv_layout.unpack_words(words), codes)


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128])
def test_v_words(head_dim):
  codes = random_codes(2, 64, head_dim)
  words = np.asarray(kv_layout.pack_values(jnp.asarray(codes)))
  assert words.shape == (2, *kv_layout.values_shape(64, head_dim))
  flat = words.reshape(2, 2, -1)
  for index in np.ndindex(codes.shape):
    b, token, channel = index
    octet = token % 32 // 8
    word = flat[b, token // 32, channel // 4 * 16 + octet * 4 + channel % 4]
    assert nibble(word, token % 8) == codes[index]
  np.testing.assert_array_equal(kv_layout.unpack_values(words), codes)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_append_values_touches_nothing_else(length):
  """Rows start anywhere, write some of their tokens, or none."""
  starts = np.array([0, 1, 7, 8, 23, 50])
  counts = np.minimum([length, 0, length, 1, length, length], 96 - starts)
  held = random_codes(6, 2, 96, 16)
  new = random_codes(6, length, 2, 16)[..., ::-1]
  want = held.copy()
  for b, (start, count) in enumerate(zip(starts, counts)):
    want[b, :, start : start + count] = new[b, :count].swapaxes(0, 1)
  got = jax.jit(kv_layout.append_values)(
    kv_layout.pack_values(jnp.asarray(held)),
    jnp.asarray(new),
    jnp.asarray(starts, jnp.int32),
    jnp.asarray(counts, jnp.int32),
  )
  np.testing.assert_array_equal(kv_layout.unpack_values(got), want)
