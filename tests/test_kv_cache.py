"""Cache formats against NumPy, and where tokens are written."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_llama

from fireq_jax import kv_cache
from fireq_jax.config import KVFormat

CONFIG = small_llama.config(
  vocab_size=8,
  intermediate_size=32,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  tie_word_embeddings=True,
)
SCALES = {
  "bf16": ml_dtypes.bfloat16,
  "e4m3": ml_dtypes.float8_e4m3fn,
  "f32": np.float32,
}
CODED = [
  KVFormat(cache=cache, scale=scale)
  for cache, scale in itertools.product(("int4", "e4m3"), SCALES)
]
CODED.append(KVFormat(cache="int4", codes="full"))
FORMATS = [*CODED, KVFormat()]
name = lambda kv: f"{kv.cache}-{kv.scale}-{kv.codes}"


def random(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape) * 3


def values(kv):
  """(keys, values) float64 by the law of `KeyValues`."""
  out = []
  for codes, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
    x = np.asarray(codes).astype(np.float64)
    out.append(x if scale is None else x * np.asarray(scale)[..., None])
  return out


@pytest.mark.parametrize("kv", CODED, ids=name)
def test_encode_equals_numpy(kv):
  x = np.array(random((2, 5, 3, 16)))
  x[0, 0, 0] = 0
  x[0, 1, 0] = 1e-6
  x[0, 2, 0] = np.linspace(-1e4, 1e4, 16)
  x[0, 3, 0] = -0.3
  x[1] = -x[1]
  lowest, down, up = -7, 7, 7
  if kv.cache == "e4m3":
    down = up = 448
  elif kv.codes == "full":
    lowest, down, up = -8, 8.46, 7.47
  inverse = lambda reach: np.float32(1 / reach)
  scale = np.maximum(x.max(-1) * inverse(up), -x.min(-1) * inverse(down))
  if kv.scale == "e4m3":
    scale = scale.clip(max=448)
  scale = scale.astype(SCALES[kv.scale]).astype(np.float32)
  zero = scale == 0
  scale[zero] = 1
  codes = x / scale[..., None]
  codes[zero] = 0
  if kv.cache == "int4":
    codes = np.rint(codes).clip(lowest, 7)
  else:
    codes = codes.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
  got = kv_cache.encode(jnp.asarray(x), jnp.asarray(x), kv)
  for found, found_scale in ((got.k, got.k_scale), (got.v, got.v_scale)):
    np.testing.assert_array_equal(found_scale, scale)
    np.testing.assert_array_equal(
      np.asarray(found).astype(np.float32), codes.astype(np.float32)
    )
  assert scale[0, 0, 0] == 1 and not codes[0, 0, 0].astype(np.float32).any()
  if kv.scale == "e4m3":
    assert scale[0, 1, 0] == 1 and not codes[0, 1, 0].astype(np.float32).any()


@pytest.mark.parametrize("kv", FORMATS, ids=name)
def test_append_then_read(kv):
  """Ragged appends give what encode gives, each row at its own place."""
  rows = [(0, [2, 3]), (4, [1, 0]), (1, [3, 2])]
  cache = kv_cache.init_cache(CONFIG, 3, 8, kv)
  layer = cache.layers[1]
  starts = np.array([start for start, _ in rows])
  want_k, want_v = np.zeros((2, 3, 8, 2, 16))
  for step in range(2):
    counts = np.array([counts[step] for _, counts in rows])
    k, v = random((3, 3, 2, 16), step), random((3, 3, 2, 16), step + 9)
    layer = jax.jit(kv_cache.append)(layer, k, v, starts, counts)
    new_k, new_v = values(kv_cache.encode(k, v, kv))
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
      want_k[b, start : start + count] = new_k[b, :count]
      want_v[b, start : start + count] = new_v[b, :count]
    starts = starts + counts
  got_k, got_v = values(kv_cache.read(layer))
  np.testing.assert_array_equal(got_k, want_k)
  np.testing.assert_array_equal(got_v, want_v)


@pytest.mark.parametrize("kv", FORMATS, ids=name)
def test_tokens_beyond_capacity_are_dropped(kv):
  layer = kv_cache.init_cache(CONFIG, 2, 4, kv).layers[0]
  full = kv_cache.append(
    layer,
    random((2, 4, 2, 16)),
    random((2, 4, 2, 16), 1),
    jnp.zeros(2, jnp.int32),
    jnp.full(2, 4),
  )
  more = kv_cache.append(
    full,
    random((2, 3, 2, 16), 2),
    random((2, 3, 2, 16), 3),
    jnp.array([4, 3]),
    jnp.array([3, 3]),
  )
  for got, want in zip(
    values(kv_cache.read(more)), values(kv_cache.read(full))
  ):
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1, :3], want[1, :3])
    assert not np.array_equal(got[1, 3], want[1, 3])


@pytest.mark.parametrize("kv", FORMATS, ids=name)
def test_donated_append_is_in_place(kv):
  layer = kv_cache.init_cache(CONFIG, 2, 32, kv).layers[0]
  k = random((2, 1, 2, 16))
  arguments = (layer, k, k, jnp.array([3, 5]), jnp.array([1, 1]))
  append = jax.jit(kv_cache.append, donate_argnums=0)
  memory = append.lower(*arguments).compile().memory_analysis()
  assert memory.alias_size_in_bytes == sum(
    x.nbytes for x in jax.tree.leaves(layer)
  )
  before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(layer)]
  after = append(*arguments)
  assert before == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)]


@pytest.mark.parametrize(
  "kv, per_head",
  [
    (KVFormat(cache="int4"), 16 / 2 + 2),
    (KVFormat(cache="int4", scale="e4m3"), 16 / 2 + 1),
    (KVFormat(cache="e4m3", scale="f32"), 16 + 4),
    (KVFormat(), 32),
  ],
)
def test_bytes_per_token(kv, per_head):
  # 3 layers, keys and values, 2 heads
  assert kv_cache.bytes_per_token(CONFIG, kv) == 3 * 2 * 2 * per_head
  cache = kv_cache.init_cache(CONFIG, 5, 64, kv)
  held = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
  assert held == 5 * 64 * kv_cache.bytes_per_token(CONFIG, kv)
  assert cache.capacity == 64 and cache.format == kv


def test_int4_error_is_half_a_step():
  x = random((4, 32, 2, 128))
  kv = KVFormat(cache="int4", scale="f32")
  got, _ = values(kv_cache.encode(x, x, kv))
  step = np.abs(np.asarray(x)).max(-1, keepdims=True) / 7
  assert (np.abs(got - x) <= step / 2 * (1 + 1e-5)).all()
  full, _ = values(kv_cache.encode(x, x, dataclasses.replace(kv, codes="full")))
  assert (np.abs(full - x) <= step * (7 / 7.47) / 2 * (1 + 1e-5)).all()
  assert np.square(full - x).mean() < 0.83 * np.square(got - x).mean()
  kv_bf16 = KVFormat(cache="int4", codes="full")
  held = kv_cache.encode(x, x, kv_bf16)
  half = np.asarray(held.k_scale)[..., None] / 2
  assert (np.abs(values(held)[0] - x) <= half * (1 + 1e-5)).all()
  wide = dataclasses.replace(kv, scale="e4m3")
  got, _ = values(kv_cache.encode(x, x, wide))
  # e4m3 scales are off by up to 1/16, which then clips the largest codes.
  assert (np.abs(got - x) <= step * (0.5 * 17 / 16 + 7 / 16)).all()
