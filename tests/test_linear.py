"""Projections against NumPy, bit for bit where products are exact."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fireq_jax.linear import linear
from fireq_jax.pallas.layouts import pack_int4_weights
from fireq_jax.qtensor import (
  QTensor,
  pack_int4,
  quantize_e4m3,
  round_e4m3,
  to_e4m3,
)

E4M3 = ml_dtypes.float8_e4m3fn


def weight(rng, outputs, inputs, scale_dtype, activation, group=32):
  codes = rng.integers(-8, 8, (outputs, inputs))
  scale = rng.uniform(0.02, 0.3, (outputs, inputs // group))
  return QTensor(
    codes=pack_int4(jnp.asarray(codes, jnp.int8)),
    scale=jnp.asarray(scale).astype(scale_dtype),
    tensor_scale=jnp.float32(4),
    activation=activation,
  ), codes


def values(w, codes):
  """The QTensor law in float64."""
  scale = np.asarray(w.scale).astype(np.float64)
  groups = codes.reshape(*scale.shape, -1) * scale[..., None]
  if w.scale.dtype == jnp.float8_e4m3fn:
    groups = groups.clip(-448, 448).astype(E4M3).astype(np.float64)
  return groups.reshape(codes.shape) / float(w.tensor_scale)


def numpy_e4m3(x):
  x = np.asarray(x).astype(np.float32)
  scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 448)
  scale = np.where(scale == 0, np.float32(1), scale)
  codes = (x / scale).clip(-448, 448).astype(E4M3)
  return codes.astype(np.float64), scale.astype(np.float64)


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("activation", ["e4m3", "bf16"])
@pytest.mark.parametrize(
  "scale_dtype", [jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32]
)
def test_quantised_weight(scale_dtype, activation, x_dtype):
  rng = np.random.default_rng(0)
  w, codes = weight(rng, 48, 96, scale_dtype, activation)
  x = jnp.asarray(rng.normal(size=(2, 5, 96)) * 3).astype(x_dtype)
  got = linear(x, w, out_dtype=jnp.float32)
  if activation == "e4m3":
    x8, scale = numpy_e4m3(x)
    want = x8 @ values(w, codes).T * scale
  else:
    want = np.asarray(x).astype(np.float64) @ values(w, codes).T
  assert got.dtype == jnp.float32 and linear(x, w).dtype == x_dtype
  # Only the f32 sum of 96 products and the last product round.
  np.testing.assert_allclose(
    got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max()
  )


@pytest.mark.parametrize("byte", [0x38, 0x7E, 0x01, 0x0B])
@pytest.mark.parametrize("sign", [1, -1])
def test_weight_products_round_to_e4m3(sign, byte):
  """One hot activation reads single weights back through the projection."""
  codes = np.arange(-8, 8)[None].repeat(2, 0)
  scale = np.full((2, 1), byte, np.uint8).view(E4M3)
  w = QTensor(
    codes=pack_int4(jnp.asarray(codes, jnp.int8)),
    scale=jnp.asarray(scale),
    tensor_scale=jnp.float32(1),
  )
  got = linear(sign * 448 * jnp.eye(16, dtype=jnp.float32), w)
  products = codes[0] * scale[0].astype(np.float64)
  want = products.clip(-448, 448).astype(E4M3).astype(np.float64)
  np.testing.assert_array_equal(got, (sign * 448 * want)[:, None].repeat(2, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_float_weight(dtype):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(3, 40))).astype(dtype)
  w = jnp.asarray(rng.normal(size=(40, 24))).astype(dtype)
  want = np.asarray(x).astype(np.float64) @ np.asarray(w).astype(np.float64)
  got = linear(x, w, out_dtype=jnp.float32)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_array_equal(linear(x, w), got.astype(dtype))


def test_activation_rows_are_independent_and_never_nan():
  rows = np.zeros((6, 32), np.float32)
  rows[1] = np.linspace(-1, 1, 32)
  rows[2] = 1e30 * rows[1]
  rows[3] = 1e-30 * rows[1]
  rows[4] = 1e-42
  rows[5, 7] = -3.5
  codes, scale = quantize_e4m3(jnp.asarray(rows))
  assert codes.dtype == jnp.float8_e4m3fn and scale.dtype == jnp.float32
  codes = np.asarray(codes).astype(np.float64)
  assert np.isfinite(codes).all() and scale[0] == 1 and (codes[0] == 0).all()
  np.testing.assert_array_equal(codes[1], codes[2])
  np.testing.assert_array_equal(codes[1], codes[3])
  assert np.abs(codes[[1, 2, 3, 5]]).max(-1).tolist() == [448] * 4
  want = rows[[1, 2, 3, 5]].astype(np.float64)
  got = (codes * np.asarray(scale, np.float64)[:, None])[[1, 2, 3, 5]]
  np.testing.assert_allclose(
    got, want, rtol=2**-4, atol=2**-9 * np.abs(want).max() / 448
  )


def test_not_a_number_is_not_hidden():
  x = jnp.ones((2, 32), jnp.bfloat16).at[0, 3].set(jnp.nan)
  w, _ = weight(np.random.default_rng(0), 16, 32, jnp.bfloat16, "e4m3")
  y = linear(x, w)
  assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all()


def test_kernel_asked_for_by_name_is_not_replaced():
  x = jnp.ones((1, 32), jnp.bfloat16)
  w, _ = weight(np.random.default_rng(0), 16, 32, jnp.float8_e4m3fn, "e4m3")
  with pytest.raises(NotImplementedError, match="prepare"):
    linear(x, w, implementation="mosaic_gpu")
  with pytest.raises(NotImplementedError):  # groups of 32, and no GPU here
    linear(x, pack_int4_weights([w]), implementation="mosaic_gpu")


def test_jit_and_vmap():
  w, codes = weight(np.random.default_rng(2), 16, 32, jnp.float8_e4m3fn, "e4m3")
  x = jax.random.normal(jax.random.key(0), (4, 3, 32), jnp.bfloat16)
  mapped = jax.jit(jax.vmap(lambda x: linear(x, w)))(x)
  np.testing.assert_array_equal(mapped, linear(x, w))


def test_rounding_to_e4m3_equals_a_saturating_cast():
  """Every 65537th f32, and every e4m3 value and midpoint with neighbours."""
  bits = np.arange(0, 2**32, 65537, dtype=np.uint64).astype(np.uint32)
  grid = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
  middle = (grid[1:] + grid[:-1]) / 2
  near = [np.nextafter(middle, np.float32(x)) for x in (0, 1e9)]
  edge = np.array([460, 464, 465, 1e9, np.inf], np.float32)
  positive = np.concatenate([grid, middle, *near, edge])
  x = np.concatenate([bits.view(np.float32), positive, -positive])
  with np.errstate(invalid="ignore"):
    want = x.clip(-448, 448).astype(E4M3)
  rounded = jax.jit(round_e4m3)(jnp.asarray(x))
  np.testing.assert_array_equal(rounded, want.astype(np.float32))
  codes = np.asarray(jax.jit(to_e4m3)(jnp.asarray(x)))
  finite = ~np.isnan(x)
  np.testing.assert_array_equal(
    codes.view(np.uint8)[finite], want.view(np.uint8)[finite]
  )
