"""Products of INT4 keys and values with mma.sync, each warp by itself.

A decode step multiplies every cached code by a few queries, so it is bound by
bytes; what matters is how few instructions stand between a cache word and the
tensor core. Here a word holds exactly the 8 codes of the thread that loads it,
conversion takes 5 or 7 integer instructions for 8 codes, and no warp ever waits
for another. Operands are swapped: tokens (for scores) and channels (for values)
are the 16 rows of m16n8k16, the query rows its 8 columns.

Thread 4g + t of warp w (g in 0..7, t in 0..3) holds, of 128 tokens:

  K words   tokens 32w + 4g .. + 3, channels t * H / 4 .. (t + 1) * H / 4
  scores    tokens 32w + 4g .. + 3, query rows 2t, 2t + 1
  V words   tokens 32w + 8t .. + 7, channels 32v + 4g .. + 3 for each v
  outputs   query rows 2t, 2t + 1, channels 32v + 4g .. + 3, warp w's tokens

From scores to the second product, rows of probabilities become columns:
`movmatrix` transposes 8 x 8 blocks inside the warp.

Nibbles become bf16 by `(word >> 4 i) & 0x000f000f ^ 0x43084308`: two's
complement codes i and i + 4, plus 136, as the low mantissa bits of [128, 144).
The caller subtracts 136 times the sum of the other operand.

Keys of e4m3 queries become f16, whose mantissa holds two nibbles, so that one
shift by 8 does: `word & 0x000f000f ^ 0x00080008` are codes plus 8 in units of
2^-24 (small numbers have no leading one), `word & 0x00f000f0 ^ 0x00800080` the
next ones, times 16, by which the queries are divided. Both are exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from fireq_jax.pallas.inline import (
  array,
  assembly,
  constant,
  elements,
  i32,
  inline,
  vector,
)
from fireq_jax.pallas.kv_layout import unpack_values, unpack_words

BIAS = 136
TOKENS = 128  # tokens a warpgroup takes at a time: 32 a warp
ROWS = 8  # query rows of one product


def _layout(tiling, warps, lanes, replicated_warps=False):
  return plgpu.Layout.TILED(
    plgpu.Tiling(tiling),
    warp_dims=(plgpu.Replicated(4) if replicated_warps else warps,),
    lane_dims=lanes,
    vector_dim=-1,
  )


# [tokens, ROWS], and what is the same for all rows or for all tokens.
SCORES = _layout(((128, 8), (32, 8), (4, 8), (2,)), -7, (-5, -2))
PER_TOKEN = SCORES.reduce(1)
PER_ROW = SCORES.reduce(0)
# [4 * ROWS, H]: outputs, one copy a warp; [4 * ROWS]: a number for each.
OUTPUTS = _layout(((32, 32), (8, 32), (2, 4)), -6, (-3, -4))
STATS = OUTPUTS.reduce(1)


def key_words(head_dim: int):
  """Layout of K words of 128 n tokens, in rows of 128 words."""
  words = head_dim // 8  # of a token
  rows = words  # of 128 tokens
  tiling = (
    (rows, 128),
    (rows // 4, 128),
    (4 * words,),
    (words,),
    (words // 4,),
  )
  return _layout(tiling, -7, (-5, -4, -2))


def value_words(head_dim: int):
  """Layout of V words [tokens / 32, H / 32, 128]."""
  return _layout(((4, head_dim // 32, 128), (4,)), -4, (-2,))


def queries(head_dim: int):
  """Layout of queries [ROWS, H], the same in all warps."""
  tiling = ((8, head_dim), (head_dim // 4,), (8,))
  return _layout(tiling, None, (-4, -3), replicated_warps=True)


def key_unit(dtype: Any) -> float:
  """The unit of `key_products` with queries of `dtype`, bf16 or f16."""
  return 2.0**24 if dtype == jnp.float16 else 1.0


def key_products(keys: jax.Array, q: jax.Array, start: jax.Array) -> jax.Array:
  """start + (keys + bias) . q / `key_unit` of every token and query row.

  The bias is what the keys of zero words give.

  Args:
    keys: uint32 [tokens * H / 1024, 128], layout `key_words`.
    q: [ROWS, H], layout `queries`: bf16, or f16 with at most 4 bits each.
    start: f32 [tokens, ROWS], layout `SCORES`.

  Returns:
    f32 [tokens, ROWS], layout `SCORES`.
  """
  head_dim = q.shape[1]
  words = head_dim // 8
  tokens = keys.shape[0] * 128 // words
  unit = key_unit(q.dtype)
  bias = BIAS if unit == 1 else 8

  def emit(keys, q, start):
    zero = arith.constant(ir.F32Type.get(), 0.0)
    f16 = q.mlir_dtype == ir.F16Type.get()
    kind, operands = ("f16", _small) if f16 else ("bf16", _pairs)
    b = {
      (w, i): _halves(q.registers[0, 0, 0, 0, w, 0], i)
      for w, i in np.ndindex(words // 4, 4)
    }
    if f16:  # codes with odd numbers come out 16 times as large
      b = {(w, i): _sixteenth(x) if i % 2 else x for (w, i), x in b.items()}
    layout = _tiled(SCORES)
    out = np.empty(layout.registers_shape((tokens, ROWS)), dtype=object)
    for block, half in np.ndindex(tokens // TOKENS, 2):
      token_words = [
        elements(keys.registers[block, 0, 0, 0, 0, 0, 2 * half + i, 0, 0])
        for i in range(2)
      ]
      places = [(block, 0, 0, 0, 0, 0, 2 * half + i, 0, 0) for i in range(2)]
      # Two sums, so that products wait less for one another.
      c = [[x for at in places for x in elements(start.registers[at])]]
      c.append([zero] * 4)
      for w, step in np.ndindex(words // 4, 2):
        nibbles = (2 * step, 2 * step + 1)
        a = [operands(token[w], step) for token in token_words]
        a = [pair[i] for i in range(2) for pair in a]
        c[step] = _mma(a, [b[w, i] for i in nibbles], c[step], kind)
      c = [arith.addf(x, y) for x, y in zip(*c)]
      for i, at in enumerate(places):
        out[at] = vector(c[2 * i : 2 * i + 2])
    return array(out, layout)

  def model(keys, q, start):
    codes = unpack_words(keys).reshape(tokens, head_dim)
    codes = codes.astype(jnp.float32) + float(bias)
    return start + codes @ q.astype(jnp.float32).T / unit

  return inline(
    emit,
    model,
    arg_types=(key_words(head_dim), queries(head_dim), SCORES),
    return_type=plgpu.ShapeDtypeStruct((tokens, ROWS), jnp.float32, SCORES),
  )(keys, q, start)


def value_products(
  acc: jax.Array, p: jax.Array, values: jax.Array
) -> jax.Array:
  """acc + sum over each warp's tokens of p (values + 136).

  Args:
    acc: f32 [4 * ROWS, H], layout `OUTPUTS`.
    p: bf16 [tokens, ROWS], layout `SCORES`.
    values: uint32 [tokens / 32, H / 32, 128], layout `value_words`.

  Returns:
    f32 [4 * ROWS, H], layout `OUTPUTS`.
  """
  tokens = p.shape[0]
  head_dim = acc.shape[1]

  def emit(acc, p, values):
    # c[v, i][e]: channel 32v + 4g + e of query row 2t + i.
    c = {
      (v, i): elements(acc.registers[0, v, 0, 0, 0, 0, i, 0])
      for v, i in np.ndindex(head_dim // 32, 2)
    }
    for block in range(tokens // TOKENS):
      b = _transposed(p, block)
      for v, e in np.ndindex(head_dim // 32, 2):
        # Rows g and g + 8 of the product are channels 2e and 2e + 1 of a quad.
        words = elements(values.registers[block, 0, 0, 0, v, 0, 0])
        where = [((v, i), 2 * e + j) for j in range(2) for i in range(2)]
        d = [c[key][channel] for key, channel in where]
        for step in range(2):
          nibbles = (2 * step, 2 * step + 1)
          a = [_pairs(w, step) for w in words[2 * e : 2 * e + 2]]
          a = [pair[i] for i in range(2) for pair in a]
          d = _mma(a, [b[i] for i in nibbles], d)
        for (key, channel), value in zip(where, d):
          c[key][channel] = value
    out = np.empty_like(acc.registers)
    for (v, i), quad in c.items():
      out[0, v, 0, 0, 0, 0, i, 0] = vector(quad)
    return array(out, acc.layout)

  def model(acc, p, values):
    p = p.astype(jnp.float32).reshape(-1, 4, 32, ROWS)
    codes = unpack_values(values).astype(jnp.float32) + float(BIAS)
    codes = codes.reshape(-1, 4, 32, head_dim)
    return acc + jnp.einsum("bwsr,bwsh->wrh", p, codes).reshape(acc.shape)

  return inline(
    emit,
    model,
    arg_types=(OUTPUTS, SCORES, value_words(head_dim)),
    return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, OUTPUTS),
  )(acc, p, values)


def warp_max(x: jax.Array) -> jax.Array:
  """f32 [tokens, ROWS] (`SCORES`) -> each warp's maxima [4 * ROWS] (`STATS`)."""
  return _warp_reduce(x, arith.maximumf, jnp.max)


