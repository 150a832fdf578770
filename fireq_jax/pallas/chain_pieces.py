"""What single threads do in `decode_chain`, as inline PTX.

Thread i of a consumer is lane i % 32 of warp i / 32. In a quad of lanes t is
lane % 4, and g is lane / 4.
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
  ONE_A_THREAD,
  array,
  elements,
  fixed_assembly,
  global_address,
  i32,
  one_a_thread,
  run_words,
  shared_address,
  vector,
)
from fireq_jax.pallas.layouts import Encoding

SWIZZLED = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_WARP_AND_LANE = """
    .reg .b32 i, w, l;
    mov.u32 i, %tid.x;
    bfe.u32 w, i, 5, 2;
    and.b32 l, i, 31;"""


def load_blocks(
  ref: Any, token: int, first: jax.Array, layout: Any
) -> jax.Array:
  """Loads 4 blocks of a row, with zeros for those beyond its end.

  Args:
    ref: bf16 [T, C / 128, 128] in global memory.
    token: the row.
    first: the first block.
    layout: where warp s has block s and lane l its channels 4 l .. + 3.

  Returns:
    bf16 [4, 128].
  """
  blocks = ref.shape[1]
  text = f"""{{{_WARP_AND_LANE}
    .reg .pred p;
    .reg .b64 a;
    add.u32 w, w, $3;
    setp.lt.u32 p, w, {blocks};
    shl.b32 w, w, 5;
    add.u32 w, w, l;
    mul.wide.u32 a, w, 8;
    add.u64 a, a, $2;
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    @p ld.global.v2.b32 {{$0, $1}}, [a + {token * blocks * 256}];
    }}"""

  def emit(_, ref, first):
    operands = [global_address(ref), *first.registers.flat]
    words = vector(run_words(2, text, operands, "l,r"))
    quad = ir.VectorType.get((4,), ir.BF16Type.get())
    registers = np.empty(layout.to_mgpu().registers_shape((4, 128)), object)
    registers.fill(mgpu.utils.bitcast(words, quad))  # one
    return array(registers, layout.to_mgpu())

  return plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
    return_type=plgpu.ShapeDtypeStruct((4, 128), jnp.bfloat16, layout),
  )(emit)(ref, first)


def fill_tables(tables: Any, encoding: Encoding) -> None:
  """Writes the table of every scale; each warpgroup writes them all.

  Args:
    tables: i32 [128, 2 or 4] in shared memory, by the bits of the scale.
    encoding: of the codes; the table of "sign_magnitude" begins the other.
  """

  def emit(_, tables):
    bits: Any = llvm.inline_asm(
      ir.IntegerType.get_signless(16),
      [],
      """{
      .reg .b32 i;
      .reg .b16 x, y;
      mov.u32 i, %tid.x;
      and.b32 i, i, 127;
      mov.b32 {x, y}, i;
      cvt.rn.f16x2.e4m3x2 i, x;
      mov.b32 {$0, y}, i;
      }""",
      "=h",
    )
    table = dequant.scaled_table(bits, encoding)
    words = ", ".join(f"${n + 1}" for n in range(len(table)))
    text = f"""{{{_WARP_AND_LANE}
    and.b32 i, i, 127;
    mad.lo.u32 i, i, {4 * len(table)}, $0;
    st.shared.v{len(table)}.b32 [i], {{{words}}};
    }}"""
    operands = [shared_address(tables), *table]
    fixed_assembly(text, operands, "r" + ",r" * len(table))

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(emit)(tables)


def load_weights(
  codes: Any, scale: Any, tables: Any, encoding: Encoding
) -> list[jax.Array]:
  """Loads what a thread needs for `weights`.

  Args:
    codes: uint8 [4, 4, 256] in shared memory, 4 rows in each 256 bytes.
    scale: e4m3 [4, 16] in shared memory.
    tables: written by `fill_tables`.
    encoding: of the codes.

  Returns:
    i32 [128] each, one a thread: 8 words of codes, and the tables of 2 scales.
  """
  size = 2 * len(dequant.CODES[encoding])
  words = 8 + 2 * size
  row = 4 * tables.shape[1]
  outs = [
    ", ".join(f"${8 + half * size + n}" for n in range(size))
    for half in range(2)
  ]
  text = f"""{{{_WARP_AND_LANE}
    .reg .b32 a, b, c;
    shl.b32 a, w, 4;
    shr.u32 b, l, 2;
    add.u32 a, a, b;
    add.u32 a, a, ${words + 1};
    ld.shared.u8 b, [a];
    ld.shared.u8 c, [a + 8];
    shl.b32 a, w, 10;
    shl.b32 l, l, 4;
    add.u32 a, a, l;
    add.u32 a, a, ${words};
    ld.shared.v4.b32 {{$0, $1, $2, $3}}, [a];
    ld.shared.v4.b32 {{$4, $5, $6, $7}}, [a + 512];
    mad.lo.u32 b, b, {row}, ${words + 2};
    mad.lo.u32 c, c, {row}, ${words + 2};
    ld.shared.v{size}.b32 {{{outs[0]}}}, [b];
    ld.shared.v{size}.b32 {{{outs[1]}}}, [c];
    }}"""

  def emit(_, *refs):
    operands = [*map(shared_address, refs)]
    return [*map(one_a_thread, run_words(words, text, operands, "r,r,r"))]

  struct = plgpu.ShapeDtypeStruct((128,), jnp.int32, ONE_A_THREAD)
  return plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),) * 3, return_type=[struct] * words
  )(emit)(codes, scale, tables)


def weights(loaded: list[jax.Array], encoding: Encoding) -> jax.Array:
  """e4m3 [64, 128], operand A of wgmma: row 16 s + r is row r at block s.

  Args:
    loaded: by `load_weights`.
    encoding: of the codes.
  """

  def emit(_, *loaded):
    words = [elements(x.registers[0])[0] for x in loaded]
    tables = words[8 : len(words) // 2 + 4], words[len(words) // 2 + 4 :]
    layout = mgpu.WGMMA_LAYOUT_8BIT
    out = np.empty(layout.registers_shape((64, 128)), dtype=object)
    flat = out.reshape(8, 2)
    for half in range(2):
      for step in range(4):
        word = words[4 * half + step]
        pair = dequant.look_up(word, tables[half], encoding)
        flat[2 * step, half], flat[2 * step + 1, half] = pair
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

  return plgpu.inline_mgpu(
    arg_types=(ONE_A_THREAD,) * len(loaded),
    return_type=plgpu.ShapeDtypeStruct(
      (64, 128), jnp.float8_e4m3fn, plgpu.Layout.WGMMA_8BIT
    ),
  )(emit)(*loaded)


def store_activations(
  codes: jax.Array, target: Any, token: int, padded: int, layout: Any
) -> None:
  """Stores codes of 4 blocks of one token as rows of operand B of wgmma.

  Lane l of warp s has channels 4 l .. + 3 of block s. They go to the place
  where `weights` has that channel: unit 8 t + 4 h + c of a row is unit
  8 c + 4 h + t of the operand, with a unit of 4 channels.

  Args:
    codes: e4m3 [4, 128].
    target: e4m3 [4 * padded, 128] in shared memory, swizzled.
    token: row s * padded + token takes block s.
    padded: rows of a block.
    layout: of codes.
  """
  text = f"""{{{_WARP_AND_LANE}
    .reg .b32 j, a, b, c;
    mad.lo.u32 j, w, {padded}, {token};
    shr.u32 a, j, 3;
    shl.b32 a, a, 10;
    and.b32 j, j, 7;
    shl.b32 b, j, 7;
    add.u32 a, a, b;
    and.b32 c, l, 3;
    shl.b32 c, c, 1;
    bfe.u32 b, l, 2, 1;
    add.u32 c, c, b;
    xor.b32 c, c, j;
    shl.b32 c, c, 4;
    add.u32 a, a, c;
    shr.u32 b, l, 3;
    shl.b32 b, b, 2;
    add.u32 a, a, b;
    add.u32 a, a, $0;
    st.shared.b32 [a], $1;
    }}"""

  def emit(_, codes, target):
    [register] = codes.registers.flat
    quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    word = mgpu.utils.bitcast(mgpu.utils.bitcast(register, quad), i32())
    fixed_assembly(text, [shared_address(target), word], "r,r")

  plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(SWIZZLED)))(emit)(
    codes, target
  )


def store_sums(acc: jax.Array, target: Any, padded: int) -> None:
  """Stores the block diagonal of a consumer's product.

  Args:
    acc: f32 [64, 4 * padded]: warp s needs columns s * padded to + padded.
    target: f32 [4, padded, 16] in shared memory.
    padded: tokens.
  """
  groups = padded // 2  # of 8 columns
  picks = []
  for j in range(4):
    value = f"${1 + j}"
    for group in range(1, groups):
      first = 8 * group // padded  # warp whose columns start in the group
      picks.append(f"setp.ge.u32 p, w, {first};")
      picks.append(f"selp.b32 v{j}, ${1 + 4 * group + j}, {value}, p;")
      value = f"v{j}"
    if groups == 1:
      picks.append(f"mov.b32 v{j}, {value};")
  text = f"""{{{_WARP_AND_LANE}
    .reg .pred p;
    .reg .b32 t, f, a, g, v0, v1, v2, v3;
    {" ".join(picks)}
    mul.lo.u32 f, w, {padded};
    and.b32 f, f, 7;
    shr.u32 f, f, 1;
    and.b32 t, l, 3;
    sub.u32 t, t, f;
    shr.u32 g, l, 2;
    mul.lo.u32 a, w, {padded};
    shl.b32 f, t, 1;
    add.u32 a, a, f;
    shl.b32 a, a, 4;
    add.u32 a, a, g;
    shl.b32 a, a, 2;
    add.u32 a, a, $0;
    setp.lt.u32 p, t, {padded // 2};
    @p st.shared.b32 [a], v0;
    @p st.shared.b32 [a + 64], v1;
    @p st.shared.b32 [a + 32], v2;
    @p st.shared.b32 [a + 96], v3;
    }}"""

  def emit(_, acc, target):
    values = [v for register in acc.registers.flat for v in elements(register)]
    bits = [mgpu.utils.bitcast(value, i32()) for value in values]
    fixed_assembly(
      text, [shared_address(target), *bits], "r" + ",r" * len(bits)
    )

  plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(emit)(
    plgpu.layout_cast(acc, plgpu.Layout.WGMMA), target
  )


def fetch(
  row_scales: list, residual: Any, row: jax.Array, *, tokens: int
) -> list[jax.Array]:
  """Loads what `finish` needs of a tile, well before it is needed.

  Args:
    row_scales: f32 [N] in global memory, starting at each half.
    residual: bf16 [T, n / 128, 128] to be added, or None.
    row: the first row of the tile.
    tokens: T.

  Returns:
    f32 [128], one a thread, of each row scale, then 32 bits that hold the
    residual: thread 16 t + r has row r of token t. `finish` is the first to
    touch them, so that nothing waits for what is on its way.
  """
  count = len(row_scales) + (residual is not None)
  loads = [
    f"add.u64 p, g, ${count + 1 + i}; @q ld.global.b32 ${i}, [p];"
    for i in range(len(row_scales))
  ]
  if residual is not None:
    n = residual.shape[1] * residual.shape[2]
    loads.append(f"""mad.lo.u32 b, t, {n}, k;
    mul.wide.u32 g, b, 2;
    add.u64 g, g, ${2 * count};
    @q ld.global.u16 ${count - 1}, [g];""")
  zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
  text = f"""{{
    .reg .pred q;
    .reg .b32 i, t, k, b;
    .reg .b64 g, p;
    {zeros}
    mov.u32 i, %tid.x;
    bfe.u32 t, i, 4, 3;
    and.b32 k, i, 15;
    add.u32 k, k, ${count};
    setp.lt.u32 q, t, {tokens};
    mul.wide.u32 g, k, 4;
    {" ".join(loads)}
    }}"""

  def emit(_, row, *refs):
    operands = [*row.registers.flat, *map(global_address, refs)]
    values = run_words(count, text, operands, "r" + ",l" * len(refs))
    f32 = ir.F32Type.get()
    return [one_a_thread(mgpu.utils.bitcast(x, f32)) for x in values]

  refs = row_scales + ([] if residual is None else [residual])
  struct = plgpu.ShapeDtypeStruct((128,), jnp.float32, ONE_A_THREAD)
  return plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType() for _ in refs)),
    return_type=[struct] * count,
  )(emit)(row, *refs)


def nothing_fetched(halves: int, residual: Any) -> list[jax.Array]:
  """Zeros in place of what `fetch` returns, before the first tile."""
  zeros = jnp.zeros(128, jnp.float32)
  count = halves + (residual is not None)
  return [plgpu.layout_cast(zeros, ONE_A_THREAD)] * count


def finish(
  sums: Any,
  a_scale: Any,
  fetched: list[jax.Array],
  out: Any,
  row: jax.Array,
  *,
  halves: int,
  tokens: int,
  padded: int,
) -> None:
  """Adds up the sums of a tile and stores 16 rows of the result.

  Args:
    sums: f32 [halves, 16, padded, 16] in shared memory.
    a_scale: f32 [T] in shared memory, or longer.
    fetched: what `fetch` returned for the tile.
    out: bf16 [T, n / 128, 128].
    row: the first row.
    halves: 2 for a gate and an up projection, else 1.
    tokens: T.
    padded: tokens in `sums`.
  """
  n = out.shape[1] * out.shape[2]
  parts = 16
  lines = []
  for half in range(halves):
    for part in range(parts):
      at = 64 * padded * (parts * half + part)
      lines.append(f"ld.shared.f32 s{part}, [a + {at}];")
    width = parts
    while width > 1:
      width //= 2
      lines += [f"add.f32 s{i}, s{i}, s{i + width};" for i in range(width)]
    lines.append(f"mul.f32 s0, s0, ${4 + half}; mul.f32 y{half}, s0, x;")
  if halves == 2:
    lines.append("""mul.f32 r, y0, 0fBFB8AA3B;
    ex2.approx.ftz.f32 r, r;
    add.f32 r, r, 0f3F800000;
    div.full.f32 y0, y0, r;
    mul.f32 y0, y0, y1;""")
  elif len(fetched) > halves:
    lines.append("mov.b32 b, $5; shl.b32 b, b, 16;")
    lines.append("mov.b32 r, b; add.f32 y0, y0, r;")
  registers = ", ".join(f"s{i}" for i in range(parts))
  text = f"""{{
    .reg .pred q;
    .reg .b32 i, t, k, a, b;
    .reg .b64 o;
    .reg .b16 h;
    .reg .f32 {registers};
    .reg .f32 r, x, y0, y1;
    mov.u32 i, %tid.x;
    bfe.u32 t, i, 4, 3;
    and.b32 k, i, 15;
    setp.ge.u32 q, t, {tokens};
    @q bra DONE;
    shl.b32 a, t, 2;
    add.u32 a, a, $1;
    ld.shared.f32 x, [a];
    shl.b32 a, t, 4;
    add.u32 a, a, k;
    shl.b32 a, a, 2;
    add.u32 a, a, $0;
    {" ".join(lines)}
    mad.lo.u32 a, t, {n}, k;
    add.u32 a, a, $2;
    mul.wide.u32 o, a, 2;
    add.u64 o, o, $3;
    cvt.rn.bf16.f32 h, y0;
    st.global.b16 [o], h;
    DONE:
    }}"""

  def emit(_, sums, a_scale, row, out, *fetched):
    [row] = row.registers.flat
    values = [elements(x.registers[0])[0] for x in fetched]
    operands = [
      shared_address(sums),
      shared_address(a_scale),
      row,
      global_address(out),
      *values,
    ]
    fixed_assembly(text, operands, "r,r,r,l" + ",f" * len(values))

  ref = plgpu.RefType()
  layouts = [ONE_A_THREAD] * len(fetched)
  plgpu.inline_mgpu(
    arg_types=(ref, ref, plgpu.Layout.WG_SPLAT(()), ref, *layouts)
  )(emit)(sums, a_scale, row, out, *fetched)
