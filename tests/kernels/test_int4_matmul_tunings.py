"""Tunings of the INT4 matmul: which are chosen, and that all compile."""

import dataclasses

import deviceless
import jax
import jax.numpy as jnp
import pytest
from int4_problems import BF16, MODES, shapes

from fireq_jax.pallas import tunings
from fireq_jax.pallas.int4_matmul import int4_matmul


@pytest.mark.slow
@deviceless.needs_plugin
def test_every_shipped_tuning_compiles_without_spills(tmp_path, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

  cases = [  # of 133 tiles the last is cut, if it may be
    (
      shapes(
        t=tuning.tile_t,
        n=tuning.rows * 133 if cut > 1 else 192,
        c=1024,
        mode=mode,
      ),
      dataclasses.replace(tuning, cut=cut),
    )
    for tuning, ns in tunings.table()
    for cut in [max([1, *tunings.cuts(tuning)])]
    for mode in ns
  ]
  cases += [
    (shapes(t=t, n=256, c=1024, mode="e4m3", gated=True), tuning)
    for t, n in ((16, 28672), (256, 22016))
    for tuning in [
      tunings.choose(t, shapes(t, n, 1024, mode="e4m3", gated=True)[1])
    ]
  ]
  reports = deviceless.compile_all(
    [
      (lambda *args, tuning=tuning: int4_matmul(*args, tuning=tuning), args)
      for args, tuning in cases
    ],
    tmp_path,
  )
  assert len(reports) == len(cases)
  for (_, tuning), report in zip(cases, reports):
    assert report.spilled_bytes == 0, tuning
    assert not report.serialised_wgmma, tuning


def test_tiles_are_shared_or_cut_where_that_fills_the_card():
  def choice(t, n, c, mode="e4m3", **options):
    w = shapes(t, n, c, mode=mode, **options)[1]
    tuning = tunings.choose(t, w)
    return tuning.split, tuning.cut

  assert choice(64, 4096, 14336) == (2, 1)
  assert choice(8, 4096, 14336) == (1, 1)
  assert choice(64, 8192, 4096) == (1, 1)  # enough tiles for all
  assert choice(64, 4096, 1024) == (1, 1)  # not worth an exchange
  assert choice(64, 4096, 14336, gated=True) == (2, 1)
  assert choice(1024, 22016, 4096) == (1, 2)  # 64 tiles left of 460
  assert choice(1024, 28672, 4096) == (1, 1)  # 104 of 896
  assert choice(256, 22016, 4096) == (1, 1)  # a wave of 192 rows
  assert choice(4096, 4096, 14336, "exact") == (1, 3)  # 44 tiles left of 704


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out_dtype", [BF16, jnp.float32])
@pytest.mark.parametrize("t", [1, 16, 60, 100, 4096])
def test_chosen_tunings_lower_for_cuda(mode, t, out_dtype):
  args = shapes(t=t, n=4096, c=11008, mode=mode)
  tuning = tunings.choose(t, args[1])
  kernel = jax.jit(
    lambda *args: int4_matmul(*args, out_dtype=out_dtype, tuning=tuning)
  )
  text = kernel.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text