def warp_sum(x: jax.Array) -> jax.Array:
  """f32 [tokens, ROWS] (`SCORES`) -> each warp's sums [4 * ROWS] (`STATS`)."""
  return _warp_reduce(x, arith.addf, jnp.sum)


def warp_total(p: jax.Array) -> jax.Array:
  """`warp_sum` of bf16, by the tensor cores."""

  def emit(p):
    ones = constant(0x3F803F80)
    zero = arith.constant(ir.F32Type.get(), 0.0)
    c = [zero] * 4
    for block in range(p.shape[0] // TOKENS):
      b = _transposed(p, block)
      for step in range(2):
        c = _mma([ones] * 4, b[2 * step : 2 * step + 2], c)
    layout = _tiled(STATS)
    out = np.empty(layout.registers_shape((4 * ROWS,)), dtype=object)
    for row in range(2):
      out[_STAT_REGISTER[row]] = vector([c[row]])
    return array(out, layout)

  meaning = lambda p: jnp.sum(
    p.astype(jnp.float32).reshape(-1, 4, 32, ROWS), axis=(0, 2)
  ).reshape(4 * ROWS)
  return inline(
    emit,
    meaning,
    arg_types=(SCORES,),
    return_type=plgpu.ShapeDtypeStruct((4 * ROWS,), jnp.float32, STATS),
  )(p)


def scales(x: jax.Array) -> jax.Array:
  """Scales [tokens] (`PER_TOKEN`) as f32, e4m3 two at a time."""
  if x.dtype != jnp.float8_e4m3fn:
    return x.astype(jnp.float32)

  def emit(x):
    f32, half = ir.F32Type.get(), ir.IntegerType.get_signless(16)
    byte = ir.IntegerType.get_signless(8)
    out = np.empty_like(x.registers)
    places = list(np.ndindex(out.shape))
    for pair in zip(places[::2], places[1::2]):
      bytes_ = [mgpu.utils.bitcast(x.registers[at], byte) for at in pair]
      both = mgpu.utils.bitcast(vector(bytes_), half)
      numbers = assembly(
        llvm.StructType.get_literal([f32] * 2),
        [both],
        "{ .reg .b32 w; .reg .b16 a, b; cvt.rn.f16x2.e4m3x2 w, $2;"
        " mov.b32 {a, b}, w; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
        "=f,=f,h",
      )
      for i, at in enumerate(pair):
        out[at] = vector([llvm.extractvalue(f32, numbers, (i,))])
    return array(out, x.layout)

  return inline(
    emit,
    lambda x: x.astype(jnp.float32),
    arg_types=(PER_TOKEN,),
    return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, PER_TOKEN),
  )(x)


