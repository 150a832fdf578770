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
from jaxlib.mlir.dialects import arith, llvm

from fireq_jax.pallas import dequant
from fireq_jax.pallas.inline import array, elements, i32, vector
from fireq_jax.pallas.layouts import Encoding

SWIZZLED = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_THREADS = 512  # of all consumers
_BARRIER = 15  # a named barrier that Mosaic leaves alone
_WARP_AND_LANE = """
    .reg .b32 i, w, l;
    mov.u32 i, %tid.x;
    bfe.u32 w, i, 5, 2;
    and.b32 l, i, 31;"""


def consumers_barrier() -> None:
  """Waits for the threads of all consumers."""

  def emit(_):
    _run(f"bar.sync {_BARRIER}, {_THREADS};")

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
    fence.acq_rel.gpu;
    red.release.gpu.global.add.u32 [$0], 1;
    WAIT:
    ld.acquire.gpu.global.u32 n, [$0];
    setp.lt.u32 p, n, {arrivals};
    @p bra WAIT;
    JOIN:
    bar.sync {_BARRIER}, {_THREADS};
    }}"""
    _run(text, [_global(counters)], "l")

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
    _run(text, [_global(counters)], "l")

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(emit)(counters)


def weights(codes: Any, scale: Any, encoding: Encoding) -> jax.Array:
  """e4m3 [64, 128], operand A of wgmma: row 16 s + r is row r at block s.

  Args:
    codes: uint8 [4, 4, 256] in shared memory, 4 rows in each 256 bytes.
    scale: e4m3 [4, 16] in shared memory.
    encoding: of the codes.
  """
  text = f"""{{{_WARP_AND_LANE}
    .reg .b32 a, b;
    .reg .b16 x, y;
    shl.b32 a, w, 10;
    shl.b32 b, l, 4;
    add.u32 a, a, b;
    add.u32 a, a, $9;
    ld.shared.v4.b32 {{$0, $1, $2, $3}}, [a];
    ld.shared.v4.b32 {{$4, $5, $6, $7}}, [a + 512];
    shl.b32 a, w, 4;
    shr.u32 b, l, 2;
    add.u32 a, a, b;
    add.u32 a, a, $10;
    ld.shared.u8 x, [a];
    ld.shared.u8 y, [a + 8];
    shl.b16 y, y, 8;
    or.b16 x, x, y;
    cvt.rn.f16x2.e4m3x2 $8, x;
    }}"""

  def emit(_, codes, scale):
    struct = ir.Type.parse("!llvm.struct<(" + ", ".join(["i32"] * 9) + ")>")
    result = _run(
      text,
      [_shared(codes), _shared(scale)],
      "=&r," * 9 + "r,r",
      struct,
    )
    *words, scales = [llvm.extractvalue(i32(), result, (i,)) for i in range(9)]
    i16 = ir.IntegerType.get_signless(16)
    sixteen = arith.constant(i32(), ir.IntegerAttr.get(i32(), 16))
    tables = []
    for half in (scales, arith.shrui(scales, sixteen)):
      bits = arith.trunci(i16, half)
      tables.append(dequant.scaled_table(bits, encoding))
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
    arg_types=(plgpu.RefType(), plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(
      (64, 128), jnp.float8_e4m3fn, plgpu.Layout.WGMMA_8BIT
    ),
  )(emit)(codes, scale)


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
    _run(text, [_shared(target), word], "r,r")

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
    _run(text, [_shared(target), *bits], "r" + ",r" * len(bits))

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
    f32 [128], one a thread, of each row scale, then of the residual: thread
    16 t + r has row r of token t.
  """
  count = len(row_scales) + (residual is not None)
  loads = [
    f"add.u64 p, g, ${count + 1 + i}; @q ld.global.f32 ${i}, [p];"
    for i in range(len(row_scales))
  ]
  if residual is not None:
    n = residual.shape[1] * residual.shape[2]
    loads.append(f"""mad.lo.u32 b, t, {n}, k;
    mul.wide.u32 g, b, 2;
    add.u64 g, g, ${2 * count};
    @q ld.global.u16 h, [g];
    mov.b32 b, {{z, h}};
    mov.b32 ${count - 1}, b;""")
  zeros = " ".join(f"mov.f32 ${i}, 0f00000000;" for i in range(count))
  text = f"""{{
    .reg .pred q;
    .reg .b32 i, t, k, b;
    .reg .b64 g, p;
    .reg .b16 h, z;
    mov.b16 z, 0;
    mov.b16 h, 0;
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
    [row] = row.registers.flat
    f32 = ir.F32Type.get()
    struct = ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * count) + ")>")
    result = _run(
      text,
      [row, *map(_global, refs)],
      "=&f," * count + "r" + ",l" * len(refs),
      struct if count > 1 else f32,
    )
    values = [result]
    if count > 1:
      values = [llvm.extractvalue(f32, result, (i,)) for i in range(count)]
    return [_one_a_thread(value) for value in values]

  refs = row_scales + ([] if residual is None else [residual])
  struct = plgpu.ShapeDtypeStruct((128,), jnp.float32, _ONE_A_THREAD)
  return plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType() for _ in refs)),
    return_type=[struct] * count,
  )(emit)(row, *refs)


def nothing_fetched(halves: int, residual: Any) -> list[jax.Array]:
  """Zeros in place of what `fetch` returns, before the first tile."""
  zeros = jnp.zeros(128, jnp.float32)
  count = halves + (residual is not None)
  return [plgpu.layout_cast(zeros, _ONE_A_THREAD)] * count


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
    a_scale: f32 [8] in shared memory.
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
    lines.append("add.f32 y0, y0, $5;")
  registers = ", ".join(f"s{i}" for i in range(parts))
  text = f"""{{
    .reg .pred q;
    .reg .b32 i, t, k, a;
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
    operands = [_shared(sums), _shared(a_scale), row, _global(out), *values]
    _run(text, operands, "r,r,r,l" + ",f" * len(values))

  ref = plgpu.RefType()
  layouts = [_ONE_A_THREAD] * len(fetched)
  plgpu.inline_mgpu(
    arg_types=(ref, ref, plgpu.Layout.WG_SPLAT(()), ref, *layouts)
  )(emit)(sums, a_scale, row, out, *fetched)


_ONE_A_THREAD = plgpu.Layout.WG_STRIDED((128,), 1)


def _one_a_thread(value: Any) -> mgpu.FragmentedArray:
  registers = np.empty((1,), dtype=object)
  registers[0] = vector([value])
  return array(registers, mgpu.WGStridedFragLayout((128,), 1))


def _run(
  text: str, operands: Any = (), inputs: str = "", result: Any = None
) -> Any:
  """PTX that must stay where it is."""
  constraints = inputs + ("," if inputs else "") + "~{memory}"
  return llvm.inline_asm(
    result or ir.Type.parse("!llvm.void"),
    list(operands),
    text,
    constraints,
    has_side_effects=True,
  )


def _shared(ref: Any) -> Any:
  return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))


def _global(ref: Any) -> Any:
  i64 = ir.IntegerType.get_signless(64)
  return llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
