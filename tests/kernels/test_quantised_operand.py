"""INT4 matmuls that quantise their activations: as act_quant and then they."""

import dataclasses
import functools

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from int4_problems import BF16, problem, shapes
from test_act_quant import activations
from test_int4_matmul import interpreter

from fireq_jax.errors import ConfigError
from fireq_jax.pallas import reference, tunings
from fireq_jax.pallas.act_quant import act_quant
from fireq_jax.pallas.int4_matmul import Tuning, int4_matmul, supported
from fireq_jax.pallas.quantised_operand import place_ptx

EPS = 1e-5


def case(rng, *, n, c, t, norm, **options):
  """x, gain or None, w, and options of the matmul."""
  (_, w, _), options = problem(rng, n, c, t, **options)
  return *activations(rng, t, c, norm=norm), w, options


@pytest.mark.parametrize("channels, rows", [(4096, 16), (2048, 8)])
def test_codes_go_where_wgmma_reads_them(channels, rows):
  """To their place in tiles of 8 rows of 128 bytes with 16-byte units mixed."""
  thread, row = np.arange(128)[:, None], np.arange(rows)[None]
  block = rows * 128
  env = {"%tid.x": thread + 128, "$1": np.int64(1024), "$2": row}
  place = ptx.run(place_ptx(channels // 4, block), env)["$0"]
  channel = thread // 32 * (channels // 4) + thread % 32 * 8
  byte = channel % 128
  wanted = channel // 128 * block + row // 8 * 1024 + row % 8 * 128
  wanted = wanted + ((byte // 16) ^ (row % 8)) * 16 + byte % 16
  np.testing.assert_array_equal(place, 1024 + wanted)


@pytest.mark.parametrize(
  "shape, tuning",
  [
    (
      dict(n=128, c=1024, t=5, norm=True, gated=True),
      dict(tile_t=16, stages=2),
    ),
    (
      dict(n=64, c=1024, t=9, norm=False, epilogue="add"),
      dict(tile_t=16, stages=2, rows=32, blocks=2, interleave=2),
    ),
  ],
)
def test_interpreted_kernel_agrees_and_has_no_race(shape, tuning):
  mosaic_interpreter = interpreter()
  x, gain, w, options = case(np.random.default_rng(1), **shape)
  options = dict(options, norm_weight=gain, eps=EPS if shape["norm"] else 0.0)
  wanted = np.asarray(reference.int4_matmul(x, w, **options), np.float32)
  with mosaic_interpreter.interpret() as races:
    y = int4_matmul(x, w, **options, tuning=Tuning(**tuning, ctas=1))
    y = np.asarray(y, np.float32)
    assert not races()
  np.testing.assert_allclose(
    y, wanted, rtol=1e-2, atol=1e-4 * abs(wanted).max()
  )


@pytest.mark.parametrize(
  "t, c, x_dtype, options, reason",
  [
    (16, 14336, BF16, {}, "quantisation"),  # beside which no weights fit
    (16, 1536, BF16, {}, "quantisation"),
    (16, 1024, jnp.float32, {}, "float32"),
    (16, 1024, jnp.float8_e4m3fn, {"norm": True}, "norm"),
  ],
)
def test_unsupported_inputs_give_a_reason(t, c, x_dtype, options, reason):
  _, w, x_scale = shapes(t, 128, c, mode="e4m3")
  x = jax.ShapeDtypeStruct((t, c), x_dtype)
  if x_dtype != jnp.float8_e4m3fn:
    x_scale = None
  gain = jax.ShapeDtypeStruct((c,), BF16) if options else None
  with pytest.raises(NotImplementedError, match=reason):
    supported(x, w, x_scale, norm_weight=gain)


def test_tokens_of_several_tiles_are_refused():
  x, gain, w, _ = case(np.random.default_rng(2), n=64, c=1024, t=16, norm=True)
  with pytest.raises(ConfigError, match="one tile"):
    int4_matmul(
      x, w, norm_weight=gain, tuning=Tuning(tile_t=8, stages=2, rows=64)
    )


@pytest.mark.parametrize("t", [1, 8, 9, 16])
@pytest.mark.parametrize(
  "n, gated", [(6144, False), (2048, False), (512, True)]
)
def test_tunings_hold_all_tokens_in_a_tile(t, n, gated):
  w = shapes(t, n, 2048, mode="e4m3", gated=gated)[1]
  tuning = tunings.choose(t, w, quantises=True)
  assert tuning.tile_t >= t
  assert tuning.cut == tuning.split == 1
  assert tuning.row_groups * tuning.interleave == 4


@pytest.mark.slow
@deviceless.needs_plugin
def test_compiles_without_spills(tmp_path, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  functions = []
  for t, n, c, gated in (
    (16, 28672, 4096, True),
    (8, 10240, 8192, False),
  ):
    w = shapes(t, n, c, mode="e4m3", gated=gated)[1]
    tuning = tunings.choose(t, w, quantises=True)
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=BF16)
    call = lambda x, gain, w, tuning=tuning: int4_matmul(
      x, w, norm_weight=gain, eps=EPS, tuning=tuning
    )
    functions.append((call, (struct((t, c)), struct((c,)), w)))
  reports = deviceless.compile_all(functions, tmp_path)
  assert len(reports) == len(functions)
  for report in reports:
    assert report.spilled_bytes == 0
    assert not report.serialised_wgmma


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_kernel_equals_two_kernels(norm, gated):
  """Bit for bit and always, for any number of CTAs of a cluster.

  But for a row of 8192 act_quant takes twice the warps, which add a norm's
  squares in another order. SiLU of a gate near -80 shows the last bit of that
  sum: one of 8192 outputs differed, in its last bit.
  """
  rng = np.random.default_rng(3)
  for t, c, cluster in (
    (1, 2048, 2),
    (3, 1024, 4),
    (8, 8192, 2),
    (13, 4096, 1),
    (13, 4096, 2),
    (16, 4096, 2),
    (16, 4096, 4),
  ):
    x, gain, w, _ = case(rng, n=2048, c=c, t=t, norm=norm, gated=gated)
    tuning = tunings.choose(t, w, quantises=True)
    tuning = dataclasses.replace(tuning, cluster=cluster)
    eps = EPS if norm else 0.0
    codes, scale = act_quant(x, gain, eps=eps)
    wanted = int4_matmul(codes, w, scale, tuning=tuning).astype(jnp.float32)
    first, *others = (
      int4_matmul(x, w, norm_weight=gain, eps=eps, tuning=tuning)
      for _ in range(10)
    )
    last_bit = 2**-7 if gated and norm and c == 8192 else 0
    np.testing.assert_allclose(
      first.astype(jnp.float32), wanted, last_bit, err_msg=str((t, c, cluster))
    )
    for y in others:
      np.testing.assert_array_equal(y, first, str((t, c, cluster)))
