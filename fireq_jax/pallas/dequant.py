"""INT4 codes in registers to tensor core operands, as inline PTX.

A thread of a warpgroup holds, for each of its rows and each 32 codes, one
32-bit word: the 8 codes of its own fragment of the wgmma A operand, because
`layouts` stored them in that order. So conversion moves no data between
threads. A nibble is a position in a table of 8 e4m3 values, and `prmt` looks
four of them up at once:

  sign-magnitude (codes -7..7), 7 instructions for 8 weights
    low 3 bits: |code|, looked up in the table of e4m3(scale * 0..7);
    bit 3 of nibble 2i + 1: sign of weight i, bit 3 of nibble 2i: sign of
    weight 4 + i, so that one mask moves four signs into four bytes.
  two's complement (codes -8..7), 12 instructions for 8 weights
    the low 3 bits are looked up in both halves of the 16-entry table
    e4m3(scale * -8..7), and bit 3 picks the half.

Without a scale the table holds the codes themselves, which e4m3 represents
exactly. For bf16 activations a nibble (code + 8) is the low mantissa of a bf16
in [128, 144), from which 136 is subtracted: exact too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from fireq_jax.pallas.inline import array, inline
from fireq_jax.pallas.layouts import Encoding

_A8 = plgpu.Layout.WGMMA_8BIT
_A16 = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
# Layout of [2, 32] in which a thread holds the same as of [64] in `_ROWS`.
PAIR = plgpu.Layout.TILED(
  plgpu.Tiling(((2, 32), (16,), (8,), (1,))),
  warp_dims=(-5, -4),
  lane_dims=(-2, plgpu.Replicated(4)),
  vector_dim=-1,
)
CODES = {
  "sign_magnitude": ((0, 1, 2, 3, 4, 5, 6, 7),),
  "twos_complement": (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (-8, -7, -6, -5, -4, -3, -2, -1),
  ),
}
LOOK_UP_PTX = {
  "sign_magnitude": """{
    .reg .b32 m, n, t;
    and.b32 m, $2, 0x77777777;
    prmt.b32 n, $3, $4, m;
    lop3.b32 $0, n, $2, 0x80808080, 0xf8;
    shr.u32 m, m, 16;
    prmt.b32 n, $3, $4, m;
    shl.b32 t, $2, 4;
    lop3.b32 $1, n, t, 0x80808080, 0xf8;
    }""",
  "twos_complement": """{
    .reg .b32 m, g, a, b;
    and.b32 m, $2, 0x77777777;
    lop3.b32 g, $2, 0x88888888, 0x64206420, 0xea;
    shr.u32 g, g, 1;
    prmt.b32 a, $3, $4, m;
    prmt.b32 b, $5, $6, m;
    prmt.b32 $0, a, b, g;
    shr.u32 m, m, 16;
    shr.u32 g, g, 16;
    prmt.b32 a, $3, $4, m;
    prmt.b32 b, $5, $6, m;
    prmt.b32 $1, a, b, g;
    }""",
}


@dataclasses.dataclass(frozen=True)
class Inlined:
  """Emits instructions; the rest tells a simulator what they compute."""

  emit: Callable[..., Any]
  kind: Literal["dequantize", "fence"]
  encoding: Encoding | None = None

  def __call__(self, *args):
    return self.emit(*args)


def scaled_e4m3(
  codes: jax.Array, scales: list[jax.Array], encoding: Encoding
) -> jax.Array:
  """e4m3(scale * code): [R, C] e4m3 of codes [R, C / 2] uint8.

  `scales` are [R] e4m3, one for each equal part of C.
  """

  def emit(_, codes, *scales):
    tables = [_scaled_tables(scale, encoding) for scale in scales]

    def table(index):
      group = index[1] * len(tables) // codes.registers.shape[1]
      return tables[group][index[0], index[4]]

    return _look_up(codes, table, encoding)

  return _inline(emit, codes, *scales, encoding=encoding)


def exact_e4m3(codes: jax.Array, encoding: Encoding) -> jax.Array:
  """The codes themselves as e4m3: [R, C] of [R, C / 2] uint8."""

  def emit(_, codes):
    words = []
    for values in CODES[encoding]:
      table = np.asarray(values, jnp.float8_e4m3fn).view(np.uint32)
      words += [_i32(int(word)) for word in table]
    return _look_up(codes, lambda _: words, encoding)

  return _inline(emit, codes, encoding=encoding)


def exact_bf16(codes: jax.Array) -> jax.Array:
  """The codes themselves as bf16: [R, C] of biased codes [R, C / 2] uint8."""

  def emit(_, codes):
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    rows, half = codes.shape
    layout = mgpu.WGMMA_LAYOUT
    out = np.empty(layout.registers_shape((rows, 2 * half)), dtype=object)
    for index, register in np.ndenumerate(codes.registers):
      word = mgpu.utils.bitcast(register, i32)
      for i in range(4):
        value: Any = llvm.inline_asm(i32, [word], bf16_ptx(i), "=r,r")
        at = (index[0], 4 * index[1] + i, *index[2:])
        out[at] = mgpu.utils.bitcast(value, pair)
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

  return _inline(emit, codes, encoding="biased")


def flatten_pair(x: jax.Array) -> jax.Array:
  """[2, 32] in layout `PAIR` -> [64], one value a row."""

  def emit(x):
    shape = mgpu.WGMMA_ROW_LAYOUT.registers_shape((64,))
    return array(x.registers.reshape(shape), mgpu.WGMMA_ROW_LAYOUT)

  return inline(
    emit,
    lambda x: x.reshape(64),
    arg_types=(PAIR,),
    return_type=plgpu.ShapeDtypeStruct((64,), x.dtype, _ROWS),
  )(x)


def bf16_ptx(i: int) -> str:
  """PTX: $0 holds the two bf16 codes at nibbles i and 4 + i of $1."""
  return f"""{{
    .reg .b32 t, one, bias;
    mov.b32 one, 0x3F803F80;
    mov.b32 bias, 0xC308C308;
    shr.u32 t, $1, {4 * i};
    lop3.b32 t, t, 0x000F000F, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, t, one, bias;
    }}"""


def fence_proxy_async() -> None:
  """Orders reads of shared memory before later TMA writes, in one warp."""

  def emit(_):
    nvvm.fence_proxy(
      nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
    )

  plgpu.inline_mgpu()(Inlined(emit, "fence"))()


def _inline(emit, codes, *scales, encoding):
  """Calls `emit` on fragments."""
  rows, half = codes.shape
  dtype, layout = jnp.float8_e4m3fn, _A8
  if encoding == "biased":
    dtype, layout = jnp.bfloat16, _A16
  return plgpu.inline_mgpu(
    arg_types=(_A8, *(_ROWS for _ in scales)),
    return_type=plgpu.ShapeDtypeStruct((rows, 2 * half), dtype, layout),
  )(Inlined(emit, "dequantize", encoding))(codes, *scales)


def _scaled_tables(scale, encoding):
  """{(64-row tile, row half): table words} of a thread's e4m3 scales."""
  tables = {}
  scale = scale.astype(ir.F16Type.get())
  for index, register in np.ndenumerate(scale.registers):
    bits = mgpu.utils.bitcast(register, ir.IntegerType.get_signless(16))
    tables[index[0], index[2]] = scaled_table(bits, encoding)
  return tables


