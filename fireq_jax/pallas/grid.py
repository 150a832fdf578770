"""How the consumers of `decode_chain` wait for each other, in a CTA and beyond."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas.inline import (
  ONE_A_THREAD,
  elements,
  fixed_assembly,
  global_address,
  one_a_thread,
  run_words,
)

CONSUMERS = 4  # warpgroups of a CTA
_THREADS = 128 * CONSUMERS
_BARRIER = 15  # a named barrier that Mosaic leaves alone


def consumers_barrier() -> None:
  """Waits for the threads of all consumers."""

  def emit(_):
    fixed_assembly(f"bar.sync {_BARRIER}, {_THREADS};")

  plgpu.inline_mgpu()(emit)()


def grid_barrier(counters: Any, arrivals: int) -> None:
  """Waits until the consumers of `arrivals` CTAs have been here.

  What they wrote to global memory before is visible after.
  """

  def emit(_, counters):
    text = f"""{{
    .reg .pred p;
    .reg .b32 i, n;
    bar.sync {_BARRIER}, {_THREADS};
    mov.u32 i, %tid.x;
    setp.ne.u32 p, i, 0;
    @p bra JOIN;
    red.release.gpu.global.add.u32 [$0], 1;
    WAIT:
    ld.acquire.gpu.global.u32 n, [$0];
    setp.lt.u32 p, n, {arrivals};
    @p bra WAIT;
    JOIN:
    bar.sync {_BARRIER}, {_THREADS};
    }}"""
    fixed_assembly(text, [global_address(counters)], "l")

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(emit)(counters)


def count_passed(counters: Any) -> jax.Array:
  """Counts the CTA as one that has passed every barrier.

  Returns:
    For `leave`, i32 [128], one a thread.
  """

  def emit(_, counters):
    text = """{
    .reg .pred p;
    .reg .b32 i;
    mov.u32 i, %tid.x;
    setp.eq.u32 p, i, 0;
    mov.b32 $0, 0;
    @p atom.relaxed.gpu.global.add.u32 $0, [$1 + 4], 1;
    }"""
    return one_a_thread(run_words(1, text, [global_address(counters)], "l")[0])

  struct = plgpu.ShapeDtypeStruct((128,), jnp.int32, ONE_A_THREAD)
  return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=struct)(
    emit
  )(counters)


def leave(counters: Any, passed: Any, ctas: int) -> None:
  """Sets the counters to zero in the last CTA that has passed every barrier."""

  def emit(_, counters, passed):
    [n] = elements(passed.registers[0])
    text = f"""{{
    .reg .pred p;
    setp.eq.u32 p, $1, {ctas - 1};
    @p st.global.v2.u32 [$0], {{0, 0}};
    }}"""
    fixed_assembly(text, [global_address(counters), n], "l,r")

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ONE_A_THREAD))(emit)(
    counters, passed
  )
