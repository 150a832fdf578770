"""Softmax of prefill attention on the registers of a warpgroup.

Thread 4g + t of a warp holds rows g and g + 8 of the warp's 16, and of every 8
columns the columns 2t and 2t + 1. An element costs two multiply-adds, half a comparison, an
exponential and half a conversion: peaks of rows move only where an exponent is
too large for e4m3 (`settle`), and the tensor cores sum rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from fireq_jax.pallas.inline import (
  array,
  assembly,
  constant,
  elements,
  i32,
  inline,
  vector,
)
from fireq_jax.pallas.kv_layout import KV_ORDER

_TILE = plgpu.Layout.WGMMA
_ROW = _TILE.reduce(1)
_E4M3 = jnp.float8_e4m3fn
# [tokens / 2, 4]: the numbers of two neighbouring tokens in one load.
TOKEN_PAIRS = plgpu.Layout.TILED(
  plgpu.Tiling(((4, 4),)),
  warp_dims=(plgpu.Replicated(4),),
  lane_dims=(plgpu.Replicated(8), -2),
  vector_dim=-1,
)
# Peaks move by whole exponents, so that rounding to e4m3 does not depend on the
# order of tiles: into (CENTRE - 1, CENTRE] where one is at LIMIT or above.
# 2 ** LIMIT rounds to 448, the largest number.
CENTRE = 7.0
LIMIT = 8.75


def exponents(
  x: jax.Array, scales: jax.Array, peak: jax.Array, scale: jax.Array
) -> jax.Array:
  """(x * k_scale - peak) * scale + v_exponent.

  Args:
    x: f32 [64, S], products of codes.
    scales: f32 [S / 2, 4]: k_scale, k_scale, v_exponent, v_exponent of two
      tokens, layout `TOKEN_PAIRS`.
    peak: f32 [64], in units of x * k_scale.
    scale: f32 [64].
  """

  def emit(x, scales, peak, scale):
    out = np.empty_like(x.registers)
    for index, pair in np.ndenumerate(x.registers):
      of_token = elements(scales.registers[index[1], 0, 0, 0])
      row = (0, 0, index[4], 0, 0)
      (below,) = elements(peak.registers[row])
      (factor,) = elements(scale.registers[row])
      below = arith.negf(below)
      out[index] = vector(
        [
          _fma(_fma(element, of_token[i], below), factor, of_token[2 + i])
          for i, element in enumerate(elements(pair))
        ]
      )
    return array(out, mgpu.WGMMA_LAYOUT)

  def model(x, scales, peak, scale):
    k_scale, v_exponent = (
      scales[:, columns].reshape(-1) for columns in (slice(2), slice(2, 4))
    )
    return (x * k_scale - peak[:, None]) * scale[:, None] + v_exponent

  return inline(
    emit,
    model,
    arg_types=(_TILE, TOKEN_PAIRS, _ROW, _ROW),
    return_type=_like(x),
  )(x, scales, peak, scale)


def first_rise(e: jax.Array) -> jax.Array:
  """How far f32 e [64, S] has to be lowered: f32 [64]."""

  def emit(e):
    rises = [vector([_rise(_row(e, half))]) for half in range(2)]
    layout = mgpu.WGMMA_ROW_LAYOUT
    return array(np.reshape(rises, layout.registers_shape((64,))), layout)

  return inline(
    emit,
    lambda e: jnp.ceil(jnp.max(e, axis=1) - CENTRE),
    arg_types=(_TILE,),
    return_type=plgpu.ShapeDtypeStruct(e.shape[:1], e.dtype, _ROW),
  )(e)


def to_operand(p: jax.Array) -> jax.Array:
  """f32 accumulator [64, S] -> e4m3 A operand, tokens in `KV_ORDER`."""

  def emit(p):
    layout = mgpu.WGMMA_LAYOUT_8BIT
    bytes_of = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    out = np.empty(layout.registers_shape(p.shape), dtype=object)
    for index in np.ndindex(out.shape):
      pairs = [
        p.registers[(index[0], 2 * index[1] + half, *index[2:])]
        for half in range(2)
      ]
      word = assembly(
        i32(),
        [*elements(pairs[0]), *elements(pairs[1])],
        "{ .reg .b16 lo, hi;"
        " cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;"
        " mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f",
      )
      out[index] = mgpu.utils.bitcast(mgpu.utils.bitcast(word, bytes_of), e4m3)
    return array(out, layout)

  def model(p):
    blocks = p.reshape(p.shape[0], -1, 16)[..., KV_ORDER]
    return jnp.clip(blocks.reshape(p.shape), 0, 448).astype(_E4M3)

  return inline(
    emit,
    model,
    arg_types=(_TILE,),
    return_type=plgpu.ShapeDtypeStruct(p.shape, _E4M3, plgpu.Layout.WGMMA_8BIT),
  )(p)


def settle(
  e: jax.Array,
  out: jax.Array,
  total: jax.Array,
  peak: jax.Array,
  scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Raises the peaks of a warp's rows where one of its exponents is too large.

  Args:
    e: f32 [64, S], `exponents`.
    out: f32 [64, H + 8], sums weighted with 2 ** e of earlier tiles. The last 8
      columns are 4 equal pairs, and hold sums of weights of the last tile alone.
    total: f32 [64], sums of weights of the tiles before.
    peak: f32 [64].
    scale: f32 [64].

  Returns:
    e, out, total and peak with new peaks; those 8 columns went into total.
  """

  def emit(e, out, total, peak, scale):
    halves = range(2)
    e_of = [_row(e, half) for half in halves]
    out_of = [_row(out, half) for half in halves]
    totals, peaks, scales = (
      [elements(a.registers[0, 0, half, 0, 0])[0] for half in halves]
      for a in (total, peak, scale)
    )
    for half in halves:
      *out_of[half], high, low = out_of[half]
      totals[half] = arith.addf(totals[half], arith.addf(high, low))
    # Floats above zero are ordered as their bits are.
    bits = [arith.bitcast(i32(), x) for x in (*e_of[0], *e_of[1])]
    chains = [functools.reduce(arith.maxsi, bits[i::4]) for i in range(4)]
    limit = np.float32(LIMIT).view(np.int32)
    any_above = assembly(
      i32(),
      [functools.reduce(arith.maxsi, chains)],
      "{ .reg .pred p;"
      f" setp.ge.s32 p, $1, {limit};"
      " vote.sync.any.pred p, p, 0xffffffff;"
      " selp.b32 $0, 1, 0, p; }",
      "=r,r",
    )
    old = [*e_of[0], *e_of[1], *out_of[0], *out_of[1], *totals, *peaks]
    branch = scf.IfOp(
      arith.cmpi(arith.CmpIPredicate.ne, any_above, constant(0)),
      [x.type for x in old],
      has_else=True,
    )
    with ir.InsertionPoint(branch.then_block):
      new_e, new_out, new_totals, new_peaks = [], [], [], []
      for half in halves:
        rise = arith.maxnumf(_rise(e_of[half]), _float(0.0))
        shrink = _exp2(arith.negf(rise))
        new_e += [arith.subf(x, rise) for x in e_of[half]]
        new_out += [arith.mulf(x, shrink) for x in out_of[half]]
        new_totals.append(arith.mulf(totals[half], shrink))
        new_peaks.append(_fma(rise, _reciprocal(scales[half]), peaks[half]))
      scf.YieldOp([*new_e, *new_out, *new_totals, *new_peaks])
    # pyrefly: ignore[no-matching-overload]
    with ir.InsertionPoint(branch.else_block):
      scf.YieldOp(old)

    results = iter(branch.results)
    for a, kept in ((e, e.shape[1] // 8), (out, out.shape[1] // 8 - 1)):
      registers = np.empty_like(a.registers)
      for half in halves:
        for i in np.ndindex(registers.shape):
          if i[4] == half and i[1] < kept:
            registers[i] = vector([next(results), next(results)])
          elif i[4] == half:
            # A constant would be set while wgmma runs, which serialises it.
            pair = elements(a.registers[i])
            registers[i] = vector([arith.subf(x, x) for x in pair])
      yield array(registers, mgpu.WGMMA_LAYOUT)
    for a in (total, peak):
      registers = np.empty_like(a.registers)
      for half in halves:
        registers[0, 0, half, 0, 0] = vector([next(results)])
      yield array(registers, mgpu.WGMMA_ROW_LAYOUT)

  def model(e, out, total, peak, scale):
    top = jnp.max(e, axis=1)
    above = jnp.any(top.reshape(4, 16) >= LIMIT, axis=1)
    rise = jnp.maximum(jnp.ceil(top - CENTRE), 0)
    rise = jnp.where(jnp.repeat(above, 16), rise, 0)
    shrink = jnp.exp2(-rise)
    total = (total + out[:, -8] + out[:, -7]) * shrink
    out = (out * shrink[:, None]).at[:, -8:].set(0)
    return e - rise[:, None], out, total, peak + rise / scale

  return inline(
    lambda *args: tuple(emit(*args)),
    model,
    arg_types=(_TILE, _TILE, _ROW, _ROW, _ROW),
    return_type=(
      _like(e),
      _like(out),
      _like(total, layout=_ROW),
      _like(peak, layout=_ROW),
    ),
  )(e, out, total, peak, scale)


def normalise(out: jax.Array, total: jax.Array, factor: jax.Array) -> jax.Array:
  """Divides out f32 [64, H + 8] by its totals, see `settle`: f32 [64, H]."""
  head_dim = out.shape[1] - 8

  def emit(out, total, factor):
    registers = np.empty(
      mgpu.WGMMA_LAYOUT.registers_shape((64, head_dim)), dtype=object
    )
    for half in range(2):
      *columns, high, low = _row(out, half)
      (times,) = elements(factor.registers[0, 0, half, 0, 0])
      (over,) = elements(total.registers[0, 0, half, 0, 0])
      over = arith.addf(over, arith.addf(high, low))
      times = arith.mulf(times, _reciprocal(over))
      columns = [arith.mulf(x, times) for x in columns]
      for group in range(head_dim // 8):
        registers[0, group, 0, 0, half, 0, 0, 0, 0] = vector(
          columns[2 * group : 2 * group + 2]
        )
    return array(registers, mgpu.WGMMA_LAYOUT)

  def model(out, total, factor):
    factor = factor / (total + out[:, -8] + out[:, -7])
    return out[:, :-8] * factor[:, None]

  return inline(
    emit,
    model,
    arg_types=(_TILE, _ROW, _ROW),
    return_type=plgpu.ShapeDtypeStruct((64, head_dim), jnp.float32, _TILE),
  )(out, total, factor)


def _like(x, layout=_TILE):
  return plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)


def _row(a, half):
  """The thread's elements of its first or second row, in order of columns."""
  registers = a.registers
  return [
    x
    for i in np.ndindex(registers.shape)
    if i[4] == half
    for x in elements(registers[i])
  ]


def _rise(row):
  """Distance in whole exponents of a row's largest exponent from CENTRE."""
  top = functools.reduce(arith.maxnumf, row)
  for distance in (1, 2):
    top = arith.maxnumf(top, mgpu.utils.shfl_bfly(top, distance))
  above = arith.subf(top, _float(CENTRE))
  return assembly(above.type, [above], "cvt.rpi.f32.f32 $0, $1;", "=f,f")


def _float(value):
  return arith.constant(ir.F32Type.get(), value)


def _fma(a, b, c):
  return llvm.intr_fma(a, b, c)


def _exp2(x):
  return assembly(ir.F32Type.get(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _reciprocal(x):
  return assembly(ir.F32Type.get(), [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
