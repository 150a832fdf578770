"""INT4 matmul: the kernel against the reference, on the card."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from int4_problems import problem

from fireq_jax.pallas import reference, tunings
from fireq_jax.pallas.int4_matmul import Tuning, int4_matmul, rows_of

pytestmark = pytest.mark.gpu
TOKENS = [1, 2, 7, 8, 13, 16, 17, 63, 64, 65, 127, 128, 129, 257, 1024, 4096]


def compiled(functions):
  """[(function, its arguments)] compiled side by side, without autotuning."""
  compiler_options = {"xla_gpu_autotune_level": 0}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return list(
      pool.map(
        lambda call: (
          jax.jit(call[0], compiler_options=compiler_options)
          .lower(*call[1])
          .compile()
        ),
        functions,
      )
    )


def reference_of(args, **options):
  """The reference's result in f32, [T, N] on the host."""
  function = functools.partial(reference.int4_matmul, **options)
  [function] = compiled([(function, args)])
  return np.asarray(function(*args), np.float32)


def first(args, t):
  """The arguments for the first `t` tokens."""
  x, w, x_scale = args
  return x[:t], w, None if x_scale is None else x_scale[:t]


def relative_error(y, wanted):
  error = np.linalg.norm(np.asarray(y, np.float32) - wanted)
  return error / np.linalg.norm(wanted)


@pytest.mark.parametrize("mode", ["e4m3", "exact", "bf16"])
@pytest.mark.parametrize("n, c", [(6144, 4096), (4096, 11008), (512, 2048)])
def test_kernel_error_is_rounding(n, c, mode):
  """For every number of tokens, and the same bits on every run.

  A tensor core keeps about 14 bits of a sum, which shows where one accumulator
  runs through all of C.
  """
  rng = np.random.default_rng(6)
  args, _ = problem(rng, n, c, max(TOKENS), kind=mode)
  wanted = reference_of(args, out_dtype=jnp.float32)
  tunings_of = {t: tunings.choose(t, args[1]) for t in TOKENS}
  kernels = compiled(
    (
      functools.partial(int4_matmul, tuning=tuning, out_dtype=jnp.float32),
      first(args, t),
    )
    for t, tuning in tunings_of.items()
  )
  for (t, tuning), kernel in zip(tunings_of.items(), kernels):
    these = first(args, t)
    y = np.asarray(kernel(*these))
    error = relative_error(y, wanted[:t])
    assert error < (3e-3 if mode == "e4m3" else 2e-3), (t, tuning)
    for _ in range(20 if t < 1000 else 2):
      np.testing.assert_array_equal(kernel(*these), y, str((t, tuning)))


EPILOGUES = {
  "linear": dict(bias=True),
  "add": dict(epilogue="add", bias=True),
  "mul": dict(epilogue="mul"),
  "silu": dict(epilogue="silu"),
  "gated": dict(gated=True, bias=True),
  "minus_8": dict(lowest=-8, epilogue="add"),
  "group_64": dict(group=64, epilogue="add"),
  "exact": dict(kind="exact", epilogue="add"),
  "exact_gated": dict(kind="exact", gated=True, bias=True),
  "exact_group_64": dict(kind="exact", group=64),
  "bf16": dict(kind="bf16", lowest=-8, epilogue="add"),
  "bf16_group_64": dict(kind="bf16", group=64),
}


CLUSTERS = [  # tunings of tiles or x that CTAs share
  Tuning(tile_t=64, rows=64, stages=6, blocks=2, interleave=2, split=2),
  Tuning(tile_t=128, rows=192, stages=4, blocks=2, split=2, ahead=True),
  Tuning(tile_t=256, rows=128, stages=4, ahead=True, multicast=True),
]
AHEAD = Tuning(tile_t=128, stages=8, cut=2, ctas=7, ahead=True)
WIDE = Tuning(tile_t=256, rows=192, stages=4, cut=2, ctas=7)


@pytest.mark.parametrize("options", EPILOGUES.values(), ids=EPILOGUES)
def test_every_epilogue_on_the_card(options):
  """Also with rows that follow the last token, which must change nothing."""
  rng = np.random.default_rng(7)
  args, given = problem(rng, 1536, 1024, 1000, **options)
  wanted = reference_of(args, **given)
  wanted_tunings = [
    (t, tunings.choose(t, args[1]))
    for t in (1, 7, 13, 16, 63, 64, 129, 256, 1000)
  ]
  e4m3_scale = args[1].scale.dtype == jnp.float8_e4m3fn
  for tuning in *CLUSTERS, AHEAD, *([WIDE] if e4m3_scale else []):
    wanted_tunings += [(t, tuning) for t in (13, 200)]
  cases = []
  for t, tuning in wanted_tunings:
    these = dict(given, tuning=tuning)
    if "operand" in given:
      these["operand"] = given["operand"][:t]
    cases.append((first(args, t), these))
    if rows_of(t) > t:
      cases.append((first(args, rows_of(t)), dict(these, tokens=t)))
  kernels = compiled(
    (functools.partial(int4_matmul, **these), args) for args, these in cases
  )
  for (args, these), kernel in zip(cases, kernels):
    y = kernel(*args)
    case = len(y), len(args[0]), these["tuning"]
    assert relative_error(y, wanted[: len(y)]) < 5e-3, case


def test_not_a_number_stays_in_its_row():
  rng = np.random.default_rng(8)
  (x, w, x_scale), _ = problem(rng, 512, 1024, 16)
  x = x.at[3, 5].set(jnp.nan)
  tuning = tunings.choose(16, w)
  y = int4_matmul(x, w, x_scale, tuning=tuning)
  assert bool(jnp.isnan(y[3]).all())
  assert not bool(jnp.isnan(jnp.delete(y, 3, axis=0)).any())


def test_parts_of_arrays_and_donated_ones_are_read_right():
  """A donated operand may give its memory to the result."""
  rng = np.random.default_rng(11)
  (x, w, x_scale), _ = problem(rng, 512, 1024, 40)
  operand = jnp.asarray(rng.standard_normal((16, 512)), jnp.bfloat16)
  matmul = functools.partial(
    int4_matmul, epilogue="add", tuning=tunings.choose(16, w)
  )
  wanted = matmul(x[3:19], w, x_scale[3:19], operand=operand)

  @functools.partial(jax.jit, donate_argnums=3)
  def of_parts(x, w, s, operand):
    return matmul(x[3:19], w, s[3:19], operand=operand)

  y = of_parts(x, w, x_scale, jnp.array(operand))
  np.testing.assert_array_equal(y, wanted)
