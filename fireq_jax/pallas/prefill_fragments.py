"""Softmax of prefill attention on the registers of a warpgroup.

Thread 4g + t of a warp holds rows g and g + 8 of the warp's 16, and of every 8
columns the columns 2t and 2t + 1. An element costs two multiply-adds, an
exponential and half a conversion. Nothing compares elements: where one is too
large for e4m3 it saturates, which four codes at a time tell, and only then
peaks of rows move (`settle`).
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
# The largest exponent of a row's first tile becomes FIRST: exact in e4m3, and
# low enough that few later ones saturate. Of those that do, the largest becomes
# CENTRE, and so do others between it and saturation where one of the warp does.
FIRST = 5.0
CENTRE = 7.0


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
    rises = [vector([_rise(_row(e, half), FIRST)]) for half in range(2)]
    layout = mgpu.WGMMA_ROW_LAYOUT
    return array(np.reshape(rises, layout.registers_shape((64,))), layout)

  return inline(
    emit,
    lambda e: jnp.max(e, axis=1) - FIRST,
    arg_types=(_TILE,),
    return_type=plgpu.ShapeDtypeStruct(e.shape[:1], e.dtype, _ROW),
  )(e)


def probabilities(e: jax.Array) -> jax.Array:
  """2 ** e, e f32 [64, S] -> e4m3 A operand, tokens in `KV_ORDER`."""

  def emit(e):
    out = np.empty_like(e.registers)
    for index, pair in np.ndenumerate(e.registers):
      out[index] = vector([_exp2(x) for x in elements(pair)])
    return _operand(_pack(out, e.shape), e.shape)

  return inline(
    emit, _probabilities, arg_types=(_TILE,), return_type=_operand_of(e)
  )(e)


def settle(
  p: jax.Array,
  e: jax.Array,
  out: jax.Array,
  total: jax.Array,
  peak: jax.Array,
  scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Raises the peaks of a warp's rows where one of its codes is saturated.

  Args:
    p: e4m3 [64, S], `probabilities` of e.
    e: f32 [64, S], `exponents`.
    out: f32 [64, H + 8], sums weighted with 2 ** e of earlier tiles. The last 8
      columns are 4 equal pairs, and hold sums of weights of the last tile alone.
    total: f32 [64], sums of weights of the tiles before.
    peak: f32 [64].
    scale: f32 [64].

  Returns:
    p, out, total and peak with new peaks; those 8 columns went into total.
  """

  def emit(p, e, out, total, peak, scale):
    halves = range(2)
    words = [mgpu.utils.bitcast(word, i32()) for word in p.registers.flat]
    # Only 0x7e, the largest code, carries into the highest bit.
    carried = [arith.addi(word, constant(0x02020202)) for word in words]
    any_full = assembly(
      i32(),
      [functools.reduce(arith.ori, carried)],
      "{ .reg .pred p; .reg .b32 high; and.b32 high, $1, 0x80808080;"
      " setp.ne.b32 p, high, 0; vote.sync.any.pred p, p, 0xffffffff;"
      " selp.b32 $0, 1, 0, p; }",
      "=r,r",
    )
    out_of = [_row(out, half) for half in halves]
    totals, peaks, scales = (
      [elements(a.registers[0, 0, half, 0, 0])[0] for half in halves]
      for a in (total, peak, scale)
    )
    for half in halves:
      *out_of[half], high, low = out_of[half]
      totals[half] = arith.addf(totals[half], arith.addf(high, low))
    old = [*words, *out_of[0], *out_of[1], *totals, *peaks]
    branch = scf.IfOp(
      arith.cmpi(arith.CmpIPredicate.ne, any_full, constant(0)),
      [x.type for x in old],
      has_else=True,
    )
    with ir.InsertionPoint(branch.then_block):
      new_out, new_totals, new_peaks = [], [], []
      lowered = np.empty_like(e.registers)
      for half in halves:
        rise = arith.maxnumf(_rise(_row(e, half), CENTRE), _float(0.0))
        shrink = _exp2(arith.negf(rise))
        new_out += [arith.mulf(x, shrink) for x in out_of[half]]
        new_totals.append(arith.mulf(totals[half], shrink))
        new_peaks.append(_fma(rise, _reciprocal(scales[half]), peaks[half]))
        for i, pair in np.ndenumerate(e.registers):
          if i[4] == half:
            pair = [_exp2(arith.subf(x, rise)) for x in elements(pair)]
            lowered[i] = vector(pair)
      new_words = _pack(lowered, e.shape)
      scf.YieldOp([*new_words, *new_out, *new_totals, *new_peaks])
    # pyrefly: ignore[no-matching-overload]
    with ir.InsertionPoint(branch.else_block):
      scf.YieldOp(old)

    results = iter(branch.results)
    yield _operand([next(results) for _ in words], e.shape)
    registers = np.empty_like(out.registers)
    for half in halves:
      for i in np.ndindex(registers.shape):
        if i[4] == half and i[1] < registers.shape[1] - 1:
          registers[i] = vector([next(results), next(results)])
        elif i[4] == half:
          # A constant would be set while wgmma runs, which serialises it.
          pair = elements(out.registers[i])
          registers[i] = vector([arith.subf(x, x) for x in pair])
    yield array(registers, mgpu.WGMMA_LAYOUT)
    for _ in (total, peak):
      registers = np.empty_like(peak.registers)
      for half in halves:
        registers[0, 0, half, 0, 0] = vector([next(results)])
      yield array(registers, mgpu.WGMMA_ROW_LAYOUT)

  def model(p, e, out, total, peak, scale):
    full = jnp.any(p.astype(jnp.float32) == 448, axis=1)
    full = jnp.repeat(jnp.any(full.reshape(4, 16), axis=1), 16)
    rise = jnp.maximum(jnp.max(e, axis=1) - CENTRE, 0)
    rise = jnp.where(full, rise, 0)
    shrink = jnp.exp2(-rise)
    total = (total + out[:, -8] + out[:, -7]) * shrink
    out = (out * shrink[:, None]).at[:, -8:].set(0)
    p = _probabilities(e - rise[:, None])
    return p, out, total, peak + rise / scale

  return inline(
    lambda *args: tuple(emit(*args)),
    model,
    arg_types=(plgpu.Layout.WGMMA_8BIT, _TILE, _TILE, _ROW, _ROW, _ROW),
    return_type=(
      _operand_of(e),
      _like(out),
      _like(total, layout=_ROW),
      _like(peak, layout=_ROW),
    ),
  )(p, e, out, total, peak, scale)


