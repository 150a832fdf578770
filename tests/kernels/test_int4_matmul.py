"""INT4 matmul: the reference against NumPy, the kernel against the reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from int4_problems import BF16, E4M3, activations, problem, qtensor

from fireq_jax.errors import ConfigError
from fireq_jax.pallas import layouts, reference
from fireq_jax.pallas.int4_matmul import Tuning, int4_matmul, supported


def value(w):
  """The QTensor's law in NumPy."""
  packed = np.asarray(w.codes)
  codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*w.shape)
  codes = np.where(codes > 7, codes.astype(np.int32) - 16, codes)
  scale = np.asarray(w.scale).astype(np.float32)
  products = codes * np.repeat(scale, w.group, axis=1)
  if w.scale.dtype == E4M3:
    products = np.clip(products, -448, 448).astype(ml_dtypes.float8_e4m3fn)
  return products.astype(np.float64) / float(w.tensor_scale)


def silu(x):
  return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
  "scale, group, lowest, activation",
  [
    (E4M3, 128, -7, "e4m3"),
    (E4M3, 64, -8, "e4m3"),
    (BF16, 128, -7, "e4m3"),
    (BF16, 64, -7, "e4m3"),
    (BF16, 128, -8, "e4m3"),
    (BF16, 128, -8, "bf16"),
  ],
)
def test_reference_agrees_with_numpy(scale, group, lowest, activation):
  rng = np.random.default_rng(0)
  options = dict(scale=scale, group=group, lowest=lowest, activation=activation)
  parts = [qtensor(rng, n, 384, **options) for n in (128, 64, 64)]
  w = layouts.pack_int4_weights(parts, asymmetric=lowest == -8)
  x, x_scale = activations(rng, 5, 384, activation)
  bias = rng.normal(size=256).astype(np.float32)
  y = reference.int4_matmul(
    x, w, x_scale, bias=jnp.asarray(bias), out_dtype=jnp.float32
  )
  wanted = (
    np.asarray(x).astype(np.float64)
    @ np.concatenate([value(part) for part in parts]).T
  )
  if x_scale is not None:
    wanted *= np.asarray(x_scale)[:, None]
  np.testing.assert_allclose(y, wanted + bias, rtol=1e-5, atol=1e-3)


