"""Barriers in shared memory at which a warp arrives by one of its lanes.

Pallas' own count every thread of a warpgroup, which costs shared memory an
access for each. These are plain words of shared memory; they know nothing of
phases, so who waits says how many completions it has seen there before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas.inline import fixed_assembly, shared_address

_WARPS = 4  # of a warpgroup


def barriers(count: int) -> Any:
  """Shared memory for barriers; `init` comes before their use."""
  return plgpu.SMEM((count, 2), jnp.int32)


def init(ref: Any, arrivals: int) -> None:
  """Sets up barriers, in a warpgroup or its first warp, before others use them.

  Args:
    ref: of `barriers`, 32 at most.
    arrivals: of whole warpgroups.
  """
  text = f"""{{
    .reg .pred p;
    .reg .b32 i, a;
    mov.u32 i, %tid.x;
    and.b32 i, i, 127;
    setp.lt.u32 p, i, {ref.shape[0]};
    mad.lo.u32 a, i, 8, $0;
    @p mbarrier.init.shared.b64 [a], {_WARPS * arrivals};
    bar.warp.sync 0xffffffff;
    }}"""
  _run(text, ref)


def arrive(ref: Any, index: jax.Array) -> None:
  """A warpgroup arrives, once what its threads did before is visible."""
  text = """{
    .reg .pred p;
    .reg .b32 l;
    mov.u32 l, %laneid;
    setp.eq.u32 p, l, 0;
    mad.lo.u32 l, $1, 8, $0;
    bar.warp.sync 0xffffffff;
    @p mbarrier.arrive.shared.b64 _, [l];
    }"""
  _run(text, ref, index)


def wait(ref: Any, index: jax.Array, completed: jax.Array) -> None:
  """Waits for one completion more than the `completed` there have been."""
  text = """{
    .reg .pred p;
    .reg .b32 a, c;
    mad.lo.u32 a, $1, 8, $0;
    and.b32 c, $2, 1;
    WAIT:
    mbarrier.try_wait.parity.shared.b64 p, [a], c;
    @!p bra WAIT;
    }"""
  _run(text, ref, index, completed)


def _run(text, ref, *scalars):
  def emit(_, ref, *scalars):
    operands = [x for scalar in scalars for x in scalar.registers.flat]
    inputs = "r" + ",r" * len(operands)
    fixed_assembly(text, [shared_address(ref), *operands], inputs)

  splat = plgpu.Layout.WG_SPLAT(())
  plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(splat for _ in scalars)))(
    emit
  )(ref, *scalars)
