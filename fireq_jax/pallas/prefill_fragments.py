"""Softmax of prefill attention on the registers of a warpgroup.

Thread 4g + t of a warp holds rows g and g + 8 of the warp's 16, and of every 8
columns the columns 2t and 2t + 1. An element costs two multiply-adds, an
exponential and half a conversion. Nothing compares elements: where one is too
large for e4m3 it saturates, which four codes at a time tell, and only then
peaks of rows move (`settle`).
"""

import functools
import math

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


def masked(e: jax.Array, last: jax.Array) -> jax.Array:
  """f32 e [64, S] with -inf in columns after the i32 last [64] of their row."""

  def emit(e, last):
    out = np.empty_like(e.registers)
    # Compared with constants, so that no registers hold numbers of columns.
    lane = mgpu.utils.thread_idx()
    pair = arith.muli(arith.remui(lane, constant(4)), constant(2))
    lasts = [
      arith.subi(elements(last.registers[0, 0, half, 0, 0])[0], pair)
      for half in range(2)
    ]
    for index, values in np.ndenumerate(e.registers):
      seen = [
        arith.cmpi(
          arith.CmpIPredicate.sle, constant(8 * index[1] + i), lasts[index[4]]
        )
        for i in range(2)
      ]
      values = [
        arith.select(ok, value, _float(-math.inf))
        for ok, value in zip(seen, elements(values))
      ]
      out[index] = vector(values)
    return array(out, mgpu.WGMMA_LAYOUT)

  def model(e, last):
    columns = jnp.arange(e.shape[1], dtype=last.dtype)
    return jnp.where(columns <= last[:, None], e, -jnp.inf)

  return inline(emit, model, arg_types=(_TILE, _ROW), return_type=_like(e))(
    e, last
  )


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
  peak: jax.Array,
  scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Raises the peaks of a warp's rows where one of its codes is saturated.

  Args:
    p: e4m3 [64, S], `probabilities` of e.
    e: f32 [64, S], `exponents`.
    out: f32 [64, N], sums weighted with 2 ** e of earlier tiles.
    peak: f32 [64].
    scale: f32 [64].

  Returns:
    p, out and peak with new peaks.
  """

  def emit(p, e, out, peak, scale):
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
    peaks, scales = (
      [elements(a.registers[0, 0, half, 0, 0])[0] for half in halves]
      for a in (peak, scale)
    )
    old = [*words, *out_of[0], *out_of[1], *peaks]
    branch = scf.IfOp(
      arith.cmpi(arith.CmpIPredicate.ne, any_full, constant(0)),
      [x.type for x in old],
      has_else=True,
    )
    with ir.InsertionPoint(branch.then_block):
      new_out, new_peaks = [], []
      lowered = np.empty_like(e.registers)
      for half in halves:
        rise = arith.maxnumf(_rise(_row(e, half), CENTRE), _float(0.0))
        shrink = _exp2(arith.negf(rise))
        new_out += [arith.mulf(x, shrink) for x in out_of[half]]
        new_peaks.append(_fma(rise, _reciprocal(scales[half]), peaks[half]))
        for i, pair in np.ndenumerate(e.registers):
          if i[4] == half:
            pair = [_exp2(arith.subf(x, rise)) for x in elements(pair)]
            lowered[i] = vector(pair)
      new_words = _pack(lowered, e.shape)
      scf.YieldOp([*new_words, *new_out, *new_peaks])
    # pyrefly: ignore[no-matching-overload]
    with ir.InsertionPoint(branch.else_block):
      scf.YieldOp(old)

    results = iter(branch.results)
    yield _operand([next(results) for _ in words], e.shape)
    registers = np.empty_like(out.registers)
    for half in halves:
      for i in np.ndindex(registers.shape):
        if i[4] == half:
          registers[i] = vector([next(results), next(results)])
    yield array(registers, mgpu.WGMMA_LAYOUT)
    registers = np.empty_like(peak.registers)
    for half in halves:
      registers[0, 0, half, 0, 0] = vector([next(results)])
    yield array(registers, mgpu.WGMMA_ROW_LAYOUT)

  def model(p, e, out, peak, scale):
    full = jnp.any(p.astype(jnp.float32) == 448, axis=1)
    full = jnp.repeat(jnp.any(full.reshape(4, 16), axis=1), 16)
    rise = jnp.maximum(jnp.max(e, axis=1) - CENTRE, 0)
    rise = jnp.where(full, rise, 0)
    p = _probabilities(e - rise[:, None])
    return p, out * jnp.exp2(-rise)[:, None], peak + rise / scale

  return inline(
    lambda *args: tuple(emit(*args)),
    model,
    arg_types=(plgpu.Layout.WGMMA_8BIT, _TILE, _TILE, _ROW, _ROW),
    return_type=(_operand_of(e), _like(out), _like(peak, layout=_ROW)),
  )(p, e, out, peak, scale)


def normalise(out: jax.Array, factor: jax.Array) -> jax.Array:
  """factor * out / total of f32 out [64, H + 8]: f32 [64, H].

  The last 8 columns add up to total.
  """
  head_dim = out.shape[1] - 8

  def emit(out, factor):
    registers = np.empty(
      mgpu.WGMMA_LAYOUT.registers_shape((64, head_dim)), dtype=object
    )
    for half in range(2):
      *columns, high, low = _row(out, half)
      (times,) = elements(factor.registers[0, 0, half, 0, 0])
      total = _of_quad(arith.addf, arith.addf(high, low))
      times = arith.mulf(times, _reciprocal(total))
      columns = [arith.mulf(x, times) for x in columns]
      for group in range(head_dim // 8):
        registers[0, group, 0, 0, half, 0, 0, 0, 0] = vector(
          columns[2 * group : 2 * group + 2]
        )
    return array(registers, mgpu.WGMMA_LAYOUT)

  def model(out, factor):
    return out[:, :-8] * (factor / jnp.sum(out[:, -8:], axis=1))[:, None]

  return inline(
    emit,
    model,
    arg_types=(_TILE, _ROW),
    return_type=plgpu.ShapeDtypeStruct((64, head_dim), jnp.float32, _TILE),
  )(out, factor)


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
  top = _of_quad(arith.maxnumf, functools.reduce(arith.maxnumf, row))
  return arith.subf(top, _float(goal))


def _of_quad(combine, x):
  """The four threads that hold a row together."""
  for distance in (1, 2):
    x = combine(x, mgpu.utils.shfl_bfly(x, distance))
  return x


def _float(value):
  return arith.constant(ir.F32Type.get(), value)


def _fma(a, b, c):
  return llvm.intr_fma(a, b, c)


def _exp2(x):
  return assembly(ir.F32Type.get(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _reciprocal(x):
  return assembly(ir.F32Type.get(), [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
