"""Sums that CTAs of a cluster exchange, from registers to registers.

A CTA may `put` values into another's shared memory once all threads of the
cluster have come to `arrive`. They lie there in the order of registers, 16
bytes a thread side by side, without bank conflicts, and each announces itself
to a barrier of its receiver.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fireq_jax.pallas.inline import (
  array,
  elements,
  fixed_assembly,
  i32,
  shared_address,
  vector,
)

_WGMMA = plgpu.Layout.WGMMA
_ROW = 128 * 16  # bytes that a warpgroup stores at once


def expect(barrier: Any, size: int) -> None:
  """Makes a barrier, int32 [2], that waits for `size` bytes; in a warpgroup."""

  def emit(_, barrier):
    text = f"""{{
    .reg .pred p;
    .reg .b32 i;
    mov.u32 i, %tid.x;
    and.b32 i, i, 127;
    setp.ne.u32 p, i, 0;
    @p bra DONE;
    mbarrier.init.shared::cta.b64 [$0], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};
    DONE:
    }}"""
    fixed_assembly(text, [shared_address(barrier)], "r")

  plgpu.inline_mgpu(arg_types=(_REF,))(emit)(barrier)


def arrive(*, after_reads: bool = False) -> None:
  """Once in every thread of the cluster.

  Args:
    after_reads: what the thread has read of its CTA's memory may be overwritten
      by those who `join`.
  """

  def emit(_):
    if after_reads:
      fixed_assembly("fence.acq_rel.cta;")
    fixed_assembly("barrier.cluster.arrive.relaxed;")

  plgpu.inline_mgpu()(emit)()


def join() -> None:
  """Waits for every thread of the cluster to `arrive`."""

  def emit(_):
    fixed_assembly("barrier.cluster.wait.acquire;")

  plgpu.inline_mgpu()(emit)()


def put(values: jax.Array, target: Any, barrier: Any, cta: jax.Array) -> None:
  """Stores values in the memory of another CTA of the cluster.

  Args:
    values: f32 [64, N], in one warpgroup.
    target: f32 [64 * N] of this CTA: that of the other has the same address.
    barrier: of the other CTA, likewise.
    cta: index of the other CTA in the cluster.
  """

  def emit(_, values, target, barrier, cta):
    [cta] = cta.registers.flat
    text = "mapa.shared::cluster.u32 $0, $1, $2;"
    start, signal = (
      fixed_assembly(text, [address, cta], "=r,r,r", i32())
      for address in (_of_thread(target), shared_address(barrier))
    )
    pairs = values.registers.flat
    for i, (a, b) in enumerate(zip(pairs[0::2], pairs[1::2], strict=True)):
      fixed_assembly(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
        f" [$0 + {i * _ROW}], {{$2, $3, $4, $5}}, [$1];",
        [start, signal, *elements(a), *elements(b)],
        "r,r,f,f,f,f",
      )

  plgpu.inline_mgpu(arg_types=(_WGMMA, _REF, _REF, _SCALAR))(emit)(
    plgpu.layout_cast(values, _WGMMA), target, barrier, cta
  )


def keep(values: jax.Array, target: Any) -> None:
  """Stores values in this CTA's memory, as `put` does in another's."""

  def emit(_, values, target):
    start = _of_thread(target)
    pairs = values.registers.flat
    for i, (a, b) in enumerate(zip(pairs[0::2], pairs[1::2], strict=True)):
      fixed_assembly(
        f"st.shared.v4.f32 [$0 + {i * _ROW}], {{$1, $2, $3, $4}};",
        [start, *elements(a), *elements(b)],
        "r,f,f,f,f",
      )

  plgpu.inline_mgpu(arg_types=(_WGMMA, _REF))(emit)(
    plgpu.layout_cast(values, _WGMMA), target
  )


def wait(barrier: Any, scope: str = "cluster") -> None:
  """Waits for what `expect` says, from the "cluster" or just the "cta"."""

  def emit(_, barrier):
    text = f"""{{
    .reg .pred p;
    WAIT:
    mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 p, [$0], 0;
    @!p bra WAIT;
    }}"""
    fixed_assembly(text, [shared_address(barrier)], "r")

  plgpu.inline_mgpu(arg_types=(_REF,))(emit)(barrier)


def take(source: Any, shape: tuple[int, ...]) -> jax.Array:
  """What `put` or `keep` stored: f32 of this shape, [64, N]."""

  def emit(_, source):
    start = _of_thread(source)
    layout = mgpu.WGMMA_LAYOUT
    out = np.empty(layout.registers_shape(shape), dtype=object)
    f32 = ir.F32Type.get()
    quad = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    flat = out.reshape(-1)
    for i in range(len(flat) // 2):
      loaded = fixed_assembly(
        f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {i * _ROW}];",
        [start],
        "=f,=f,=f,=f,r",
        quad,
      )
      a, b, c, d = (llvm.extractvalue(f32, loaded, (j,)) for j in range(4))
      flat[2 * i], flat[2 * i + 1] = vector([a, b]), vector([c, d])
    return array(out, layout)

  return plgpu.inline_mgpu(
    arg_types=(_REF,),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, _WGMMA),
  )(emit)(source)


_REF = plgpu.RefType()
_SCALAR = plgpu.Layout.WG_SPLAT(())


def _of_thread(ref):
  """Address of the first 16 bytes of a thread."""
  text = """{
    .reg .b32 i;
    mov.u32 i, %tid.x;
    and.b32 i, i, 127;
    mad.lo.u32 $0, i, 16, $1;
    }"""
  return fixed_assembly(text, [shared_address(ref)], "=r,r", i32())
