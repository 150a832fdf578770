"""Rotating, rounding and appending: codes and scales bit for bit."""

import dataclasses

import deviceless
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy_threads import NumpyThreads

from fireq_jax.config import KVFormat, LlamaConfig, RopeConfig
from fireq_jax.kv_cache import LayerCache, init_cache
from fireq_jax.pallas import kv_layout, reference_attention
from fireq_jax.pallas import rope_append as kernel

SCALES = {
  "bf16": ml_dtypes.bfloat16,
  "e4m3": ml_dtypes.float8_e4m3fn,
  "f32": np.float32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A call; `starts` and `counts` have an entry per row."""

  starts: tuple[int, ...]
  counts: tuple[int, ...]
  length: int = 1
  heads: int = 8
  kv_heads: int = 2
  head_dim: int = 128
  capacity: int = 96
  scale: str = "bf16"
  query: str = "e4m3"
  codes: str = "symmetric"
  factors: tuple[str, ...] = ()

  def __str__(self):
    size = f"{self.length}x{self.heads}x{self.kv_heads}x{self.head_dim}"
    return "-".join([size, self.scale, self.query, self.codes, *self.factors])

  @property
  def batch(self):
    return len(self.starts)

  @property
  def format(self):
    return KVFormat(
      cache="int4", scale=self.scale, query=self.query, codes=self.codes
    )

  def cache(self):
    """Random words, of which the kernel must keep those it does not write."""
    config = LlamaConfig(
      vocab_size=8,
      hidden_size=self.heads * self.head_dim,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=self.heads,
      num_key_value_heads=self.kv_heads,
      head_dim=self.head_dim,
      rms_norm_eps=1e-5,
      max_position_embeddings=self.capacity,
      rope=RopeConfig(theta=1e4),
      tie_word_embeddings=True,
    )
    cache = init_cache(config, self.batch, self.capacity, self.format).layers[0]
    rng = np.random.default_rng(1)

    def fill(x):
      bits = rng.integers(0, 256, x.nbytes, np.uint8)
      return jnp.asarray(bits.view(np.dtype(x.dtype)).reshape(x.shape))

    return dataclasses.replace(
      cache,
      k=fill(cache.k),
      v=fill(cache.v),
      k_scale=jnp.full_like(cache.k_scale, 3),
      v_scale=jnp.full_like(cache.v_scale, 3),
    )

  def operands(self):
    """Arrays and keywords of a call, the cache among them."""
    rng = np.random.default_rng(0)
    width = (self.heads + 2 * self.kv_heads) * self.head_dim
    qkv = 3 * rng.normal(size=(self.batch, self.length, width))
    heads = qkv.reshape(self.batch, self.length, -1, self.head_dim)
    heads[0, 0, self.heads] = 0  # a key of zeros
    heads[0, 0, -1] = 1e-6 * heads[0, 0, -1]  # a value e4m3 scales call zero
    angles = rng.uniform(0, 7, (self.batch, self.length, self.head_dim // 2))
    shape = (self.kv_heads, self.head_dim)
    factors = {
      "key_scale": rng.uniform(0.5, 2, shape),
      "key_shift": rng.normal(size=shape),
    }
    arrays = (
      jnp.asarray(qkv, jnp.bfloat16),
      jnp.asarray(np.cos(angles), jnp.float32),
      jnp.asarray(np.sin(angles), jnp.float32),
      self.cache(),
      jnp.asarray(self.starts, jnp.int32),
      jnp.asarray(self.counts, jnp.int32),
    )
    return arrays, {
      name: jnp.asarray(factors[name], jnp.float32) for name in self.factors
    }


BOTH = ("key_scale", "key_shift")
DECODE = [
  Case(starts=(0, 5, 31, 32, 95, 96), counts=(1, 1, 1, 0, 1, 1)),
  Case(starts=(9, 64), counts=(1, 1), head_dim=64, scale="f32", query="bf16"),
  Case(starts=(7,), counts=(1,), scale="e4m3", codes="full", factors=BOTH),
  Case(starts=(8, 80), counts=(1, 1), heads=3, kv_heads=1, capacity=81),
]
PREFILL = [
  Case(length=40, starts=(0, 3, 33, 70, 96), counts=(40, 39, 0, 40, 40)),
  Case(
    length=9, starts=(0, 7, 30), counts=(9, 1, 9), head_dim=64, scale="e4m3"
  ),
  Case(
    length=21,
    starts=(12, 5),
    counts=(21, 8),
    heads=6,
    kv_heads=3,
    capacity=77,
    codes="full",
    factors=BOTH,
  ),
  Case(
    length=8, starts=(31,), counts=(8,), scale="f32", factors=("key_scale",)
  ),
]


def numpy_rope_append(qkv, cos, sin, cache, starts, counts, **factors):
  """(q, q_scale, k codes, k scale, v codes, v scale) [B, T, heads, ...]."""
  f32 = lambda x: np.asarray(x).astype(np.float32)
  kv_heads, h = cache.k.shape[1], 2 * cos.shape[-1]
  x = f32(qkv).reshape(*qkv.shape[:2], -1, h)
  n = x.shape[2] - 2 * kv_heads
  cos, sin = f32(cos)[:, :, None], f32(sin)[:, :, None]
  low, high = x[..., : h // 2], x[..., h // 2 :]
  rotated = np.concatenate(
    [low * cos - high * sin, high * cos + low * sin], axis=-1
  )
  q, k, v = rotated[:, :, :n], rotated[:, :, n:-kv_heads], x[:, :, -kv_heads:]
  if "key_scale" in factors:
    q = q / np.repeat(f32(factors["key_scale"]), n // kv_heads, axis=0)
    k = k * f32(factors["key_scale"])
  if "key_shift" in factors:
    k = k - f32(factors["key_shift"])

  def int4(x):
    lowest, down, up = -7, 7, 7
    if cache.format.codes == "full":
      lowest, down, up = -8, 8.46, 7.47
    scale = np.maximum(
      x.max(-1) * np.float32(1 / up), -x.min(-1) * np.float32(1 / down)
    )
    scale = scale.clip(max=448).astype(SCALES[cache.format.scale])
    codes = x / np.where(scale == 0, 1, scale).astype(np.float32)[..., None]
    codes = np.where((scale == 0)[..., None], 0, np.rint(codes).clip(lowest, 7))
    return codes, np.where(scale == 0, 1, scale).astype(scale.dtype)

  q_scale = None
  if cache.format.query == "e4m3":
    q_scale = np.abs(q).max(-1) * np.float32(1 / 448)
    codes = (q / q_scale[..., None]).clip(-448, 448)
    q = codes.astype(ml_dtypes.float8_e4m3fn)
  else:
    q = q.astype(ml_dtypes.bfloat16)
  return q, q_scale, *int4(k), *int4(v)


def logical(cache):
  """(k codes, k scale, v codes, v scale) [B, K, S, ...] of a cache."""
  tokens = cache.k.shape[2]
  return [
    np.array(x)
    for x in (
      kv_layout.unpack_words(jnp.asarray(cache.k)),
      cache.k_scale,
      kv_layout.unpack_values(jnp.asarray(cache.v))[:, :, :tokens],
      cache.v_scale,
    )
  ]


def appended(case, cache, *new):
  """What `logical` gives of the cache with tokens [B, T, K, ...] written."""
  held = logical(cache)
  for old, tokens in zip(held, new):
    for b, (start, count) in enumerate(zip(case.starts, case.counts)):
      for t in range(min(count, case.capacity - start)):
        old[b, :, start + t] = tokens[b, t]
  return held


def run_in_numpy(case, passes):
  """The kernel's program, all threads of all CTAs at once."""
  (qkv, cos, sin, cache, starts, counts), factors = case.operands()
  sizes = kernel.sizes_of(
    qkv, cos, cache, passes=passes, factors=tuple(factors)
  )
  held = [np.array(x) for x in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
  out = [np.zeros(x.shape, x.dtype) for x in kernel.outputs_of(sizes)]
  inputs = (qkv, cos, sin, starts, counts, *factors.values())
  refs = [*map(np.asarray, inputs), *held, *out]
  kernel.program(NumpyThreads(sizes.ctas), sizes, *refs)
  k, v, k_scale, v_scale = held
  cache = LayerCache(
    k=k, v=v, k_scale=k_scale, v_scale=v_scale, format=case.format
  )
  return out[0], out[1] if case.query == "e4m3" else None, cache


def check(case, got):
  arrays, factors = case.operands()
  q, q_scale, *new = numpy_rope_append(*arrays, **factors)
  np.testing.assert_array_equal(np.asarray(got[0]), q)
  if q_scale is not None:
    np.testing.assert_array_equal(got[1], q_scale)
  for ours, want in zip(logical(got[2]), appended(case, arrays[3], *new)):
    np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("case", DECODE + PREFILL, ids=str)
def test_program_equals_numpy(case, passes):
  check(case, run_in_numpy(case, passes))


@pytest.mark.parametrize("case", DECODE + PREFILL, ids=str)
def test_definition_equals_numpy(case):
  """But for XLA's division on a CPU, which is one bit off now and then."""
  arrays, factors = case.operands()
  q, q_scale, cache = reference_attention.rope_append(*arrays, **factors)
  want_q, want_scale, *new = numpy_rope_append(*arrays, **factors)
  f32 = lambda x: np.asarray(x).astype(np.float32)
  np.testing.assert_allclose(f32(q), f32(want_q), rtol=0.13, atol=2**-8)
  assert (f32(q) != f32(want_q)).mean() < 1e-3
  if want_scale is not None:
    np.testing.assert_allclose(q_scale, want_scale, rtol=1e-6)
  for ours, theirs in zip(logical(cache), appended(case, arrays[3], *new)):
    wrong = f32(ours) != f32(theirs)
    assert wrong.mean() < 1e-3
    np.testing.assert_allclose(f32(ours), f32(theirs), rtol=0.01, atol=1)


@pytest.mark.parametrize("case", [DECODE[0], PREFILL[2]], ids=str)
def test_lowers_for_cuda(case):
  arrays, factors = case.operands()
  names = list(factors)
  call = lambda function: (
    lambda *args: function(*args[:6], **dict(zip(names, args[6:])))
  )
  operands = (*arrays, *factors.values())
  lowered = (
    jax.jit(call(kernel.rope_append), donate_argnums=3)
    .trace(*operands)
    .lower(lowering_platforms=("cuda",))
  )
  assert lowered.as_text().count("@mosaic_gpu_v2") == 1
  want = jax.eval_shape(call(reference_attention.rope_append), *operands)
  assert jax.tree.structure(lowered.out_info) == jax.tree.structure(want)
  for ours, theirs in zip(
    jax.tree.leaves(lowered.out_info), jax.tree.leaves(want)
  ):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_says_what_it_cannot_do():
  case = DECODE[0]
  (qkv, cos, sin, cache, *place), _ = case.operands()
  bf16 = dataclasses.replace(cache, format=KVFormat())
  for wrong in (
    (qkv.astype(jnp.float32), cos, sin, cache),
    (qkv, cos[..., :16], sin[..., :16], cache),
    (qkv, cos, sin, bf16),
  ):
    with pytest.raises(NotImplementedError):
      kernel.rope_append(*wrong, *place)


@pytest.mark.slow
@deviceless.needs_plugin
def test_compiles_without_spills_or_copies(tmp_path, monkeypatch):
  """One kernel in a loop that carries the cache, and no copy of it."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

  def loop(qkv, cos, sin, cache, starts, counts, *factors):
    def step(state):
      i, cache, total = state
      _, scale, cache = kernel.rope_append(
        qkv, cos, sin, cache, starts + i, counts, **dict(zip(BOTH, factors))
      )
      return i + 1, cache, total + scale

    shape = (*qkv.shape[:2], 8)
    state = 0, cache, jnp.zeros(shape, jnp.float32)
    return jax.lax.while_loop(lambda state: state[0] < 5, step, state)[1:]

  for case in (DECODE[0], DECODE[2], PREFILL[0]):
    arrays, factors = case.operands()
    operands = (*arrays, *factors.values())
    program = deviceless.compile_for_hopper(loop, operands, donate_argnums=3)
    text = program.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 1
    held = {x.shape for x in jax.tree.leaves(arrays[3])}
    for line in text.splitlines():
      if " copy(" in line:
        shape = line.split("[", 1)[1].split("]")[0]
        assert tuple(map(int, filter(None, shape.split(",")))) not in held
  reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
  assert len(reports) == 3
  assert all(" 0 bytes spill stores" in report for report in reports)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE + PREFILL, ids=str)
def test_kernel_equals_xla(case):
  """All bits, but those that hang on how XLA rewrites a division.

  XLA turns (q / key_scale) / scale into q / (key_scale * scale), which now and
  then rounds to another e4m3 code of queries.
  """
  arrays, factors = case.operands()
  got = jax.jit(kernel.rope_append)(*arrays, **factors)
  want = jax.jit(reference_attention.rope_append)(*arrays, **factors)
  for ours, theirs in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2])):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
  f32 = lambda x: np.asarray(x).astype(np.float32)
  if "key_scale" in factors:
    np.testing.assert_allclose(f32(got[0]), f32(want[0]), rtol=0.13, atol=2**-8)
    assert (f32(got[0]) != f32(want[0])).mean() < 1e-3
  else:
    np.testing.assert_array_equal(f32(got[0]), f32(want[0]))
  if want[1] is not None:
    np.testing.assert_allclose(got[1], want[1], rtol=3e-7)


@pytest.mark.gpu
def test_kernel_updates_a_donated_cache_in_place():
  case = DECODE[0]
  (qkv, cos, sin, cache, *place), _ = case.operands()
  before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
  call = jax.jit(kernel.rope_append, donate_argnums=3)
  after = jax.tree.leaves(call(qkv, cos, sin, cache, *place)[2])
  assert before == [x.unsafe_buffer_pointer() for x in after]
