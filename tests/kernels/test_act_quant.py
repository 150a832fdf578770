"""Quantisation of activations: the reference against NumPy, the kernel too."""

import deviceless
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fireq_jax.linear import RMSNorm, linear
from fireq_jax.pallas import layouts, reference
from fireq_jax.pallas.act_quant import act_quant, supported
from fireq_jax.qtensor import QTensor, pack_int4

BF16, F32 = jnp.bfloat16, jnp.float32
EPS = 1e-5
# Of Llama models, and of what their parts on two to eight devices hold.
CHANNELS = [128, 1376 * 4, 1792, 2048, 3072, 4096, 5120, 7168, 8192, 11008]
CHANNELS += [13824, 14336, 28672]


def activations(rng, tokens, channels, dtype=BF16, norm=True):
  x = rng.normal(size=(tokens, channels)) * rng.uniform(0.01, 30, (tokens, 1))
  x[tokens // 2] = 0
  weight = rng.uniform(0.5, 1.5, channels) if norm else None
  as_array = lambda a: None if a is None else jnp.asarray(a).astype(dtype)
  return as_array(x), as_array(weight)


def in_numpy(x, weight=None, eps=EPS):
  """Codes as bytes, and scales; each operation rounds to f32 by itself."""
  x = np.asarray(x).astype(np.float32)
  y = x if weight is None else x * np.asarray(weight).astype(np.float32)
  scale = np.abs(y).max(axis=1) * np.float32(1 / 448)
  scale[scale < np.finfo(np.float32).tiny] = 1
  codes = (y / scale[:, None]).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
  if weight is not None:
    scale = scale / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1) + eps)
  return codes.view(np.uint8), scale


def check(got, wanted):
  codes, scale = got
  np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), wanted[0])
  np.testing.assert_allclose(scale, wanted[1], rtol=2e-6)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("norm", [False, True])
def test_reference_agrees_with_numpy(dtype, norm):
  args = activations(np.random.default_rng(0), 5, 640, dtype, norm)
  check(jax.jit(reference.act_quant)(*args, eps=EPS), in_numpy(*args))


def test_quantised_norm_is_the_norm():
  x, weight = activations(np.random.default_rng(1), 4, 256, F32)
  codes, scale = reference.act_quant(x, weight, eps=EPS)
  wanted = np.asarray(RMSNorm(weight, EPS)(x))
  got = np.asarray(codes).astype(np.float32) * np.asarray(scale)[:, None]
  np.testing.assert_allclose(
    got, wanted, rtol=2**-4, atol=np.abs(wanted).max() * 2**-9 / 448
  )


@pytest.mark.parametrize("channels", CHANNELS)
def test_sizes_of_models_are_supported(channels):
  supported(jax.ShapeDtypeStruct((1, channels), BF16))


@pytest.mark.parametrize(
  "shape, dtype, weight, reason",
  [
    ((4, 192), BF16, BF16, "192 channels"),
    ((4, 128 * 1009), BF16, BF16, "channels"),
    ((4, 128), jnp.float16, BF16, "float16"),
    ((4, 128), BF16, jnp.int8, "weight of int8"),
    ((1, 4, 128), BF16, BF16, "shape"),
    ((0, 128), BF16, BF16, "shape"),
  ],
)
def test_unsupported_inputs_give_a_reason(shape, dtype, weight, reason):
  args = (
    jax.ShapeDtypeStruct(shape, dtype),
    jax.ShapeDtypeStruct(shape[-1:], weight),
  )
  with pytest.raises(NotImplementedError, match=reason):
    supported(*args)


# The kernel, thread by thread on the CPU.


@pytest.mark.parametrize(
  "tokens, rows, channels, dtype, norm",
  [
    (2, 8, 4096, BF16, True),
    (3, None, 2816, BF16, False),  # loads of 8, 2 and 1
    (1, 8, 384, F32, True),
  ],
)
def test_interpreted_kernel(tokens, rows, channels, dtype, norm):
  import jax.version

  if jax.version.__version__ != "0.11.2":
    pytest.skip("interprets kernels with jax 0.11.2 only")
  import mosaic_interpreter

  args = activations(np.random.default_rng(2), tokens, channels, dtype, norm)
  with mosaic_interpreter.interpret() as races:
    codes, scale = act_quant(*args, eps=EPS, rows=rows)
    codes, scale = np.asarray(codes), np.asarray(scale)
    assert not races()
  check((codes[:tokens], scale[:tokens]), in_numpy(*args))
  assert len(codes) == (rows or tokens)
  assert not codes[tokens:].astype(np.float32).any()
  assert (scale[tokens:] == 1).all()


