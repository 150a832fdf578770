"""INT4 codes in registers to tensor core operands, as inline PTX.

A thread of a warpgroup holds, for each of its rows and each 32 codes, one
32-bit word: the 8 codes of its own fragment of the wgmma A operand, because
`layouts` stored them in that order. So conversion moves no data between
threads. A nibble is a position in a table of 8 e4m3 values, and `prmt` looks
four of them up at once. What is looked up is then `join`ed with signs or high
bits, into registers that wgmma reads:

  sign-magnitude (codes -7..7), 7 instructions for 8 weights
    low 3 bits: |code|, looked up in the table of e4m3(scale * 0..7);
    bit 3 of nibble 2i + 1: sign of weight i, bit 3 of nibble 2i: sign of
    weight 4 + i, so that one mask moves four signs into four bytes.
  two's complement (codes -8..7), 12 instructions for 8 weights
    the low 3 bits are looked up in both halves of the 16-entry table
    e4m3(scale * -8..7), and bit 3 picks the half.

Without a scale the table holds the codes themselves, which e4m3 represents
exactly. Codes that never meet a scale need no table:

  subnormal (codes -7..7), 3 instructions for 8 weights
    bits 0-2 of byte i are |code| of weight i and bit 7 is its sign: the e4m3
    number code / 512. Bits 4-6 of the byte before and bit 3 hold weight 4 + i,
    and are in the same places after a rotation of the word by 4 bits.

For bf16 activations a nibble (code + 8) is the low mantissa of a bf16 in
[128, 144), from which 136 is subtracted: exact too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fireq_jax.pallas.inline import Inlined, array, inline
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
  "subnormal": (),
}
# What a nibble's low 3 bits pick from each table, and its high bit's part.
PICK_PTX = {
  "sign_magnitude": """{
    .reg .b32 m;
    and.b32 m, $2, 0x77777777;
    prmt.b32 $0, $3, $4, m;
    shr.u32 m, m, 16;
    prmt.b32 $1, $3, $4, m;
    }""",
  "twos_complement": """{
    .reg .b32 m;
    and.b32 m, $4, 0x77777777;
    prmt.b32 $0, $5, $6, m;
    prmt.b32 $2, $7, $8, m;
    shr.u32 m, m, 16;
    prmt.b32 $1, $5, $6, m;
    prmt.b32 $3, $7, $8, m;
    }""",
}
JOIN_PTX = {
  "sign_magnitude": """{
    .reg .b32 t;
    lop3.b32 $0, $3, $2, 0x80808080, 0xf8;
    shl.b32 t, $2, 4;
    lop3.b32 $1, $4, t, 0x80808080, 0xf8;
    }""",
  "twos_complement": """{
    .reg .b32 g;
    lop3.b32 g, $2, 0x88888888, 0x64206420, 0xea;
    shr.u32 g, g, 1;
    prmt.b32 $0, $3, $5, g;
    shr.u32 g, g, 16;
    prmt.b32 $1, $4, $6, g;
    }""",
  "subnormal": """{
    .reg .b32 t;
    and.b32 $0, $2, 0x87878787;
    shf.l.wrap.b32 t, $2, $2, 4;
    and.b32 $1, t, 0x87878787;
    }""",
}


def pick(
  codes: jax.Array, scales: list[jax.Array], encoding: Encoding
) -> list[jax.Array]:
  """The part of a conversion that wgmma need not wait for; see `join`.

  Args:
    codes: [R, C / 2] uint8.
    scales: [R] e4m3, one for each equal part of C, or none for exact codes.
    encoding: of the codes.

  Returns:
    What is looked up in each table, [R, C] e4m3.
  """
  if not CODES[encoding]:
    return []

  def emit(_, codes, *scales):
    tables = [_scaled_tables(scale, encoding) for scale in scales]
    exact = _exact_table(encoding)
    picked = _fragments(codes, len(CODES[encoding]))
    for index, word in _words(codes):
      table = exact
      if tables:
        group = index[1] * len(tables) // codes.registers.shape[1]
        table = tables[group][index[0], index[4]]
      _put(picked, index, pick_word(word, table, encoding))
    return [_e4m3(registers) for registers in picked]

  rows, half = codes.shape
  struct = plgpu.ShapeDtypeStruct((rows, 2 * half), jnp.float8_e4m3fn, _A8)
  return plgpu.inline_mgpu(
    arg_types=(_A8, *(_ROWS for _ in scales)),
    return_type=[struct] * len(CODES[encoding]),
  )(Inlined(emit, "pick", encoding))(codes, *scales)


def join(
  codes: jax.Array, picked: list[jax.Array], encoding: Encoding
) -> jax.Array:
  """e4m3(scale * code), [R, C], of what `pick` made of the same codes."""
  rows, half = codes.shape

  def emit(_, codes, *picked):
    i32 = ir.IntegerType.get_signless(32)
    [out] = _fragments(codes, 1)
    for index, word in _words(codes):
      parts = []
      for x in picked:
        for at in _two(index):
          quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
          bits = mgpu.utils.bitcast(x.registers[at], quad)
          parts.append(mgpu.utils.bitcast(bits, i32))
      _put([out], index, join_word(word, parts, encoding))
    return _e4m3(out)

  return plgpu.inline_mgpu(
    arg_types=(_A8,) * (1 + len(picked)),
    return_type=plgpu.ShapeDtypeStruct(
      (rows, 2 * half), jnp.float8_e4m3fn, _A8
    ),
  )(Inlined(emit, "join", encoding))(codes, *picked)


def exact_e4m3(codes: jax.Array, encoding: Encoding) -> jax.Array:
  """The codes times `unit` as e4m3: [R, C] of [R, C / 2] uint8."""
  return join(codes, pick(codes, [], encoding), encoding)


def unit(encoding: Encoding) -> float:
  """What `exact_e4m3` makes of a code of 1."""
  return 2**-9 if encoding == "subnormal" else 1.0


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

  rows, half = codes.shape
  return plgpu.inline_mgpu(
    arg_types=(_A8,),
    return_type=plgpu.ShapeDtypeStruct((rows, 2 * half), jnp.bfloat16, _A16),
  )(Inlined(emit, "biased", "biased"))(codes)


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


def _scaled_tables(scale, encoding):
  """{(64-row tile, row half): table words} of a thread's e4m3 scales."""
  tables = {}
  scale = scale.astype(ir.F16Type.get())
  for index, register in np.ndenumerate(scale.registers):
    bits = mgpu.utils.bitcast(register, ir.IntegerType.get_signless(16))
    tables[index[0], index[2]] = scaled_table(bits, encoding)
  return tables


