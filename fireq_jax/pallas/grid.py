"""How the consumers of `decode_chain` wait for each other, in a CTA and beyond."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas.inline import fixed_assembly, global_address

_THREADS = 512  # of all consumers of a CTA
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


def leave(counters: Any, ctas: int) -> None:
  """Sets the counters to zero once the last CTA has passed every barrier."""

  def emit(_, counters):
    text = f"""{{
    .reg .pred p;
    .reg .b32 i, n;
    mov.u32 i, %tid.x;
    setp.ne.u32 p, i, 0;
    @p bra DONE;
    atom.acq_rel.gpu.global.add.u32 n, [$0 + 4], 1;
    setp.ne.u32 p, n, {ctas - 1};
    @p bra DONE;
    st.global.v2.u32 [$0], {{0, 0}};
    DONE:
    }}"""
    fixed_assembly(text, [global_address(counters)], "l")

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(emit)(counters)
