"""Operands of prefill from words of a cache: bit for bit what codes give."""

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_threads import NumpyThreads

from fireq_jax.pallas import kv_layout
from fireq_jax.pallas import prefill_operands as kernel

SHAPES = [(2, 2, 96, 128), (1, 3, 161, 64), (1, 1, 256, 128)]  # B, K, S, H


def cache(batch, kv_heads, tokens, head_dim):
  """Words and scales, with tokens of zeros and rubbish after the last."""
  rng = np.random.default_rng(0)
  shape = (batch, kv_heads, tokens, head_dim)
  k, v = rng.integers(-8, 8, (2, *shape)).astype(np.int8)
  v[:, :, ::7] = 0
  spare = -tokens % kv_layout.BLOCK
  v = np.pad(v, ((0, 0), (0, 0), (0, spare), (0, 0)), constant_values=3)
  k_scale, v_scale = np.exp(rng.normal(size=(2, *shape[:-1])))
  return (
    kv_layout.pack_words(jnp.asarray(k)),
    jnp.asarray(k_scale, jnp.bfloat16),
    kv_layout.pack_values(jnp.asarray(v)),
    jnp.asarray(v_scale, jnp.bfloat16),
  )


def from_codes(k_words, k_scale, v_words, v_scale):
  tokens = k_words.shape[2]
  by_token = lambda x: jnp.swapaxes(x, 1, 2)
  return kv_layout.prefill_operands(
    by_token(kv_layout.unpack_words(k_words)),
    by_token(k_scale),
    by_token(kv_layout.unpack_values(v_words)[:, :, :tokens]),
    by_token(v_scale),
  )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_program_equals_codes(shape):
  k_words, k_scale, v_words, v_scale = cache(*shape)
  k, v, *rest = map(np.asarray, from_codes(k_words, k_scale, v_words, v_scale))
  sizes = kernel.sizes_of(k_words, v_words)
  out = [np.zeros(x.shape, x.dtype) for x in kernel.outputs_of(sizes)]
  refs = [np.asarray(k_words), np.asarray(v_words), *out]
  kernel.program(NumpyThreads(sizes.ctas), sizes, *refs)
  taken = np.asarray(kv_layout.unpack_words(jnp.asarray(out[2]))) != 0
  rest_of_words = kv_layout.token_operands(
    k_scale, v_scale, jnp.asarray(taken.reshape(*shape[:2], -1))
  )
  made = out[0].reshape(k.shape), out[1].reshape(v.shape), *rest_of_words
  check(made, (k, v, *rest), tokens=shape[2])


def check(got, want, tokens):
  """Beyond the last token values may be anything that is finite."""
  for i, (ours, theirs) in enumerate(zip(got, want)):
    ours, theirs = (np.asarray(x).astype(np.float32) for x in (ours, theirs))
    if i == 1:
      assert np.isfinite(ours).all()
      ours, theirs = ours[..., :tokens], theirs[..., :tokens]
    np.testing.assert_array_equal(ours, theirs)


def test_lowers_for_cuda():
  operands = cache(*SHAPES[1])
  lowered = (
    jax.jit(kernel.prefill_operands)
    .trace(*operands)
    .lower(lowering_platforms=("cuda",))
  )
  assert lowered.as_text().count("@mosaic_gpu_v2") == 1
  want = jax.eval_shape(from_codes, *operands)
  for ours, theirs in zip(lowered.out_info, want):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_says_what_it_cannot_do():
  k_words, k_scale, v_words, v_scale = cache(1, 1, 32, 32)
  with pytest.raises(NotImplementedError):
    kernel.prefill_operands(k_words, k_scale, v_words, v_scale)


@pytest.mark.slow
@deviceless.needs_plugin
def test_compiles_without_spills_or_copies(tmp_path, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  operands = cache(*SHAPES[0])
  program = deviceless.compile_for_hopper(kernel.prefill_operands, operands)
  assert " copy(" not in program.as_text()
  [report] = [path.read_text() for path in tmp_path.glob("*.ptxas")]
  assert " 0 bytes spill stores" in report


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_codes(shape):
  operands = cache(*shape)
  got = jax.jit(kernel.prefill_operands)(*operands)
  want = jax.jit(from_codes)(*operands)
  check(got, want, tokens=shape[2])