def _exact_table(encoding):
  words = []
  for values in CODES[encoding]:
    table = np.asarray(values, jnp.float8_e4m3fn).view(np.uint32)
    words += [_i32(int(word)) for word in table]
  return words


def scaled_table(scale: Any, encoding: Encoding) -> list:
  """Words of the table of a scale, the bits of an f16."""
  return [
    word
    for values in CODES[encoding]
    for word in _asm(2, [scale], table_ptx(values), "h")
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


def look_up(word: Any, table: list, encoding: Encoding) -> list:
  """The 8 codes of a word as two vectors of 4 e4m3 values."""
  words = join_word(word, pick_word(word, table, encoding), encoding)
  return [_e4m3_vector(word) for word in words]


def pick_word(word: Any, table: list, encoding: Encoding) -> list:
  """What a word of 8 codes picks from a table; see `pick`."""
  return _asm(len(table), [word, *table], PICK_PTX[encoding])


def join_word(word: Any, picked: list, encoding: Encoding) -> list:
  """The 8 codes of a word as two words of e4m3 values; see `join`."""
  return _asm(2, [word, *picked], JOIN_PTX[encoding])


def _words(codes):
  """(index, word of 8 codes) of each register."""
  i32 = ir.IntegerType.get_signless(32)
  for index, register in np.ndenumerate(codes.registers):
    yield index, mgpu.utils.bitcast(register, i32)


def _two(index):
  """Where the 8 values of the codes at `index` are."""
  return [(index[0], 2 * index[1] + i, *index[2:]) for i in range(2)]


def _fragments(codes, count):
  """Registers for `count` e4m3 arrays, one value a code."""
  rows, half = codes.shape
  shape = mgpu.WGMMA_LAYOUT_8BIT.registers_shape((rows, 2 * half))
  return [np.empty(shape, dtype=object) for _ in range(count)]


def _put(arrays, index, words):
  """Words, two for each array, to where the codes at `index` are."""
  for i, word in enumerate(words):
    arrays[i // 2][_two(index)[i % 2]] = _e4m3_vector(word)


def _e4m3_vector(word):
  quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
  e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
  return mgpu.utils.bitcast(mgpu.utils.bitcast(word, quad), e4m3)


def _e4m3(registers):
  return mgpu.FragmentedArray(
    _registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=None
  )


def _asm(count, args, text, inputs=None):
  """PTX with outputs $0 and so on, which share no register with an input."""
  i32 = ir.IntegerType.get_signless(32)
  kinds = ", ".join(["i32"] * count)
  results = ir.Type.parse(f"!llvm.struct<({kinds})>")
  inputs = inputs or ",".join("r" * len(args))
  result: Any = llvm.inline_asm(results, args, text, "=&r," * count + inputs)
  return [llvm.extractvalue(i32, result, (i,)) for i in range(count)]


def _i32(value):
  i32 = ir.IntegerType.get_signless(32)
  return llvm.mlir_constant(
    ir.IntegerAttr.get(i32, value - (value >> 31 << 32))
  )