# The kernel, compiled by ptxas for the card, without a card.


@deviceless.needs_plugin
def test_compiles_without_spills(tmp_path, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  struct = jax.ShapeDtypeStruct
  cases = [
    (struct((tokens, channels), dtype), struct((channels,), dtype))
    for tokens, channels, dtype in (
      (1, 2816, BF16),
      (4096, 4096, BF16),
      (1, 28672, F32),
    )
  ]
  reports = deviceless.compile_all(
    [
      (lambda *args: act_quant(*args, eps=EPS, rows=4096), args)
      for args in cases
    ],
    tmp_path,
  )
  assert [report.spilled_bytes for report in reports] == [0] * len(cases)


@deviceless.needs_plugin
@pytest.mark.parametrize("tokens, kernels", [(16, 1), (24, 2)])
def test_a_projection_is_one_kernel_or_two(tokens, kernels, monkeypatch):
  monkeypatch.setattr("fireq_jax.linear.require_hopper", lambda: None)
  struct = jax.ShapeDtypeStruct
  w = layouts.PackedInt4(
    codes=struct((2048 // 128, 1024, 64), jnp.uint8),
    scale=struct((2048 // 128, 1024), jnp.float8_e4m3fn),
    row_scale=struct((1024,), F32),
    shape=(1024, 2048),
    encoding="sign_magnitude",
    activation="e4m3",
    gated=False,
  )
  project = lambda x, weight, w, residual: linear(
    x, w, norm=RMSNorm(weight, EPS), residual=residual
  )
  args = (
    struct((1, tokens, 2048), BF16),
    struct((2048,), BF16),
    w,
    struct((1, tokens, 1024), BF16),
  )
  program = deviceless.compile_for_hopper(project, args)
  started = deviceless.kernels(program)
  assert len(started) == kernels, started
  assert all("mosaic_gpu" in line for line in started)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("tokens", [1, 300])
def test_lowers_for_cuda(tokens, channels):
  x = jax.ShapeDtypeStruct((tokens, channels), BF16)
  kernel = jax.jit(lambda x: act_quant(x, rows=304))
  text = kernel.trace(x).lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("norm", [False, True])
def test_kernel_agrees_with_numpy(channels, dtype, norm):
  rng = np.random.default_rng(3)
  for tokens in (1, 2, 7, 16, 300):
    args = activations(rng, tokens, channels, dtype, norm)
    rows = -(-tokens // 8) * 8
    codes, scale = jax.device_get(act_quant(*args, eps=EPS, rows=rows))
    check((codes[:tokens], scale[:tokens]), in_numpy(*args))
    assert not codes[tokens:].astype(np.float32).any()
    assert (scale[tokens:] == 1).all()


@pytest.mark.gpu
def test_extremes_on_the_card():
  rows = np.zeros((7, 256), np.float32)
  rows[1] = np.linspace(-1, 1, 256)
  rows[2] = 1e30 * rows[1]
  rows[3] = 1e-20 * rows[1]
  rows[4] = 1e-42
  rows[5, 3] = np.nan
  rows[6, 3] = np.inf
  codes, scale = jax.device_get(act_quant(jnp.asarray(rows)))
  check((codes[:5], scale[:5]), in_numpy(rows[:5]))
  assert np.isnan(codes[5].astype(np.float32)).all()
  assert np.isnan(codes[6, 3].astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_projection_on_the_card(tokens):
  rng = np.random.default_rng(4)
  codes = rng.integers(-7, 8, (512, 4096)).astype(np.int8)
  w = QTensor(
    codes=pack_int4(jnp.asarray(codes)),
    scale=jnp.asarray(rng.uniform(0.25, 4, (512, 32))).astype("float8_e4m3fn"),
    tensor_scale=jnp.float32(4),
  )
  w = layouts.pack_int4_weights([w], asymmetric=False)
  x, weight = activations(rng, tokens, 4096)
  residual = jnp.asarray(rng.normal(size=(tokens, 512))).astype(BF16)
  project = jax.jit(
    lambda x, implementation: linear(
      x,
      w,
      norm=RMSNorm(weight, EPS),
      residual=residual,
      implementation=implementation,
      out_dtype=F32,
    ),
    static_argnums=1,
  )
  y, wanted = project(x, "mosaic_gpu"), project(x, "xla")
  assert jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted) < 2e-3
