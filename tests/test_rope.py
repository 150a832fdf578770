"""Rotary embedding against complex rotations in float64."""

import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest

from fireq_jax.config import RopeConfig
from fireq_jax.rope import apply_rope, cos_sin, inverse_frequencies

ROPES = {
  "default": RopeConfig(theta=10000.0),
  "linear": RopeConfig(theta=10000.0, type="linear", factor=4.0),
  "llama3.1": RopeConfig(theta=500000.0, type="llama3", factor=8.0),
  "llama3.2": RopeConfig(theta=500000.0, type="llama3", factor=32.0),
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name, head_dim):
  got = inverse_frequencies(ROPES[name], head_dim)
  want = numpy_llama.frequencies(ROPES[name], head_dim)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=5e-7)


def test_llama3_keeps_short_waves_and_divides_long_ones():
  plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
  scaled = inverse_frequencies(ROPES["llama3.1"], 128)
  np.testing.assert_array_equal(scaled[:16], plain[:16])
  np.testing.assert_allclose(scaled[-16:], plain[-16:] / 8, rtol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 1000, 8191, 8192, 40000, 131071])
@pytest.mark.parametrize("name", ROPES)
def test_rotation_far_beyond_the_original_positions(name, position):
  head_dim = 64
  x = np.random.default_rng(position).normal(size=(1, 1, 2, head_dim))
  cos, sin = cos_sin(jnp.array([[position]]), ROPES[name], head_dim)
  got = apply_rope(jnp.asarray(x, jnp.float32), cos, sin)[0, 0]
  # The f32 frequencies define the rotation; the angle is rounded once more.
  inv = inverse_frequencies(ROPES[name], head_dim).astype(np.float64)
  want = np.stack([numpy_llama.rotate(h, position, inv) for h in x[0, 0]])
  bound = 3 * (position * 2.0**-24 + 1e-6)
  np.testing.assert_allclose(got, want, atol=bound)


def test_rotation_is_in_f32_for_bf16_heads():
  x = jnp.ones((1, 1, 1, 16), jnp.bfloat16)
  cos, sin = cos_sin(jnp.array([[8193]]), ROPES["default"], 16)
  out = apply_rope(x, cos, sin)
  assert out.dtype == jnp.float32
  np.testing.assert_array_equal(out, apply_rope(x.astype(cos.dtype), cos, sin))
