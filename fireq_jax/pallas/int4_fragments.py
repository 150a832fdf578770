"""Products of INT4 keys and values with mma.sync, each warp by itself.

A decode step multiplies every cached code by a few queries, so it is bound by
bytes; what matters is how few instructions stand between a cache word and the
tensor core. Here a word holds exactly the 8 codes of the thread that loads it,
conversion takes 7 integer instructions for 8 codes, and no warp ever waits for
another. Operands are swapped: tokens (for scores) and channels (for values)
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
"""

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


def key_products(keys: jax.Array, q: jax.Array) -> jax.Array:
  """(keys + 136) . q of every token and query row.

  Args:
    keys: uint32 [tokens * H / 1024, 128], layout `key_words`.
    q: bf16 [ROWS, H], layout `queries`.

  Returns:
    f32 [tokens, ROWS], layout `SCORES`.
  """
  head_dim = q.shape[1]
  words = head_dim // 8
  tokens = keys.shape[0] * 128 // words

  def emit(keys, q):
    zero = arith.constant(ir.F32Type.get(), 0.0)
    b = {
      (w, i): _halves(q.registers[0, 0, 0, 0, w, 0], i)
      for w, i in np.ndindex(words // 4, 4)
    }
    layout = _tiled(SCORES)
    out = np.empty(layout.registers_shape((tokens, ROWS)), dtype=object)
    for block, half in np.ndindex(tokens // TOKENS, 2):
      token_words = [
        elements(keys.registers[block, 0, 0, 0, 0, 0, 2 * half + i, 0, 0])
        for i in range(2)
      ]
      c = [zero] * 4
      for w, step in np.ndindex(words // 4, 2):
        nibbles = (2 * step, 2 * step + 1)
        a = [_pair(token[w], i) for i in nibbles for token in token_words]
        c = _mma(a, [b[w, i] for i in nibbles], c)
      for i in range(2):
        out[block, 0, 0, 0, 0, 0, 2 * half + i, 0, 0] = vector(
          c[2 * i : 2 * i + 2]
        )
    return array(out, layout)

  def model(keys, q):
    codes = unpack_words(keys).reshape(tokens, head_dim)
    codes = codes.astype(jnp.float32) + float(BIAS)
    return codes @ q.astype(jnp.float32).T

  return inline(
    emit,
    model,
    arg_types=(key_words(head_dim), queries(head_dim)),
    return_type=plgpu.ShapeDtypeStruct((tokens, ROWS), jnp.float32, SCORES),
  )(keys, q)


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
      b = [
        _transpose_8x8(
          mgpu.utils.bitcast(p.registers[block, 0, 0, 0, 0, 0, i, 0, 0], i32())
        )
        for i in range(4)
      ]
      for v, e in np.ndindex(head_dim // 32, 2):
        # Rows g and g + 8 of the product are channels 2e and 2e + 1 of a quad.
        words = elements(values.registers[block, 0, 0, 0, v, 0, 0])
        where = [((v, i), 2 * e + j) for j in range(2) for i in range(2)]
        d = [c[key][channel] for key, channel in where]
        for step in range(2):
          nibbles = (2 * step, 2 * step + 1)
          a = [_pair(w, i) for i in nibbles for w in words[2 * e : 2 * e + 2]]
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


def _pair(word, i):
  """Codes i and i + 4 of a word, plus 136, as two bf16 in an i32."""
  if i:
    word = arith.shrui(word, constant(4 * i))
  return assembly(
    i32(),
    [word],
    "lop3.b32 $0, $1, 0x000f000f, 0x43084308, 0x6a;",  # (a & b) ^ c
    "=r,r",
  )


def _halves(octet, i):
  """Elements i and i + 4 of eight bf16, in an i32."""
  pair = llvm.mlir_undef(ir.VectorType.get((2,), ir.BF16Type.get()))
  for j in range(2):
    value = llvm.extractelement(octet, constant(i + 4 * j))
    pair = llvm.insertelement(pair, value, constant(j))
  return mgpu.utils.bitcast(pair, i32())


def _mma(a, b, c):
  """m16n8k16: four i32 A, two i32 B, four f32 C -> four f32."""
  f32 = ir.F32Type.get()
  out = assembly(
    llvm.StructType.get_literal([f32] * 4),
    [*a, *b, *c],
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3},"
    " {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
  )
  return [llvm.extractvalue(f32, out, (i,)) for i in range(4)]


def _transpose_8x8(x):
  """Transposes an 8 x 8 block of 16-bit values held by a warp."""
  return assembly(
    i32(), [x], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r"
  )


def _tiled(layout):
  return layout.to_mgpu()
