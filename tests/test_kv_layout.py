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


def test_prefill_operands():
  """Codes in place, scales in pairs, and weights that invert them."""
  rng = np.random.default_rng(0)
  k, v = (rng.integers(-7, 8, (2, 130, 3, 16)) for _ in range(2))
  k_scale, v_scale = np.exp(rng.normal(size=(2, 2, 130, 3)) - 2).astype(
    np.float32
  )
  v[0, 5, 1] = 0  # its scale means nothing
  v_scale[0, 5, 1] = 1e6
  v_scale[1, 7, 2] = 1e-6  # far below the others
  k8, v8, weights, scales, unit = (
    np.asarray(x, np.float64)
    for x in kv_layout.prefill_operands(
      *map(
        jnp.asarray, (k.astype(np.int8), k_scale, v.astype(np.int8), v_scale)
      )
    )
  )
  assert k8.shape == (2, 3, 256, 16) and v8.shape == (2, 3, 16, 256)
  assert scales.shape == (2, 3, 128, 4) and unit.shape == (2, 3)
  np.testing.assert_array_equal(k8[:, :, :130], k.swapaxes(1, 2))
  np.testing.assert_array_equal(k8[:, :, 130:], 0)
  # Thread t of a quad holds tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of 16.
  place = [4 * (s % 8 // 2) + 2 * (s // 8) + s % 2 for s in range(16)]
  v8, weights = (
    x.reshape(2, 3, -1, 16, 16)[..., place].reshape(2, 3, -1, 256)
    for x in (v8, weights)
  )
  np.testing.assert_array_equal(v8[..., :130], v.transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(
    scales[:, :, :65, 0], k_scale[:, ::2].swapaxes(1, 2)
  )
  np.testing.assert_array_equal(
    scales[:, :, :65, 1], k_scale[:, 1::2].swapaxes(1, 2)
  )

  real = v.any(-1)
  largest = np.max(v_scale, axis=1, where=real, initial=0)[:, None]
  want = np.where(real, np.maximum(v_scale, largest / 1024), largest)
  got = 2 ** scales[..., 2:].reshape(2, 3, 256) * unit[..., None]
  np.testing.assert_allclose(got[..., :130], want.swapaxes(1, 2), rtol=1e-5)
  weights = weights.reshape(2, 3, 4, 2, 64, 4)
  for pair in range(4):  # each has every fourth token
    others = np.delete(weights[:, :, pair], pair, axis=-1)
    np.testing.assert_array_equal(others, 0)
  inverse = weights.sum((2, 3)).reshape(2, 3, 256)
  np.testing.assert_allclose(
    inverse * got, np.broadcast_to(unit[..., None], got.shape), rtol=2**-8
  )