def to_bf16(x: jax.Array) -> jax.Array:
  """Rounds f32 [tokens, ROWS] (`SCORES`) to bf16, two at a time."""

  def emit(x):
    out = np.empty_like(x.registers)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    for index, register in np.ndenumerate(x.registers):
      low, high = elements(register)
      bits = assembly(
        i32(), [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
      )
      out[index] = mgpu.utils.bitcast(bits, pair)
    return array(out, x.layout)

  meaning = lambda x: x.astype(jnp.bfloat16)
  return inline(
    emit,
    meaning,
    arg_types=(SCORES,),
    return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, SCORES),
  )(x)


def _warp_reduce(x, combine, model):
  tokens = x.shape[0]

  def emit(x):
    layout = _tiled(STATS)
    out = np.empty(layout.registers_shape((4 * ROWS,)), dtype=object)
    parts = [
      elements(x.registers[block, 0, 0, 0, 0, 0, i, 0, 0])
      for block, i in np.ndindex(tokens // TOKENS, 4)
    ]
    for row in range(2):
      value = parts[0][row]
      for part in parts[1:]:
        value = combine(value, part[row])
      for lane in (4, 8, 16):
        value = combine(value, mgpu.utils.shfl_bfly(value, lane))
      out[_STAT_REGISTER[row]] = vector([value])
    return array(out, layout)

  meaning = lambda x: model(x.reshape(-1, 4, 32, ROWS), axis=(0, 2)).reshape(
    4 * ROWS
  )
  return inline(
    emit,
    meaning,
    arg_types=(SCORES,),
    return_type=plgpu.ShapeDtypeStruct((4 * ROWS,), jnp.float32, STATS),
  )(x)


def to_scores(stats: jax.Array, tokens: int) -> jax.Array:
  """f32 [4 * ROWS] (`STATS`) -> [tokens, ROWS] (`SCORES`): each warp its own."""

  def emit(stats):
    layout = _tiled(SCORES)
    out = np.empty(layout.registers_shape((tokens, ROWS)), dtype=object)
    out[...] = vector([elements(stats.registers[i])[0] for i in _STAT_REGISTER])
    return array(out, layout)

  meaning = lambda x: jnp.broadcast_to(
    x.reshape(1, 4, 1, ROWS), (tokens // TOKENS, 4, 32, ROWS)
  ).reshape(tokens, ROWS)
  return inline(
    emit,
    meaning,
    arg_types=(STATS,),
    return_type=plgpu.ShapeDtypeStruct((tokens, ROWS), jnp.float32, SCORES),
  )(stats)


# Registers of a `STATS` array: query rows 2t and 2t + 1.
_STAT_REGISTER = ((0, 0, 0, 0, 0), (0, 0, 0, 1, 0))


def _pairs(word, step):
  """Codes i and i + 4 of a word, plus 136, as two bf16 in an i32.

  For i = 2 step and 2 step + 1.
  """
  out = []
  for i in (2 * step, 2 * step + 1):
    x = arith.shrui(word, constant(4 * i)) if i else word
    out.append(_masked(x, 0x000F000F, 0x43084308))
  return out


def _small(word, step):
  """The same plus 8 as f16 in units of 2^-24, those of odd i 16 times that."""
  if step:
    word = arith.shrui(word, constant(8))
  return [
    _masked(word, 0x000F000F, 0x00080008),
    _masked(word, 0x00F000F0, 0x00800080),
  ]


def _masked(word, mask, flipped):
  text = f"lop3.b32 $0, $1, {mask}, {flipped}, 0x6a;"  # (a & b) ^ c
  return assembly(i32(), [word], text, "=r,r")


def _sixteenth(pair):
  text = "{ .reg .b32 c; mov.b32 c, 0x2c002c00; mul.rn.f16x2 $0, $1, c; }"
  return assembly(i32(), [pair], text, "=r,r")


def _halves(octet, i):
  """Elements i and i + 4 of eight 16-bit numbers, in an i32."""
  element = ir.VectorType(octet.type).element_type
  pair = llvm.mlir_undef(ir.VectorType.get((2,), element))
  for j in range(2):
    value = llvm.extractelement(octet, constant(i + 4 * j))
    pair = llvm.insertelement(pair, value, constant(j))
  return mgpu.utils.bitcast(pair, i32())


def _mma(a, b, c, kind="bf16"):
  """m16n8k16: four i32 A, two i32 B, four f32 C -> four f32."""
  f32 = ir.F32Type.get()
  out = assembly(
    llvm.StructType.get_literal([f32] * 4),
    [*a, *b, *c],
    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    " {$0, $1, $2, $3},"
    " {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
  )
  return [llvm.extractvalue(f32, out, (i,)) for i in range(4)]


def _transposed(p, block):
  """The four operands of products of a block's probabilities."""
  return [
    _transpose_8x8(
      mgpu.utils.bitcast(p.registers[block, 0, 0, 0, 0, 0, i, 0, 0], i32())
    )
    for i in range(4)
  ]


def _transpose_8x8(x):
  """Transposes an 8 x 8 block of 16-bit values held by a warp."""
  return assembly(
    i32(), [x], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r"
  )


def _tiled(layout):
  return layout.to_mgpu()