def normalise(out: jax.Array, total: jax.Array, factor: jax.Array) -> jax.Array:
  """factor * out / total of f32 out [64, H + 8], see `settle`: f32 [64, H]."""
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


def _operand_of(e):
  return plgpu.ShapeDtypeStruct(e.shape, _E4M3, plgpu.Layout.WGMMA_8BIT)


def _probabilities(e):
  """What `probabilities` computes."""
  blocks = jnp.exp2(e).reshape(e.shape[0], -1, 16)[..., KV_ORDER]
  return jnp.clip(blocks.reshape(e.shape), 0, 448).astype(_E4M3)


def _pack(p, shape):
  """Registers of f32 p [64, S] -> words of an e4m3 A operand."""
  words = []
  for index in np.ndindex(mgpu.WGMMA_LAYOUT_8BIT.registers_shape(shape)):
    pairs = [
      p[(index[0], 2 * index[1] + half, *index[2:])] for half in range(2)
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
    words.append(word)
  return words


def _operand(words, shape):
  """The e4m3 A operand that consists of these words."""
  layout = mgpu.WGMMA_LAYOUT_8BIT
  bytes_of = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
  e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
  out = np.empty(layout.registers_shape(shape), dtype=object)
  for index, word in zip(np.ndindex(out.shape), words):
    out[index] = mgpu.utils.bitcast(mgpu.utils.bitcast(word, bytes_of), e4m3)
  return array(out, layout)


def _rise(row, goal):
  """How far a row's largest exponent is above `goal`."""
  top = functools.reduce(arith.maxnumf, row)
  for distance in (1, 2):
    top = arith.maxnumf(top, mgpu.utils.shfl_bfly(top, distance))
  return arith.subf(top, _float(goal))


def _float(value):
  return arith.constant(ir.F32Type.get(), value)


def _fma(a, b, c):
  return llvm.intr_fma(a, b, c)


def _exp2(x):
  return assembly(ir.F32Type.get(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _reciprocal(x):
  return assembly(ir.F32Type.get(), [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