def scaled_table(scale: Any, encoding: Encoding) -> list:
  """Words of the table of a scale, the bits of an f16."""
  return [
    word
    for values in CODES[encoding]
    for word in _asm2([scale], table_ptx(values), "h")
  ]


def table_ptx(values: tuple[int, ...]) -> str:
  """PTX: words $0, $1 of e4m3(scale * 8 values); the scale is $2, f16.

  f16 holds the products exactly: 4 significant bits of scale, 4 of a value.
  """
  a, b, c, d = np.asarray(values, np.float16).view(np.uint32)
  return f"""{{
    .reg .b32 s, p;
    .reg .b16 low, high;
    mov.b32 s, {{$2, $2}};
    mov.b32 p, 0x{a:08X};
    mul.rn.f16x2 p, s, p;
    cvt.rn.satfinite.e4m3x2.f16x2 low, p;
    mov.b32 p, 0x{b:08X};
    mul.rn.f16x2 p, s, p;
    cvt.rn.satfinite.e4m3x2.f16x2 high, p;
    mov.b32 $0, {{low, high}};
    mov.b32 p, 0x{c:08X};
    mul.rn.f16x2 p, s, p;
    cvt.rn.satfinite.e4m3x2.f16x2 low, p;
    mov.b32 p, 0x{d:08X};
    mul.rn.f16x2 p, s, p;
    cvt.rn.satfinite.e4m3x2.f16x2 high, p;
    mov.b32 $1, {{low, high}};
    }}"""


def _look_up(codes, table, encoding):
  """Replaces each word of 8 codes by two words of 4 e4m3 values."""
  i32 = ir.IntegerType.get_signless(32)
  rows, half = codes.shape
  layout = mgpu.WGMMA_LAYOUT_8BIT
  out = np.empty(layout.registers_shape((rows, 2 * half)), dtype=object)
  for index, register in np.ndenumerate(codes.registers):
    word = mgpu.utils.bitcast(register, i32)
    for i, value in enumerate(look_up(word, table(index), encoding)):
      out[(index[0], 2 * index[1] + i, *index[2:])] = value
  return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)


def look_up(word: Any, table: list, encoding: Encoding) -> list:
  """The 8 codes of a word as two vectors of 4 e4m3 values."""
  quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
  e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
  args = [word, *table]
  values = _asm2(args, LOOK_UP_PTX[encoding], ",".join("r" * len(args)))
  return [
    mgpu.utils.bitcast(mgpu.utils.bitcast(value, quad), e4m3)
    for value in values
  ]


def _asm2(args, text, inputs):
  """PTX with outputs $0 and $1, which share no register with an input."""
  i32 = ir.IntegerType.get_signless(32)
  pair = ir.Type.parse("!llvm.struct<(i32, i32)>")
  result: Any = llvm.inline_asm(pair, args, text, f"=&r,=&r,{inputs}")
  return [llvm.extractvalue(i32, result, (i,)) for i in range(2)]


def _i32(value):
  i32 = ir.IntegerType.get_signless(32)
  return llvm.mlir_constant(
    ir.IntegerAttr.get(i32, value - (value >> 31 << 32))
  )
