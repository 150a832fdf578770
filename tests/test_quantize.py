"""Weight quantisation against NumPy written apart from it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fireq_jax.errors import ConfigError, QuantizationError
from fireq_jax.qtensor import QTensor, pack_int4, unpack_int4
from fireq_jax.quantize import quantize_weight
from fireq_jax.recipe import Solver, WeightFormat


def e4m3_table() -> np.ndarray:
  """Values of the 256 bytes: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
  values = []
  for byte in range(256):
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
      values.append(np.nan)
    elif exponent == 0:
      values.append(sign * mantissa * 2.0**-9)
    else:
      values.append(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))
  return np.array(values)


E4M3 = e4m3_table()


def round_e4m3(x: np.ndarray) -> np.ndarray:
  """Nearest value of the table, even mantissa on ties, saturating."""
  order = np.argsort(E4M3[:127])
  values = E4M3[:127][order]
  magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
  above = np.searchsorted(values, magnitude).clip(0, 126)
  below = np.maximum(above - 1, 0)
  up, down = values[above] - magnitude, magnitude - values[below]
  pick = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
  return np.where(np.isnan(x), np.nan, np.sign(x) * values[pick])


def published(kernel: np.ndarray, group: int, scale_type: str):
  """FireQ's rule step by step in the kernel's dtype (dossier 1.1)."""
  dtype = kernel.dtype
  w = np.ascontiguousarray(kernel.T)
  n, channels = w.shape
  groups = w.reshape(n, channels // group, group)
  a = np.abs(groups).max(-1)
  s = 1.0
  if scale_type == "e4m3":
    live = a[a > 0].astype(np.float64)
    tiny = 7 * 2.0**-9
    candidates = []
    for i in range(15):
      scaled = live * 2.0**i
      if (scaled > 448).any():
        break
      lost = np.where(scaled < tiny, (tiny - scaled) / tiny, 0).sum()
      candidates.append((lost, 2.0**i))
    s = min(candidates)[1]
  groups, a = groups * dtype.type(s), a * dtype.type(s)
  real = np.maximum(a, dtype.type(1e-5)) / dtype.type(7)
  if scale_type == "e4m3":
    sigma = np.maximum(round_e4m3(real), 2.0**-9).astype(dtype)
  else:
    sigma = real.astype(ml_dtypes.bfloat16).astype(dtype)
  q = np.clip(np.rint(groups / sigma[..., None]).astype(np.float32), -8, 7)
  sigma = np.where(a == 0, 1, sigma.astype(np.float32))
  return q.reshape(n, channels).astype(np.int8), sigma, s


def random_kernel(shape, dtype, seed=0, spread=2.0):
  rng = np.random.default_rng(seed)
  rows = np.exp(rng.normal(size=(1, shape[1])) * spread)
  kernel = rng.standard_t(4, size=shape) * rows * 0.02
  kernel[: shape[0] // 2, 3] = 0.0  # whole groups of zeros
  return kernel.astype(dtype)


@pytest.mark.parametrize("seed, spread", [(0, 0.3), (1, 2.0), (2, 4.0)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("scale_type", ["e4m3", "bf16"])
@pytest.mark.parametrize("group", [128, 32])
def test_published_arithmetic_bit_for_bit(
  seed, spread, dtype, scale_type, group
):
  kernel = random_kernel((256, 48), dtype, seed, spread)
  kernel = np.clip(kernel, -440, 440).astype(dtype)
  weight_format = WeightFormat(group=group, scale=scale_type, codes="full")
  got = quantize_weight(jnp.asarray(kernel), weight_format)
  codes, sigma, s = published(kernel, group, scale_type)
  assert float(got.tensor_scale) == s
  np.testing.assert_array_equal(np.asarray(got.scale, np.float32), sigma)
  np.testing.assert_array_equal(unpack_int4(got.codes), codes)


def test_every_code_under_every_scale_byte():
  codes = np.tile(np.arange(-8, 8, dtype=np.int8), 2)
  packed = np.tile(np.asarray(pack_int4(jnp.asarray(codes))), (256, 1))
  scale = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
  q = QTensor(
    codes=jnp.asarray(packed),
    scale=jnp.asarray(scale)[:, None],
    tensor_scale=jnp.float32(4.0),
  )
  expected = round_e4m3(E4M3[:, None] * codes[None, :].astype(np.float64))
  np.testing.assert_array_equal(q.dequantize(), expected / 4.0)
  assert np.isnan(expected[0x7F]).all() and np.isnan(expected[0xFF]).all()
  assert expected[0x7E, 0] == -448.0  # -8 x 448 saturates


def test_bf16_scales_round_no_product():
  scale = np.float32([0.3, 7.7]).astype(ml_dtypes.bfloat16)
  codes = np.tile(np.arange(-8, 8, dtype=np.int8), 2)
  q = QTensor(
    codes=jnp.tile(pack_int4(jnp.asarray(codes)), (2, 1)),
    scale=jnp.asarray(scale)[:, None],
    tensor_scale=jnp.float32(1.0),
  )
  expected = scale.astype(np.float32)[:, None] * codes
  np.testing.assert_array_equal(q.dequantize(), expected)


@pytest.mark.parametrize("solver", [Solver(), Solver(scale="search")])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.bfloat16])
def test_jit_vmap_and_eval_shape_agree_with_eager(dtype, solver):
  kernels = jnp.asarray(random_kernel((128, 32), np.float32)[None] * [[[1]]])
  kernels = jnp.concatenate([kernels, 3 * kernels]).astype(dtype)
  weight_format = WeightFormat(group=64)
  quantize = lambda k: quantize_weight(k, weight_format, solver=solver)
  eager = [quantize(k) for k in kernels]
  for other in (
    [jax.jit(quantize)(k) for k in kernels],
    [
      jax.tree.map(lambda x, i=i: x[i], jax.vmap(quantize)(kernels))
      for i in (0, 1)
    ],
  ):
    jax.tree.map(np.testing.assert_array_equal, eager, other)
  abstract = jax.eval_shape(quantize, kernels[0])
  shapes = lambda q: jax.tree.map(lambda x: (x.shape, x.dtype), q)
  assert shapes(abstract) == shapes(eager[0])


def test_codes_are_the_same_with_x64():
  kernel = random_kernel((128, 32), np.float32)
  plain = quantize_weight(jnp.asarray(kernel), WeightFormat())
  with jax.enable_x64(True):
    wide = quantize_weight(jnp.asarray(kernel), WeightFormat())
  jax.tree.map(np.testing.assert_array_equal, plain, wide)


def test_quantising_again_keeps_the_codes():
  kernel = jnp.asarray(random_kernel((256, 32), np.float32))
  weight_format = WeightFormat(scale="bf16")
  once = quantize_weight(kernel, weight_format)
  twice = quantize_weight(once.dequantize().T, weight_format)
  np.testing.assert_array_equal(once.codes, twice.codes)


def test_a_scale_search_finds_quantised_values_again():
  kernel = jnp.asarray(random_kernel((256, 32), np.float32))
  solver = Solver(scale="search")
  once = quantize_weight(kernel, WeightFormat(), solver=solver)
  twice = quantize_weight(once.dequantize().T, WeightFormat(), solver=solver)
  np.testing.assert_array_equal(once.dequantize(), twice.dequantize())


@pytest.mark.parametrize("scale_type", ["e4m3", "bf16"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_zero_tiny_and_huge_weights_stay_finite(scale_type, magnitude):
  kernel = jnp.full((128, 4), magnitude, jnp.float32).at[:, 0].set(0.0)
  q = quantize_weight(kernel, WeightFormat(scale=scale_type))
  scale = np.asarray(q.scale, np.float32)
  assert np.isfinite(scale).all() and (scale > 0).all()
  assert (scale[0] == 1).all() and not np.asarray(q.codes[0]).any()
  value = np.asarray(q.dequantize())
  assert np.isfinite(value).all()
  if magnitude >= 1.0:
    np.testing.assert_allclose(value[1:], magnitude, rtol=0.07)


def test_symmetric_codes_leave_out_minus_eight():
  kernel = jnp.asarray(random_kernel((256, 256), np.float32))
  lowest = lambda codes: unpack_int4(
    quantize_weight(kernel, WeightFormat(codes=codes)).codes
  ).min()
  assert lowest("full") == -8
  assert lowest("symmetric") == -7


def relative_rms(kernel, q):
  return np.sqrt(np.square(q.dequantize() - kernel.T).mean()) / kernel.std()


def test_scale_search_gains_what_was_measured():
  """Dossier 1.1: 0.119 to about 0.104 for Gaussian weights."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(1024, 64)).astype(np.float32) * 0.02
  nearest = quantize_weight(jnp.asarray(kernel), WeightFormat(codes="full"))
  searched = quantize_weight(
    jnp.asarray(kernel),
    WeightFormat(codes="full"),
    solver=Solver(scale="search"),
  )
  assert 0.115 < relative_rms(kernel, nearest) < 0.123
  assert relative_rms(kernel, searched) < 0.105


def test_weighing_and_gptq_lower_the_output_error():
  rng = np.random.default_rng(2)
  kernel = rng.normal(size=(128, 64)).astype(np.float32)
  mix = rng.normal(size=(128, 128)) * np.exp(rng.normal(size=128) * 1.5)
  x = (rng.normal(size=(512, 128)) @ mix).astype(np.float32)
  errors = []
  for options in ({}, {"weighted": True}, {"weighted": True, "gptq": True}):
    q = quantize_weight(
      jnp.asarray(kernel),
      WeightFormat(),
      solver=Solver(scale="search", **options),
      moment=jnp.asarray(x.T @ x),
    )
    errors.append(np.square(x @ (q.dequantize().T - kernel)).sum())
  assert errors[1] < 0.9 * errors[0]
  assert errors[2] < 0.6 * errors[1]


def test_what_cannot_be_quantised_is_refused():
  kernel = jnp.ones((96, 4), jnp.float32)
  with pytest.raises(ConfigError, match="64 does not divide 96"):
    quantize_weight(kernel, WeightFormat(group=64))
  with pytest.raises(QuantizationError, match=r"float32\[96\]"):
    quantize_weight(kernel[:, 0], WeightFormat(group=32))
  once = quantize_weight(kernel, WeightFormat(group=32))
  with pytest.raises(QuantizationError, match="already"):
    quantize_weight(once, WeightFormat(group=32))
  with pytest.raises(ConfigError, match="calibration"):
    quantize_weight(
      kernel,
      WeightFormat(group=32),
      solver=Solver(scale="search", weighted=True),
    )