def test_reference_epilogues_agree_with_numpy():
  rng = np.random.default_rng(1)
  gate, up = (qtensor(rng, 64, 128) for _ in range(2))
  x, x_scale = activations(rng, 3, 128, "e4m3")
  operand = rng.normal(size=(3, 64)).astype(np.float32)
  w = layouts.pack_int4_weights([gate], asymmetric=False)
  plain = np.asarray(x).astype(np.float64) * np.asarray(x_scale)[:, None]
  g, u = plain @ value(gate).T, plain @ value(up).T
  for epilogue, wanted in (
    ("linear", g),
    ("add", g + operand),
    ("mul", g * operand),
    ("silu", silu(g)),
  ):
    y = reference.int4_matmul(
      x,
      w,
      x_scale,
      operand=jnp.asarray(operand) if epilogue in ("add", "mul") else None,
      epilogue=epilogue,
      out_dtype=jnp.float32,
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-3)
  both = layouts.pack_int4_weights([gate, up], gated=True)
  bias = rng.normal(size=128).astype(np.float32)
  y = reference.int4_matmul(
    x, both, x_scale, bias=jnp.asarray(bias), out_dtype=jnp.float32
  )
  np.testing.assert_allclose(
    y, silu(g + bias[:64]) * (u + bias[64:]), rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize(
  "lowest, activation, scale",
  [(-7, "e4m3", E4M3), (-7, "e4m3", BF16), (-8, "bf16", BF16)],
)
def test_packing_keeps_every_code(lowest, activation, scale):
  rng = np.random.default_rng(2)
  w = qtensor(
    rng, 16, 320, scale=scale, group=64, lowest=lowest, activation=activation
  )
  packed = layouts.pack_int4_weights([w], asymmetric=lowest == -8)
  ones = w.replace(scale=jnp.ones_like(w.scale), tensor_scale=jnp.float32(1))
  np.testing.assert_array_equal(layouts.unpack_codes(packed), value(ones))
  assert layouts.has_minus_8([w]) == (lowest == -8)


def test_projections_that_do_not_fit_are_refused():
  rng = np.random.default_rng(3)
  w = qtensor(rng, 64, 128)
  with pytest.raises(ConfigError, match="must agree"):
    layouts.pack_int4_weights([w, qtensor(rng, 64, 256)])
  with pytest.raises(ConfigError, match="two projections of one shape"):
    layouts.pack_int4_weights([w, qtensor(rng, 128, 128)], gated=True)


@pytest.mark.parametrize(
  "n, c, x_dtype, reason",
  [
    (96, 128, E4M3, "multiples of 64"),
    (128, 160, E4M3, "multiples of 64"),
    (128, 128, jnp.float16, "float16"),
  ],
)
def test_unsupported_inputs_give_a_reason(n, c, x_dtype, reason):
  rng = np.random.default_rng(4)
  w = layouts.pack_int4_weights([qtensor(rng, n, c, group=64)])
  x = jnp.zeros((8, c), x_dtype)
  with pytest.raises(NotImplementedError, match=reason):
    supported(x, w, jnp.ones(8, jnp.float32))


@pytest.mark.parametrize(
  "changes",
  [
    {"tile_t": 12},
    {"rows": 96},
    {"stages": 3, "interleave": 2},
    {"rows": 320},
    {"tile_t": 24, "split": 2},
    {"tile_t": 32, "split": 4},
    {"tile_t": 32, "split": 2, "multicast": True},
    {"tile_t": 16, "rows": 64, "interleave": 4, "split": 2},
    {"tile_t": 16, "rows": 32, "split": 2},
    {"tile_t": 64, "cut": 2, "split": 2},
    {"tile_t": 16, "cut": 4},
  ],
)
def test_impossible_tunings_are_refused(changes):
  with pytest.raises(ConfigError):
    Tuning(**{"tile_t": 8, "stages": 4, **changes})


@pytest.mark.parametrize("rows, options", [(48, {}), (32, {"gated": True})])
def test_a_tuning_for_other_weights_is_refused(rows, options):
  (x, w, x_scale), _ = problem(np.random.default_rng(9), 128, 128, 8, **options)
  tuning = Tuning(tile_t=8, stages=4, rows=rows)
  with pytest.raises(ConfigError, match="do not fit"):
    int4_matmul(x, w, x_scale, tuning=tuning)


def test_few_tokens_fit_a_tuning_of_cut_tiles():
  args, _ = problem(np.random.default_rng(9), 128, 128, 8)
  tuning = Tuning(tile_t=64, stages=4, rows=64, cut=4)
  call = lambda x, x_scale: int4_matmul(x, args[1], x_scale, tuning=tuning)
  assert jax.eval_shape(call, args[0], args[2]).shape == (8, 128)


# The kernel, thread by thread on the CPU.


INTERPRETED = [
  (dict(n=192, c=384, t=16), dict(tile_t=16, stages=2, blocks=2)),
  (dict(n=128, c=512, t=13, lowest=-8),
   dict(tile_t=8, stages=4, rows=64, interleave=2, ctas=2, ahead=True)),
  (dict(n=192, c=512, t=7), dict(tile_t=8, stages=4, rows=48, interleave=4)),
  (dict(n=128, c=256, t=1, epilogue="add"), dict(tile_t=8, stages=2, rows=64)),
  (dict(n=256, c=256, t=3, gated=True, bias=True),
   dict(tile_t=8, stages=2, rows=64, interleave=2)),
  (dict(n=192, c=384, t=48, epilogue="add", bias=True),
   dict(tile_t=64, stages=2, rows=64, cut=2, ctas=2)),
  (dict(n=320, c=512, t=32),
   dict(tile_t=32, stages=2, rows=64, interleave=2, cut=4, ctas=4)),
  (dict(n=384, c=256, t=61, gated=True, bias=True),
   dict(tile_t=64, stages=2, cut=2, ctas=2, ahead=True)),
  (dict(n=192, c=256, t=30, kind="exact"),
   dict(tile_t=32, stages=3, rows=64, cut=2, ctas=2)),
  (dict(n=64, c=192, t=9, group=64, lowest=-8),
   dict(tile_t=16, stages=2, rows=64, blocks=2)),
  (dict(n=64, c=64, t=8, group=64), dict(tile_t=8, stages=1, rows=64)),
  (dict(n=128, c=1024, t=16, epilogue="add"),
   dict(tile_t=16, stages=4, rows=32, blocks=2, interleave=2, ahead=True)),
  (dict(n=64, c=640, t=16, lowest=-8),
   dict(tile_t=16, stages=2, rows=32, blocks=4)),
  (dict(n=64, c=320, t=8, kind="exact", group=64),
   dict(tile_t=8, stages=2, rows=64, blocks=2)),
  (dict(n=128, c=256, t=8, kind="bf16", group=64, gated=True),
   dict(tile_t=16, stages=2)),
  (dict(n=64, c=768, t=8, kind="exact"),
   dict(tile_t=8, stages=4, rows=32, blocks=2, interleave=4)),
  (dict(n=64, c=512, t=8, kind="bf16", lowest=-8),
   dict(tile_t=8, stages=2, rows=32, blocks=2, interleave=2)),
  (dict(n=256, c=512, t=24, gated=True, out_dtype=jnp.float32),
   dict(tile_t=16, stages=2)),
  (dict(n=256, c=384, t=16, kind="exact", epilogue="add", bias=True),
   dict(tile_t=16, stages=2, ahead=True)),
  (dict(n=128, c=384, t=13, kind="exact", gated=True, bias=True),
   dict(tile_t=16, stages=2, rows=64, ahead=True)),
  (dict(n=128, c=256, t=16, kind="bf16", lowest=-8, epilogue="mul"),
   dict(tile_t=16, stages=2)),
  (dict(n=64, c=256, t=100, group=64, epilogue="silu",
        out_dtype=jnp.float32), dict(tile_t=200, stages=2, rows=64)),
  (dict(n=128, c=256, t=64, epilogue="add"), dict(tile_t=128, stages=2)),
  (dict(n=128, c=128, t=96, epilogue="add"),
   dict(tile_t=96, stages=2, rows=64)),
  (dict(n=320, c=512, t=24),
   dict(tile_t=32, stages=3, rows=64, ctas=4, ahead=True, multicast=True)),
  (dict(n=96 * 2, c=128, t=8, out_dtype=jnp.float32),
   dict(tile_t=8, stages=2, rows=48)),
  (dict(n=512, c=256, t=16, gated=True, bias=True),
   dict(tile_t=16, stages=4, rows=192)),
  (dict(n=320, c=256, t=13, epilogue="add", lowest=-8),
   dict(tile_t=16, stages=2, rows=192, ahead=True)),
  (dict(n=448, c=256, t=201, group=64, lowest=-8, epilogue="add"),
   dict(tile_t=208, stages=2, rows=192, ctas=2, cut=2)),
  (dict(n=384, c=256, t=9, gated=True, bias=True),
   dict(tile_t=208, stages=3, rows=192)),
]  # fmt: skip


@pytest.mark.parametrize("shape, tuning", INTERPRETED)
def test_interpreted_kernel_agrees_and_has_no_race(shape, tuning):
  mosaic_interpreter = interpreter()
  args, options = problem(np.random.default_rng(5), **shape)
  tuning = Tuning(**{"ctas": 1, **tuning})
  wanted = np.asarray(reference.int4_matmul(*args, **options), np.float32)

  with mosaic_interpreter.interpret() as races:
    y = int4_matmul(*args, **options, tuning=tuning)
    y = np.asarray(y, np.float32)
    assert not races()
  # Sums are of the same products, so only their order may differ.
  np.testing.assert_allclose(
    y, wanted, rtol=1e-2, atol=1e-4 * abs(wanted).max()
  )


def interpreter():
  import jax.version

  if jax.version.__version__ != "0.11.2":
    pytest.skip("interprets kernels with jax 0.11.2 only")
  import mosaic_interpreter

  return mosaic_interpreter
