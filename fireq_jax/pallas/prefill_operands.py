"""Makes the e4m3 operands of prefill attention from the words of a cache.

Codes are looked up, eight of a word at a time; values are transposed on the
way by the order of their words alone (`kv_layout`): a thread takes the four
words of one channel of a block and writes that channel's 32 tokens.

A warp has one task, and there is no shared memory:

  keys    512 words, of neighbouring tokens of a head
  values  two blocks of a head:

    lane    bits 0, 1     bit 2    bits 3, 4
            channel % 4   block    channel // 4 % 4

The numbers of tokens (scales, weights) are few and left to XLA. They need to
know which tokens have values other than zero, of which the kernel makes a map.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import kv_layout, threads
from fireq_jax.pallas.kv_layout import BLOCK
from fireq_jax.pallas.threads import WARP

_KEY_WORDS = 512  # of a task
# e4m3 of the codes 0 to 3, 4 to 7, -8 to -5 and -4 to -1.
_TABLE = 0x44403800, 0x4E4C4A48, 0xCACCCED0, 0xB8C0C4C8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
  """What the program needs to know of its operands' shapes."""

  heads: int  # of all sequences
  head_dim: int
  capacity: int
  blocks: int

  @property
  def tokens(self) -> int:
    """Tokens of the operands: whole tiles of attention."""
    return kv_layout.padded(self.capacity)

  @property
  def key_tasks(self) -> int:
    return self.heads * self.tokens * self.head_dim // 8 // _KEY_WORDS

  @property
  def value_tasks(self) -> int:
    return self.heads * self.tokens // (2 * BLOCK)

  @property
  def ctas(self) -> int:
    return -(-(self.key_tasks + self.value_tasks) * WARP // threads.BLOCK)


def supported(k_words: jax.Array, v_words: jax.Array) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  head_dim = 8 * k_words.shape[-1]
  words = max(k_words.size, v_words.size)
  for ok, reason in (
    (head_dim in (64, 128), f"head_dim {head_dim}"),
    (9 * words < 2**31, f"{words} words: 32 bits must count bytes"),
  ):
    if not ok:
      raise NotImplementedError(f"this kernel does not handle {reason}")


def prefill_operands(
  k_words: jax.Array,
  k_scale: jax.Array,
  v_words: jax.Array,
  v_scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """What `kv_layout.prefill_operands` makes of codes, from words of a cache.

  Args:
    k_words: uint32 [B, K, S, H / 8].
    k_scale: [B, K, S].
    v_words: uint32 [B, K, ceil(S / 32), ...].
    v_scale: [B, K, S].

  Raises:
    NotImplementedError: see `supported`.
  """
  supported(k_words, v_words)
  sizes = sizes_of(k_words, v_words)

  def kernel(*refs):
    threads.run(lambda t, *refs: program(t, sizes, *refs), *refs)

  k, v, taken = plgpu.kernel(
    kernel,
    out_type=outputs_of(sizes),
    grid=(sizes.ctas,),
    grid_names=("cta",),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    kernel_name="prefill_operands",
  )(k_words, v_words)
  heads = k_words.shape[:2]
  k, v, taken = (x.reshape(*heads, *x.shape[1:]) for x in (k, v, taken))
  taken = kv_layout.unpack_words(taken) != 0
  taken = taken.reshape(*heads, -1)
  return k, v, *kv_layout.token_operands(k_scale, v_scale, taken)


def sizes_of(k_words: jax.Array, v_words: jax.Array) -> Sizes:
  batch, kv_heads, capacity, words = k_words.shape
  return Sizes(
    heads=batch * kv_heads,
    head_dim=8 * words,
    capacity=capacity,
    blocks=v_words.shape[2],
  )


def outputs_of(sizes: Sizes) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Keys, values, and words of tokens: nibbles other than 0 are taken."""
  heads, tokens, h = sizes.heads, sizes.tokens, sizes.head_dim
  e4m3 = jnp.float8_e4m3fn
  return (
    jax.ShapeDtypeStruct((heads, tokens, h), e4m3),
    jax.ShapeDtypeStruct((heads, h, tokens), e4m3),
    jax.ShapeDtypeStruct((heads, tokens // BLOCK, 4), jnp.uint32),
  )


def program(t: Any, sizes: Sizes, *refs: Any) -> None:
  """What a thread does, given a `threads.Threads` and all operands."""
  k_words, v_words, k, v, taken = refs
  warp = t.warp
  with t.when(warp < sizes.value_tasks):
    _value_task(t, warp, sizes, v_words, v, taken)
  keys = warp - sizes.value_tasks
  with t.when((keys >= 0) & (keys < sizes.key_tasks)):
    _key_task(t, keys, sizes, k_words, k)


def _key_task(t, task, sizes, k_words, k):
  width = sizes.head_dim // 8
  loaded = []
  for i in range(_KEY_WORDS // (4 * WARP)):
    place = task * _KEY_WORDS + i * (4 * WARP) + t.lane * 4
    row, word = place // width, place % width
    head, token = row // sizes.tokens, row % sizes.tokens
    at = (head * sizes.capacity + token) * width + word
    words = t.load(k_words, at, 4, token < sizes.capacity)
    loaded.append((place, words))
  for place, words in loaded:
    out = [_e4m3(t, x) for word in words for x in (word, word >> 16)]
    for half in range(2):
      t.store(k, place * 8 + 16 * half, out[4 * half : 4 * half + 4])


def _value_task(t, task, sizes, v_words, v, taken):
  h, lane = sizes.head_dim, t.lane
  pairs = sizes.tokens // (2 * BLOCK)
  head = task // pairs
  block = task % pairs * 2 + lane // 4 % 2
  live = block < sizes.blocks
  loaded = []
  for i in range(h // 16):
    quad = i * 4 + lane // 8
    at = ((head * sizes.blocks + block) * (h // 4) + quad) * 16 + lane % 4
    words = [t.load(v_words, at + 4 * j, 1, live)[0] for j in range(4)]
    loaded.append((quad * 4 + lane % 4, words))
  for channel, words in loaded:
    at = (head * h + channel) * sizes.tokens + block * BLOCK
    for half in range(2):
      first, second = words[2 * half : 2 * half + 2]
      # Tokens 2i and 2i + 1 of either word, see `kv_layout.KV_ORDER`.
      mixed = [t.permute(first, second, 0x40 + 0x11 * i) for i in range(4)]
      t.store(v, at + 16 * half, [_e4m3(t, x) for x in mixed])

  some = [
    functools.reduce(operator.or_, x) for x in zip(*(w for _, w in loaded))
  ]
  for distance in (1, 2, 8, 16):
    some = [x | t.shuffle_xor(x, distance) for x in some]
  mine = some[3]
  for i in (2, 1, 0):
    mine = t.select(lane % 4 < i + 1, some[i], mine)
  at = (head * (sizes.tokens // BLOCK) + block) * 4 + lane % 4
  t.store(taken, at, [mine], lane < 8)


def _e4m3(t, x):
  """The e4m3 of four codes, those in the low half of x."""
  index = x & 0x7777
  above, below = (t.permute(*_TABLE[i : i + 2], index) for i in (0, 2))
  negative = t.permute(0, 0xFFFFFFFF, (x >> 1) & 0x4444)
  return (below & negative) | (above & ~negative)
