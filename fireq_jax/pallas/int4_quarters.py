"""Multiplies INT4 codes by x a quarter of a block at a time, to save registers.

Three consumers of 64 rows and 256 tokens have 160 registers a thread each, of
which 128 hold sums, and ptxas has 4 left for the A operand of wgmma: 32 columns,
a quarter of a block. So a quarter is multiplied, and waited for, before the
next gets these registers:

  words of codes, what they pick from tables | join | wgmma | wait | join | ...
                  of the next quarter:                 words, picks

While one consumer joins, the tensor core works for the other two. The next
block begins while the last quarter of the one before multiplies.

An instruction for 256 tokens would need more registers than a thread has at the
start of a kernel, which is what ptxas goes by, so there is one for each half.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fireq_jax.pallas import dequant
from fireq_jax.pallas.inline import (
  Inlined,
  array,
  assembly,
  elements,
  fixed_assembly,
  i32,
  inline,
  shared_address,
  vector,
)
from fireq_jax.pallas.layouts import BLOCK, Encoding

Sums = tuple[jax.Array, jax.Array]  # f32 [64, T / 2] of each half of the tokens
_COLUMNS = BLOCK // 4  # that an instruction multiplies
_HALVES = 2  # of the tokens
_ROWS = 2  # of a thread: r and r + 8, or row r of a gate and of up
_THREADS = 128
_WORD = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)
# That of wgmma's results with one value a register: pairs would be moved.
_SUMS = plgpu.Layout.TILED(
  plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))),
  warp_dims=(-8,),
  lane_dims=(-4, -3),
  vector_dim=-1,
)
# Offset of a thread's first word in rows of 64 bytes, swizzled: a warp has 16
# rows, or 8 of a gate and of an up projection.
PLACE_PTX = """{{
    .reg .b32 i, at;
    mov.u32 i, %tid.x;
    shl.b32 at, i, {shift};
    and.b32 $0, at, {warp:#x};
    shl.b32 at, i, 4;
    lop3.b32 $0, at, 0x1c0, $0, 0xea;
    shl.b32 at, i, 1;
    lop3.b32 $0, at, 0x30, $0, 0xea;
    shl.b32 at, i, 2;
    lop3.b32 $0, at, 0xc, $0, 0xea;
    }}"""
# Bits of an f16: the scale of the row of that word, or another.
_SCALE_PTX = """{{
    .reg .b32 at;
    .reg .b16 scale;
    shr.u32 at, $2, 6;
    add.u32 at, at, $1;
    ld.shared.u8 scale, [at + {offset}];
    cvt.rn.f16x2.e4m3x2 at, scale;
    cvt.u16.u32 $0, at;
    }}"""


def place_ptx(halves: int) -> str:
  shift = 5 if halves == 1 else 4
  return PLACE_PTX.format(shift=shift, warp=0x60 << shift)


def place(halves: int) -> jax.Array:
  """Of each thread, where it finds its codes, of one projection or two."""

  def emit():
    return _arrays([fixed_assembly(place_ptx(halves), [], "=&r", i32())])[0]

  return inline(
    emit,
    lambda: jnp.zeros(_THREADS, jnp.int32),
    arg_types=(),
    return_type=plgpu.ShapeDtypeStruct((_THREADS,), jnp.int32, _WORD),
  )()


def zeros(rows: int, tokens: int) -> Sums:
  """Sums of nothing."""
  half = jnp.zeros((rows, tokens // _HALVES), jnp.float32)
  half = plgpu.layout_cast(half, _SUMS)
  return half, half


def begin(
  place: jax.Array, codes: Any, scales: Any, encoding: Encoding
) -> list[jax.Array]:
  """What `multiply` needs for the first quarter of a block.

  Args:
    place: of `place`.
    codes: uint8 [H, 64 / H, 64] in shared memory, of 128 columns; H is 2 for a
      gate and an up projection, otherwise 1.
    scales: e4m3 [H, G, 64 / H] there, for G equal parts of the columns.
    encoding: of the codes.

  Returns:
    Of each of a thread's two rows the tables, a word of codes and its picks.
  """

  def emit(_, place, codes, scales):
    [place] = _words([place])
    tables = _tables(scales, place, 0, encoding)
    words = _load(codes, place, 0)
    picks = _pick(words, tables, encoding, place)
    return _arrays([*sum(tables, []), *words, *sum(picks, [])])

  struct = plgpu.ShapeDtypeStruct((_THREADS,), jnp.int32, _WORD)
  return plgpu.inline_mgpu(
    arg_types=(_WORD, _swizzled(BLOCK // 2), plgpu.RefType()),
    return_type=[struct] * sum(_sizes(encoding)),
  )(Inlined(emit, "begin", encoding))(place, codes, scales)


def multiply(
  sums: Sums,
  begun: list[jax.Array],
  x: Any,
  place: jax.Array,
  codes: Any,
  scales: Any,
  encoding: Encoding,
) -> Sums:
  """Adds e4m3(scale * code) x^T to sums, which must `wait` for it.

  Args:
    sums: of `zeros` or `wait`.
    begun: what `begin` gave of place, codes, scales and encoding.
    x: e4m3 [T, 128] in shared memory.
    place, codes, scales, encoding: see there.
  """

  def emit(_, first, second, begun, place, codes, scales, x):
    [place] = _words([place])
    flat = iter(_words(begun))
    tables, words, picks = (
      [[next(flat) for _ in range(size // _ROWS)] for _ in range(_ROWS)]
      for size in _sizes(encoding)
    )
    words = sum(words, [])
    groups = ir.MemRefType(scales.type).shape[1]
    values = [_values(half) for half in (first, second)]
    for start in range(0, BLOCK, _COLUMNS):
      weights = [
        dequant.join_word(word, picked, encoding)
        for word, picked in zip(words, picks)
      ]
      weights = [rows[i] for i in range(2) for rows in weights]
      values = _wgmma(values, weights, shared_address(x), start)
      after = start + _COLUMNS
      if after == BLOCK:
        break
      group, within = divmod(after * groups, BLOCK)
      if not within:
        tables = _tables(scales, place, group, encoding)
      words = _load(codes, place, after)
      picks = _pick(words, tables, encoding, place)
      values = _wait(values)
      words = [_not_before(v, word) for v, word in zip(values[0], words)]
    return tuple(_like(half, v) for half, v in zip((first, second), values))

  return plgpu.inline_mgpu(
    arg_types=(
      *[_SUMS] * _HALVES,
      [_WORD] * len(begun),
      _WORD,
      _swizzled(BLOCK // 2),
      plgpu.RefType(),
      _swizzled(BLOCK),
    ),
    return_type=_structs(sums),
  )(Inlined(emit, "multiply", encoding))(*sums, begun, place, codes, scales, x)


def wait(sums: Sums) -> Sums:
  """The sums when they are there."""

  def emit(*halves):
    values = _wait([_values(half) for half in halves])
    return tuple(_like(half, v) for half, v in zip(halves, values))

  return inline(
    emit,
    lambda *halves: halves,
    arg_types=(_SUMS,) * _HALVES,
    return_type=_structs(sums),
  )(*sums)


def whole(sums: Sums) -> jax.Array:
  """f32 [64, T]."""

  def emit(*halves):
    halves = [half.to_layout(mgpu.WGMMA_LAYOUT) for half in halves]
    registers = np.concatenate([half.registers for half in halves], axis=1)
    return array(registers, mgpu.WGMMA_LAYOUT)

  rows, tokens = sums[0].shape
  return inline(
    emit,
    lambda *halves: jnp.concatenate(halves, axis=1),
    arg_types=(_SUMS,) * _HALVES,
    return_type=plgpu.ShapeDtypeStruct(
      (rows, _HALVES * tokens), jnp.float32, plgpu.Layout.WGMMA
    ),
  )(*sums)


def _sizes(encoding):
  """How many words `begin` gives: of tables, of codes, of picks."""
  tables = len(dequant.CODES[encoding])
  return [2 * _ROWS * tables, _ROWS, 2 * _ROWS * tables]


def _swizzled(columns):
  return plgpu.RefType(
    (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns))
  )


def _structs(sums):
  struct = plgpu.ShapeDtypeStruct(sums[0].shape, jnp.float32, _SUMS)
  return (struct,) * _HALVES


def _second(ref, rows):
  """Elements from a thread's first row to its second: of `rows`, or a half."""
  halves = ir.MemRefType(ref.type).shape[0]
  strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
  return strides[0] if halves > 1 else rows


def _tables(scales, place, group, encoding):
  """Of the scales of a thread's rows."""
  (_, pitch, _), _ = ir.MemRefType(scales.type).get_strides_and_offset()
  i16 = ir.IntegerType.get_signless(16)
  operands = [shared_address(scales), place]
  tables = []
  for row in (0, _second(scales, 8)):
    text = _SCALE_PTX.format(offset=group * pitch + row)
    bits = fixed_assembly(text, operands, "=h,r,r", i16)
    tables.append(dequant.scaled_table(bits, encoding))
  return tables


def _load(codes, place, start):
  """A word of codes of each of a thread's rows, at these columns."""
  text = f"xor.b32 $0, $2, {start // 2}; add.u32 $0, $0, $1;"
  at = assembly(i32(), [shared_address(codes), place], text, "=&r,r,r")
  return [
    fixed_assembly(f"ld.shared.b32 $0, [$1 + {row}];", [at], "=r,r", i32())
    for row in (0, _second(codes, 8 * BLOCK // 2))
  ]


def _pick(words, tables, encoding, place):
  """Of each word, before what follows."""
  picks = [
    dequant.pick_word(word, table, encoding)
    for word, table in zip(words, tables)
  ]
  flat = [word for row in picks for word in row]
  # They might have to be stored, for all that ptxas knows.
  stores = "".join(
    f"@p st.shared.b32 [${len(flat) + 1}], ${i};" for i in range(len(flat))
  )
  text = f"{{ .reg .pred p; setp.ne.u32 p, ${len(flat)}, 0; {stores} }}"
  operands = [*flat, _zero(), place]
  fixed_assembly(text, operands, ",".join("r" * len(operands)))
  return picks


def _not_before(value, word):
  """The word, which ptxas takes to depend on an f32."""
  text = "lop3.b32 $0, $1, $2, $3, 0xea;"
  return assembly(i32(), [value, _zero(), word], text, "=r,f,r,r")


def _zero():
  """0, unknown to ptxas: no grid here has three dimensions."""
  return assembly(i32(), [], "mov.u32 $0, %ctaid.z;", "=r")


def _words(arrays):
  return [elements(array.registers.flat[0])[0] for array in arrays]


def _arrays(words):
  """Of one word a thread each."""
  layout = _WORD.to_mgpu()
  out = []
  for word in words:
    registers = np.empty(layout.registers_shape((_THREADS,)), object)
    registers.reshape(-1)[:] = [vector([word])]
    out.append(
      mgpu.FragmentedArray(
        _registers=registers, _layout=layout, _is_signed=True
      )
    )
  return out


def _values(half):
  return [v for register in half.registers.flat for v in elements(register)]


def _like(half, values):
  registers = np.empty_like(half.registers)
  registers.reshape(-1)[:] = [vector([value]) for value in values]
  return array(registers, half.layout)


def _wgmma(sums, weights, x, start):
  """Starts to add products of the columns at `start`."""
  count = len(sums[0])
  tokens = 2 * count  # of a half
  group = lambda first, n: ", ".join(f"${first + i}" for i in range(n))
  weights_at = 2 * _HALVES * count
  halves = [
    f"""
    add.s64 there, start, {(start + i * tokens * BLOCK) // 16};
    wgmma.mma_async.sync.aligned.m64n{tokens}k{_COLUMNS}.f32.e4m3.e4m3
      {{{group(i * count, count)}}}, {{{group(weights_at, len(weights))}}},
      there, p, 1, 1;"""
    for i in range(_HALVES)
  ]
  # Rows of 128 bytes, swizzled: 8 of them are 1024 bytes.
  descriptor = 1 << 30 | 8 * BLOCK // 16
  text = f"""{{
    .reg .pred p;
    .reg .b32 low;
    .reg .b64 start, there;
    setp.eq.b32 p, 0, 0;
    shr.u32 low, ${weights_at + len(weights)}, 4;
    and.b32 low, low, 0x3fff;
    mov.b64 start, {{low, {descriptor:#x}}};
    wgmma.fence.sync.aligned;{"".join(halves)}
    wgmma.commit_group.sync.aligned;
    }}"""
  return _on_sums(text, sums, [*weights, x])


def _wait(sums):
  return _on_sums("wgmma.wait_group.sync.aligned 0;", sums, [])


def _on_sums(text, sums, operands):
  """What PTX makes of sums, with other operands, which are words."""
  flat = [value for half in sums for value in half]
  kinds = ", ".join(["f32"] * len(flat))
  constraints = ["=f"] * len(flat) + [str(i) for i in range(len(flat))]
  constraints += ["r"] * len(operands)
  out = fixed_assembly(
    text,
    [*flat, *operands],
    ",".join(constraints),
    ir.Type.parse(f"!llvm.struct<({kinds})>"),
  )
  f32 = ir.F32Type.get()
  flat = [llvm.extractvalue(f32, out, (i,)) for i in range(len(flat))]
  return [flat[: len(sums[0])], flat[len(sums[0]) :]]
