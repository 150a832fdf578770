"""Code and scale search against enumeration, GPTQ against its definition."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fireq_jax.codebook import nearest, nearest_codes, search_scales
from fireq_jax.gptq import gptq

E4M3 = ml_dtypes.float8_e4m3fn


def values_of(codes, scale):
  """The 16 values of a scale, written apart: f64 products, e4m3 rounding."""
  products = np.float64(codes) * np.float64(scale)
  if np.asarray(scale).dtype == E4M3:
    return np.clip(products, -448, 448).astype(E4M3).astype(np.float64)
  return products


@pytest.mark.parametrize("lowest", [-7, -8])
@pytest.mark.parametrize("dtype", [E4M3, ml_dtypes.bfloat16])
def test_nearest_codes_are_nearest_for_every_scale(lowest, dtype):
  rng = np.random.default_rng(0)
  if dtype == E4M3:
    scales = np.arange(1, 0x7F, dtype=np.uint8).view(E4M3)
  else:
    scales = np.exp(rng.normal(size=64)).astype(dtype)
  weight = (
    rng.normal(size=(len(scales), 200)) * 4 * scales.astype(np.float64)[:, None]
  ).astype(np.float32)
  codes, values = (
    np.asarray(x)
    for x in nearest(weight, jnp.asarray(scales)[:, None], lowest=lowest)
  )
  table = values_of(np.arange(lowest, 8)[None], scales[:, None])
  best = np.abs(table[:, None, :] - weight[:, :, None]).min(-1)
  chosen = np.take_along_axis(table, codes.astype(int) - lowest, axis=1)
  assert codes.min() >= lowest and codes.max() <= 7
  np.testing.assert_array_equal(np.abs(chosen - weight), best)
  np.testing.assert_array_equal(values, chosen.astype(np.float32))


def test_scale_search_finds_the_best_of_all_e4m3_scales():
  rng = np.random.default_rng(1)
  weight = rng.normal(size=(6, 64)).astype(np.float32) * 3
  importance = rng.uniform(0.1, 10, 64).astype(np.float32)
  found = np.asarray(
    search_scales(weight, importance, group=32, scale_dtype=jnp.float8_e4m3fn)
  )

  def error(scale, values, weights):
    table = values_of(np.arange(-7, 8), scale)
    distance = np.abs(table[None] - values[:, None]).min(-1)
    return float(np.sum(weights * distance**2))

  scales = np.arange(1, 0x7F, dtype=np.uint8).view(E4M3)
  for row in range(6):
    for g in range(2):
      part = slice(32 * g, 32 * g + 32)
      least = min(error(s, weight[row, part], importance[part]) for s in scales)
      got = error(found[row, g], weight[row, part], importance[part])
      assert got <= least * (1 + 1e-5)


def test_scale_search_beats_the_absolute_maximum():
  rng = np.random.default_rng(2)
  weight = rng.normal(size=(32, 512)).astype(np.float32)
  largest = np.abs(weight.reshape(32, 4, 128)).max(-1) / 7
  for dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
    errors = []
    for scale in (
      jnp.asarray(largest).astype(dtype),
      search_scales(weight, group=128, scale_dtype=dtype),
    ):
      wide = jnp.repeat(scale.astype(jnp.float32), 128, axis=1).astype(dtype)
      codes = np.asarray(nearest_codes(weight, wide))
      values = values_of(codes, np.asarray(wide))
      errors.append(np.sqrt(np.mean((values - weight) ** 2)))
    assert errors[1] < 0.92 * errors[0]


def test_zero_groups_get_scale_one_and_codes_zero():
  weight = np.zeros((2, 64), np.float32)
  weight[1, 32:] = 1.0
  scale = search_scales(weight, group=32, scale_dtype=jnp.float8_e4m3fn)
  assert np.asarray(scale).astype(np.float32)[0].tolist() == [1.0, 1.0]
  wide = jnp.repeat(scale.astype(jnp.float32), 32, axis=1)
  codes = np.asarray(nearest_codes(weight, wide.astype(scale.dtype)))
  assert not codes[0].any() and codes[1, 32:].all()


def plain_gptq(weight, scale, covariance, damping):
  """The published loop in f64 NumPy, one column at a time, no blocks."""
  weight = weight.astype(np.float64)
  covariance = covariance.astype(np.float64)
  columns = weight.shape[1]
  order = np.argsort(-np.diag(covariance), kind="stable")
  damped = covariance + np.eye(columns) * damping * np.diag(covariance).mean()
  factor = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
  weight, scale = weight[:, order], scale[:, order]
  codes = np.zeros(weight.shape, int)
  for j in range(columns):
    table = values_of(np.arange(-7, 8)[None], scale[:, j : j + 1])
    pick = np.abs(table - weight[:, j : j + 1]).argmin(-1)
    codes[:, j] = pick - 7
    value = np.take_along_axis(table, pick[:, None], 1)[:, 0]
    error = (weight[:, j] - value) / factor[j, j]
    weight[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
  return codes[:, np.argsort(order)]


@pytest.mark.parametrize("columns", [64, 192])
def test_gptq_follows_the_published_loop(columns):
  rng = np.random.default_rng(3)
  weight = rng.normal(size=(16, columns)).astype(np.float32)
  mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns)
  inputs = rng.normal(size=(1000, columns)) @ (mixing + np.eye(columns))
  covariance = (inputs.T @ inputs / 1000).astype(np.float32)
  scale = search_scales(
    weight, np.diag(covariance), group=32, scale_dtype=jnp.float8_e4m3fn
  )
  codes = np.asarray(gptq(weight, scale, covariance, group=32))
  wide = np.repeat(np.asarray(scale), 32, axis=1)
  want = plain_gptq(weight, wide, covariance, 0.01)
  assert np.mean(codes == want) > 0.98  # f32 against f64 at rounding ties

  def loss(codes):
    difference = values_of(codes, wide) - weight
    return np.einsum("ni,ij,nj->", difference, covariance, difference)

  nearest = np.asarray(nearest_codes(weight, jnp.asarray(wide)))
  assert loss(codes) < 0.8 * loss(nearest)
  assert loss(codes) < 1.02 * loss(want)


def test_gptq_survives_inputs_that_never_occur():
  rng = np.random.default_rng(4)
  weight = rng.normal(size=(4, 64)).astype(np.float32)
  covariance = np.diag(np.r_[np.ones(32), np.zeros(32)]).astype(np.float32)
  scale = search_scales(weight, group=64, scale_dtype=jnp.float8_e4m3fn)
  codes = np.asarray(gptq(weight, scale, covariance, group=64))
  wide = np.repeat(np.asarray(scale), 64, axis=1)
  want = np.asarray(nearest_codes(weight, jnp.asarray(wide)))
  np.testing.assert_array_equal(codes, want)
