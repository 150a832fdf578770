"""What only a card shows: the same bits always, no write beyond the outputs.

Memory errors inside a kernel are found by

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck \
      python -m pytest -m gpu -k once tests/kernels/test_on_the_card.py

as each array is then an allocation of its own.
"""

import functools

import int4_problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode_chain
from test_attention_kernels import codes_and_scales
from test_rope_append import Case

from fireq_jax.pallas import kv_layout, tunings
from fireq_jax.pallas.act_quant import act_quant
from fireq_jax.pallas.decode_attention import decode_attention
from fireq_jax.pallas.decode_chain import decode_chain
from fireq_jax.pallas.int4_matmul import Tuning, int4_matmul
from fireq_jax.pallas.prefill_attention import prefill_attention
from fireq_jax.pallas.rope_append import rope_append
from fireq_jax.qtensor import quantize_e4m3

pytestmark = pytest.mark.gpu
SHARED = Tuning(tile_t=64, rows=64, stages=6, blocks=2, interleave=2, split=2)


def matmul(tokens, n, tuning=None, **options):
  rng = np.random.default_rng(tokens)
  args, options = int4_problems.problem(rng, n, 1024, tokens, **options)
  tuning = tuning or tunings.choose(tokens, args[1])
  return functools.partial(int4_matmul, tuning=tuning, **options), args


def rounding():
  x = jax.random.normal(jax.random.key(0), (24, 4096), jnp.bfloat16)
  return act_quant, (x, jnp.ones(4096, jnp.bfloat16))


def append():
  case = Case(length=32, starts=(0, 5), counts=(32, 9), capacity=96)
  args, factors = case.operands()
  return functools.partial(rope_append, **factors), args


def decode(batch, tokens):
  (k, k_scale, v, v_scale), q, q_scale = attention(batch, 1, tokens)
  by_head = lambda x: jnp.swapaxes(x, 1, 2)
  held = (
    kv_layout.pack_words(by_head(k)),
    by_head(k_scale),
    kv_layout.pack_values(by_head(v)),
    by_head(v_scale),
  )
  starts = jnp.arange(batch, dtype=jnp.int32) + tokens - batch
  counts = jnp.ones(batch, jnp.int32)
  return decode_attention, (q, q_scale, *held, starts, counts)


def prefill(length, tokens):
  held, q, q_scale = attention(2, length, tokens)
  starts = jnp.array([tokens - length, 0], jnp.int32)
  counts = jnp.array([length, length // 2], jnp.int32)
  operands = kv_layout.prefill_operands(*held)
  return prefill_attention, (q, q_scale, *operands, starts, counts)


def attention(batch, length, tokens):
  shape = (batch, length, 8, 128)
  q = quantize_e4m3(jax.random.normal(jax.random.key(9), shape))
  return codes_and_scales(length, batch, tokens, 2, 128), *q


def chain(tokens):
  rng = np.random.default_rng(tokens)
  x, a, stages, _ = test_decode_chain.problem(rng, tokens, 2048, 6144)
  call = functools.partial(decode_chain, eps=1e-5)
  return call, (x, a, stages, jnp.zeros(2, jnp.int32))


CALLS = {
  "matmul 1": lambda: matmul(1, 1536),
  "matmul 13": lambda: matmul(13, 1536, epilogue="add"),
  "matmul 100": lambda: matmul(100, 1536, gated=True),
  "matmul 60, shared tiles": lambda: matmul(60, 1536, tuning=SHARED),
  "matmul 1000": lambda: matmul(1000, 1536, kind="exact"),
  "act_quant": rounding,
  "rope_append": append,
  "decode, split": lambda: decode(1, 4096),
  "decode": lambda: decode(48, 1024),
  "prefill": lambda: prefill(160, 1024),
  "chain 1": lambda: chain(1),
  "chain 3": lambda: chain(3),
}
call_of_each = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


def bits(tree):
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
  as_bits = lambda x: jax.lax.bitcast_convert_type(
    x, unsigned[x.dtype.itemsize]
  )
  return [as_bits(x) for x in jax.tree.leaves(tree)]


@call_of_each
def test_once(make):
  call, args = make()
  assert all(np.asarray(x).any() for x in bits(jax.jit(call)(*args)))


@call_of_each
def test_same_bits_in_a_thousand_runs(make):
  """Also when others have used shared memory and the L2 in between."""
  call, args = make()
  first = bits(jax.jit(call)(*args))

  @jax.jit
  def differing(first, args):
    pairs = zip(first, bits(call(*args)))
    return sum(jnp.sum(a != b, dtype=jnp.int32) for a, b in pairs)

  other, others = matmul(1000, 1536)
  other = jax.jit(other)
  total = jnp.int32(0)
  for i in range(1000):
    if i % 50 == 0:
      other(*others)
    total += differing(first, args)
  assert int(total) == 0


@call_of_each
def test_neighbours_of_outputs_are_kept(make):
  """Outputs fall into holes between arrays, which are looked at afterwards."""
  call, args = make()
  call = jax.jit(call)
  largest = max(jax.tree.leaves(call(*args)), key=lambda x: x.nbytes)
  size = largest.nbytes
  block = lambda: jax.device_put(np.full(size, 0xA5, np.uint8))
  blocks = [block() for _ in range(64)]
  kept = blocks[::2]
  for hole in blocks[1::2]:
    hole.delete()
  # Held, so that each call's outputs take other holes.
  outputs = [call(*args) for _ in range(8)]
  jax.block_until_ready(outputs)
  assert all((np.asarray(x) == 0xA5).all() for x in kept)
  edges = {x.unsafe_buffer_pointer() for x in kept}
  rounded = -(-size // 256) * 256
  ends = [
    x.unsafe_buffer_pointer() + rounded
    for x in jax.tree.leaves(outputs)
    if x.nbytes == size
  ]
  assert edges & set(ends), "no output lies before an array that is kept"


def test_prefill_with_not_a_number_ends():
  """And gives it to no other row, which may round otherwise."""
  call, (q, q_scale, *rest) = prefill(160, 1024)
  f32 = lambda x: np.asarray(x).astype(np.float32)
  clean = f32(jax.jit(call)(q, q_scale, *rest))
  q = q.at[0, 7, 3, 5].set(jnp.nan)
  got = f32(jax.jit(call)(q, q_scale, *rest))
  assert np.isnan(got[0, 7, 3]).all()
  got[0, 7, 3] = clean[0, 7, 3]
  np.testing.assert_allclose(got, clean, atol=0.02 * np.abs(clean).max())
