"""Rotates queries and keys, rounds them and appends to an INT4 cache.

From a row of the QKV projection (N query, K key, K value heads of a token):

  q' = rope(q) / key_scale           -> e4m3 codes, scale amax / 448, or bf16
  k' = rope(k) * key_scale - key_shift  -> INT4 codes and a scale
  v                                     -> INT4 codes and a scale

Codes and scales of keys and values go to their row's place in the cache, which
is updated in place. The laws are those of `kv_cache.encode` and
`qtensor.quantize_e4m3`, operation by operation, so that codes are the same
bits as XLA's.

A warp has one task, and there is no shared memory:

  q   query heads of a token, `passes` neighbours of each group of lanes, which
      share sines and, where they have one kv head, the scale of its channels
  k   the same of key heads
  v   8 tokens of a value head, those of one octet of the cache

In q and k tasks a thread holds 16 channels: 8 of the lower half of a head and
the 8 that the rotation mixes with them, so heads are reduced over 8 lanes (4
where H is 64) and a thread's channels are whole words of codes:

  lane of a head       0        1      ...     7
  channels          0 - 7    8 - 15         56 - 63
                   64 - 71  72 - 79        120 - 127

In v tasks a thread holds 4 channels of all 8 tokens, which are 4 whole words of
the cache (`kv_layout`): no two threads ever write to one word, though tokens of
a word come from many rows of the projection.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.kv_cache import LayerCache
from fireq_jax.pallas import thread_rows as rows
from fireq_jax.pallas import threads
from fireq_jax.pallas.device import one_by_one
from fireq_jax.pallas.threads import WARP

_OCTET = 8  # tokens of a word of values
_FACTORS = "key_scale", "key_shift"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
  """Free choices of the kernel.

  Attributes:
    passes: neighbouring heads a thread goes through; None is 1 for few
      tokens, to be done soon, and 4 for many, to load sines once.
  """

  passes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
  """What the program needs to know of its operands' shapes."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  capacity: int
  query: str
  scale: str
  codes: str
  factors: tuple[str, ...]
  passes: int

  @property
  def tokens(self) -> int:
    return self.batch * self.length

  @property
  def row(self) -> int:
    """Elements of a token's row of the projection."""
    return (self.heads + 2 * self.kv_heads) * self.head_dim

  @property
  def rope_lanes(self) -> int:
    """Lanes of a query or key head."""
    return self.head_dim // 16

  @property
  def value_lanes(self) -> int:
    return self.head_dim // 4

  @property
  def octets(self) -> int:
    """Octets of the cache that the tokens of a sequence may touch."""
    return (self.length + 2 * _OCTET - 2) // _OCTET

  @property
  def group(self) -> int:
    """Query heads of a kv head."""
    return self.heads // self.kv_heads

  @property
  def key_passes(self) -> int:
    """Passes that leave no lane without a key head."""
    return max(1, min(self.passes, self.kv_heads * self.rope_lanes // WARP))

  def chunks(self, heads: int, passes: int) -> int:
    """Warps for `heads` query or key heads of a token."""
    return -(-heads // (WARP // self.rope_lanes * passes))

  @property
  def tasks(self) -> tuple[int, int, int]:
    """Warps for values, keys and queries, those that take longest first."""
    pairs = self.batch * self.octets * self.kv_heads
    return (
      -(-pairs // (WARP // self.value_lanes)),
      self.tokens * self.chunks(self.kv_heads, self.key_passes),
      self.tokens * self.chunks(self.heads, self.passes),
    )

  @property
  def ctas(self) -> int:
    return sum(map(_whole_ctas, self.tasks)) * WARP // threads.BLOCK


def _whole_ctas(warps: int) -> int:
  """Warps, so that what follows begins with a new CTA."""
  per_cta = threads.BLOCK // WARP
  return -(-warps // per_cta) * per_cta


def supported(qkv: jax.Array, cos: jax.Array, cache: LayerCache) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  head_dim = 2 * cos.shape[-1]
  largest = max(x.size for x in (qkv, cache.k, cache.v))
  for ok, reason in (
    (head_dim in (64, 128), f"head_dim {head_dim}"),
    (qkv.dtype == jnp.bfloat16, f"a projection of {qkv.dtype}"),
    (cache.format.cache == "int4", f"a cache of {cache.format.cache}"),
    (largest < 2**31, f"{largest} elements: 32 bits must count them"),
  ):
    if not ok:
      raise NotImplementedError(f"this kernel does not handle {reason}")


def rope_append(
  qkv: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  cache: LayerCache,
  starts: jax.Array,
  counts: jax.Array,
  *,
  key_scale: jax.Array | None = None,
  key_shift: jax.Array | None = None,
  tuning: Tuning | None = None,
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
  """Makes queries and appends keys and values (FireQ 3.3).

  Token t of row b goes to position `starts[b] + t`; tokens from `counts[b]` on
  and those beyond the capacity are dropped. Under `jit` with the cache
  donated, or carried by a loop, the cache is updated in place.

  Args:
    qkv: bf16 [B, T, (N + 2 K) H], heads of q, then of k, then of v.
    cos: f32 [B, T, H / 2], as from `rope.cos_sin`.
    sin: f32 [B, T, H / 2].
    cache: INT4, of K heads.
    starts: i32 [B].
    counts: i32 [B].
    key_scale: f32 [K, H], multiplies keys and divides queries after RoPE.
    key_shift: f32 [K, H], subtracted from keys after that.
    tuning: the free choices.

  Returns:
    queries [B, T, N, H], e4m3 or bf16 as `cache.format.query` says; their
    scale f32 [B, T, N], or None of bf16; the cache.

  Raises:
    NotImplementedError: see `supported`.
  """
  supported(qkv, cos, cache)
  passes = tuning.passes if tuning else None
  if passes is None:
    passes = 1 if qkv.shape[0] * qkv.shape[1] < 1024 else 4
  call = functools.partial(_call, passes=passes)
  if jax.__version_info__ >= (0, 11):  # which lets such a call hold references
    call = one_by_one(call)
  return call(qkv, cos, sin, cache, starts, counts, key_scale, key_shift)


def _call(
  qkv, cos, sin, cache, starts, counts, key_scale, key_shift, *, passes
):
  factors = {"key_scale": key_scale, "key_shift": key_shift}
  factors = {name: x for name, x in factors.items() if x is not None}
  sizes = sizes_of(qkv, cos, cache, passes=passes, factors=tuple(factors))
  held = [
    jax.new_ref(x) for x in (cache.k, cache.v, cache.k_scale, cache.v_scale)
  ]

  def kernel(*refs):
    threads.run(lambda t, *refs: program(t, sizes, *refs), *refs)

  run: Any = pl.kernel(
    kernel,
    outputs_of(sizes),
    mesh=plgpu.Mesh(grid=(sizes.ctas,), grid_names=("cta",)),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    name="rope_append",
  )
  out = run(qkv, cos, sin, starts, counts, *factors.values(), *held)
  k, v, k_scale, v_scale = (jax.freeze(x) for x in held)
  cache = dataclasses.replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
  return out[0], out[1] if sizes.query == "e4m3" else None, cache


def sizes_of(
  qkv: jax.Array,
  cos: jax.Array,
  cache: LayerCache,
  *,
  passes: int,
  factors: tuple[str, ...],
) -> Sizes:
  batch, length, width = qkv.shape
  head_dim = 2 * cos.shape[-1]
  kv_heads, capacity = cache.k.shape[1:3]
  return Sizes(
    batch=batch,
    length=length,
    heads=width // head_dim - 2 * kv_heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    capacity=capacity,
    query=cache.format.query,
    scale=cache.format.scale,
    codes=cache.format.codes,
    factors=factors,
    passes=passes,
  )


def outputs_of(sizes: Sizes) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Queries, and scales where there are any."""
  shape = (sizes.batch, sizes.length, sizes.heads)
  if sizes.query == "bf16":
    return (jax.ShapeDtypeStruct((*shape, sizes.head_dim), jnp.bfloat16),)
  return (
    jax.ShapeDtypeStruct((*shape, sizes.head_dim), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct(shape, jnp.float32),
  )


def program(t: Any, sizes: Sizes, *refs: Any) -> None:
  """What a thread does.

  Args:
    t: a `threads.Threads`.
    sizes: of the operands.
    *refs: qkv, cos, sin, starts, counts, key_scale and key_shift where there
      are any, the four arrays of the cache, queries and their scales if any.
  """
  rest = iter(refs)
  named = dict(zip(("qkv", "cos", "sin", "starts", "counts"), rest))
  for name, present in (
    *((name, name in sizes.factors) for name in _FACTORS),
    ("k", True),
    ("v", True),
    ("k_scales", True),
    ("v_scales", True),
    ("q", True),
    ("q_scales", sizes.query == "e4m3"),
  ):
    named[name] = next(rest) if present else None
  values, keys, queries = sizes.tasks
  keys_at = _whole_ctas(values)
  queries_at = keys_at + _whole_ctas(keys)
  warp = t.warp
  with t.when(warp < values):
    _value_task(t, warp, sizes, **named)
  with t.when((warp >= keys_at) & (warp < keys_at + keys)):
    _key_task(t, warp - keys_at, sizes, **named)
  with t.when((warp >= queries_at) & (warp < queries_at + queries)):
    _query_task(t, warp - queries_at, sizes, **named)


def _query_task(
  t, task, sizes, *, qkv, cos, sin, key_scale, q, q_scales, **_
):  # fmt: skip
  h, group, passes = sizes.head_dim, sizes.group, sizes.passes
  heads = _rotated_heads(t, task, sizes, sizes.heads, 0, passes, qkv, cos, sin)
  divisors = scales = None
  for i, (token, head, channel, live, low, high) in enumerate(heads):
    if key_scale is not None:
      if divisors is None or group % passes:  # else all have one kv head
        divisors = _factors(t, key_scale, head // group * h + channel, h, live)
      low = rows.each(t.divide, low, divisors[0])
      high = rows.each(t.divide, high, divisors[1])
    row = token * sizes.heads + head
    at = row * h + channel
    if q_scales is None:
      for part, index in ((low, at), (high, at + h // 2)):
        words = [t.pack_bf16(*part[i : i + 2]) for i in range(0, 8, 2)]
        t.store(q, index, words, live)
      continue
    amax = rows.largest(t, low + high, sizes.rope_lanes)
    scale = amax * float(np.float32(1 / 448))
    scale = t.select(scale < rows.TINY, 1.0, scale)
    for part, index in ((low, at), (high, at + h // 2)):
      part = [t.divide(x, scale) for x in part]
      halves = [t.pack_e4m3(*part[i : i + 2]) for i in range(0, 8, 2)]
      words = [halves[i] | (halves[i + 1] << 16) for i in (0, 2)]
      t.store(q, index, words, live)
    # Lane i of a head keeps the scale of pass i.
    bits = t.bits(scale)
    scales = bits if i == 0 else t.select(channel < 8 * i, scales, bits)
    if i + 1 == passes:
      index = row - i + channel // 8
      live = (channel < 8 * passes) & (index < (token + 1) * sizes.heads)
      t.store(q_scales, index, [scales], live)


def _key_task(
  t, task, sizes, *, qkv, cos, sin, starts, counts, key_scale, key_shift, k,
  k_scales, **_,
):  # fmt: skip
  h = sizes.head_dim
  for token, head, channel, live, low, high in _rotated_heads(
    t, task, sizes, sizes.kv_heads, sizes.heads, sizes.key_passes, qkv, cos, sin
  ):
    for ref, change in (
      (key_scale, lambda x, factor: x * factor),
      (key_shift, lambda x, shift: x - shift),
    ):
      if ref is not None:
        factors = _factors(t, ref, head * h + channel, h, live)
        low = rows.each(change, low, factors[0])
        high = rows.each(change, high, factors[1])
    b, i = token // sizes.length, token % sizes.length
    start, count = _place(t, b, starts, counts, live)
    place = start + i
    live = live & (i < count) & (place < sizes.capacity)
    row = (b * sizes.kv_heads + head) * sizes.capacity + place
    scale, stored = rows.scale(
      t, low + high, sizes.rope_lanes, sizes.codes, sizes.scale
    )
    first = channel < 8
    t.store(k_scales, row, [stored], live & first, rows.SCALE_BITS[sizes.scale])
    for part, index in ((low, channel), (high, channel + h // 2)):
      word = rows.word(t, [(x, scale) for x in part], sizes.codes, sizes.scale)
      t.store(k, row * (h // 8) + index // 8, [word], live)


def _factors(t, ref, at, head_dim, live):
  """Those of a thread's lower and of its upper channels."""
  places = at, at + head_dim // 2
  return [rows.floats(t, ref, place, live) for place in places]


def _rotated_heads(t, task, sizes, heads, first, passes, qkv, cos, sin):
  """Rotates the heads of a task.

  Args:
    t: the thread.
    task: its warp's number among those that share `heads` heads.
    sizes: of the operands.
    heads: how many there are, of which the first is head `first` of a row.
    passes: neighbouring heads of a thread.
    qkv: the projection.
    cos: of the angles.
    sin: of the angles.

  Yields:
    token and head, the first of the thread's 8 lower channels, whether there
    is such a head; f32 values of the 8 lower and of the 8 upper channels.
  """
  h, lanes = sizes.head_dim, sizes.rope_lanes
  channel = t.lane % lanes * 8
  chunks = sizes.chunks(heads, passes)
  token, chunk = task // chunks, task % chunks
  angles = token * (h // 2) + channel
  cosines, sines = (rows.floats(t, ref, angles) for ref in (cos, sin))
  head = (chunk * (WARP // lanes) + t.lane // lanes) * passes

  def load(i):
    live = head + i < heads
    at = token * sizes.row + (head + (first + i)) * h + channel
    return live, *(t.load(qkv, at + half, 4, live) for half in (0, h // 2))

  loaded = load(0)
  for i in range(passes):
    live, *halves = loaded
    low, high = (rows.unpack_bf16(t, half) for half in halves)
    if i + 1 < passes:  # one ahead: more would cost registers, so warps
      loaded = load(i + 1)
    angles = zip(low, high, cosines, sines)
    pairs = [(x * c - y * s, y * c + x * s) for x, y, c, s in angles]
    low, high = ([pair[n] for pair in pairs] for n in range(2))
    yield token, head + i, channel, live, low, high


def _value_task(
  t, task, sizes, *, qkv, starts, counts, v, v_scales, **_
):  # fmt: skip
  h, lanes, octets = sizes.head_dim, sizes.value_lanes, sizes.octets
  unit = task * (WARP // lanes) + t.lane // lanes
  octet, pair = unit % octets, unit // octets
  head, b = pair % sizes.kv_heads, pair // sizes.kv_heads
  exists = b < sizes.batch
  quad = t.lane % lanes
  start, count = _place(t, b, starts, counts, exists)
  octet = octet + start // _OCTET
  place = octet * _OCTET
  if sizes.length == 1:  # loaded before its place is known
    steps = [(start % _OCTET, 0, exists)]
  else:
    last = t.select(count < sizes.length, count, sizes.length)
    steps = [
      (i, token, exists & (token >= 0) & (token < last))
      for i, token in ((i, place - start + i) for i in range(_OCTET))
    ]

  loaded = []
  for i, token, live in steps:
    row = (b * sizes.length + token) * sizes.row
    at = row + (sizes.heads + sizes.kv_heads + head) * h + quad * 4
    words = t.load(qkv, at, 2, live)
    live = live & (count >= token + 1) & (place + i < sizes.capacity)
    loaded.append((i, live, rows.unpack_bf16(t, words)))
  masks, columns, scales = [], [], []
  for i, live, values in loaded:
    scale, stored = rows.scale(t, values, lanes, sizes.codes, sizes.scale)
    masks.append(t.select(live, 15, 0) << (i * 4))
    columns.append([(x, scale) for x in values])
    scales.append((i, live, stored))

  head = b * sizes.kv_heads + head
  blocks = -(-sizes.capacity // 32)
  at = ((head * blocks + octet // 4) * (h // 4) + quad) * 16 + octet % 4 * 4
  some = functools.reduce(operator.or_, [live for _, live, _ in scales])
  mask = functools.reduce(operator.or_, masks)
  if sizes.length == 1:
    codes = [rows.word(t, [x], sizes.codes, sizes.scale) for x in columns[0]]
    new = [(code & 15) << (scales[0][0] * 4) for code in codes]
  else:
    new = [
      rows.word(t, octet, sizes.codes, sizes.scale) for octet in zip(*columns)
    ]
  # Of words that are written in part, other nibbles stay as they are.
  part = some
  if sizes.length > 1:
    part = some & ~functools.reduce(operator.and_, [x for _, x, _ in scales])
  old = t.load(v, at, 4, part)
  t.store(v, at, [(a & ~mask) | (b & mask) for a, b in zip(old, new)], some)

  # Lane i of a head stores the scale of token i, that of one token lane 0.
  i, live, stored = scales[-1]
  for n, (_, other_live, other) in reversed(list(enumerate(scales[:-1]))):
    live = t.select(quad < n + 1, other_live, live)
    stored = t.select(quad < n + 1, other, stored)
  lane = quad if sizes.length > 1 else i
  own = live & (quad < len(scales))
  at = head * sizes.capacity + place + lane
  t.store(v_scales, at, [stored], own, rows.SCALE_BITS[sizes.scale])


def _place(t, b, starts, counts, when):
  """Row b's first position and number of tokens."""
  return t.load(starts, b, 1, when)[0], t.load(counts, b, 1, when)[0]
