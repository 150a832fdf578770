"""The forward pass against NumPy in float64, and its own laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
import small_llama
from flax import nnx

from fireq_jax.config import KVFormat, RopeConfig
from fireq_jax.errors import ConfigError
from fireq_jax.kv_cache import init_cache
from fireq_jax.models import llama, llama_layers
from fireq_jax.qtensor import QTensor, pack_int4

GQA = small_llama.config(
  vocab_size=61,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)
MODELS = {
  "gqa": GQA,
  "mha": dataclasses.replace(GQA, num_key_value_heads=4),
  "mqa, head 32, tied": dataclasses.replace(
    GQA, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True
  ),
  "head 64, llama3": dataclasses.replace(
    GQA,
    head_dim=64,
    rope=RopeConfig(
      theta=500000.0,
      type="llama3",
      factor=8.0,
      original_max_position_embeddings=32,
    ),
  ),
  "head 128, linear": dataclasses.replace(
    GQA,
    head_dim=128,
    rope=RopeConfig(theta=10000.0, type="linear", factor=2.0),
  ),
}
INT4 = KVFormat(cache="int4")
FORMATS = {
  "bf16": KVFormat(),
  "int4": INT4,
  "int4, e4m3 scale and query": KVFormat(
    cache="int4", scale="e4m3", query="e4m3"
  ),
  "e4m3": KVFormat(cache="e4m3", scale="f32", query="e4m3"),
}

run = jax.jit(llama.forward, static_argnames=("config", "last_only", "kv"))


def lively_params(config, dtype=jnp.float32):
  """Random parameters large enough for tokens to disagree."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: llama.init_params(config, jax.random.key(0)))

  def draw(x):
    values = rng.normal(size=x.shape)
    values = 1 + 0.3 * values if len(x.shape) == 1 else 0.2 * values
    return jnp.asarray(values.astype(dtype))

  return jax.tree.map(draw, shapes)


def prompts(batch, length):
  rng = np.random.default_rng(batch + length)
  return jnp.asarray(rng.integers(0, GQA.vocab_size, (batch, length), np.int32))


@pytest.mark.parametrize("name", MODELS)
def test_f32_equals_numpy(name):
  config = MODELS[name]
  params, tokens = lively_params(config), prompts(2, 11)
  got, cache = run(params, tokens, config=config)
  assert cache is None and got.dtype == jnp.float32
  for row, sequence in zip(got, np.asarray(tokens), strict=True):
    want = numpy_llama.forward(params, sequence, config)
    assert np.abs(want).max() > 3
    np.testing.assert_allclose(row, want, atol=2e-4)


def test_bf16_is_as_close_as_bf16_can_be():
  params, tokens = lively_params(GQA, jnp.bfloat16), prompts(1, 12)
  got, _ = run(params, tokens, config=GQA)
  assert got.dtype == jnp.float32
  want = numpy_llama.forward(params, np.asarray(tokens[0]), GQA)
  error = np.sqrt(np.mean((got[0] - want) ** 2) / np.mean(want**2))
  assert error < 0.03


def test_int4_keys_and_values_equal_numpy():
  params, tokens = lively_params(GQA), prompts(1, 10)
  exact = KVFormat(cache="int4", scale="f32")
  got, _ = run(params, tokens, config=GQA, kv=exact)
  sequence = np.asarray(tokens[0])
  want = numpy_llama.forward(params, sequence, GQA, numpy_llama.round_int4)
  plain = numpy_llama.forward(params, sequence, GQA)
  assert np.abs(want - plain).max() > 0.05
  np.testing.assert_allclose(got[0], want, atol=5e-4)


def test_quantised_projections_equal_numpy():
  config = dataclasses.replace(GQA, hidden_size=64, intermediate_size=64)
  params = lively_params(config)
  rng = np.random.default_rng(0)

  def quantised(kernel):
    inputs, outputs = kernel.shape
    codes = rng.integers(-7, 8, (outputs, inputs), np.int8)
    scale = rng.uniform(0.05, 0.1, (outputs, inputs // 32))
    return QTensor(
      codes=pack_int4(jnp.asarray(codes)),
      scale=jnp.asarray(scale, jnp.bfloat16),
      tensor_scale=jnp.float32(2),
      activation="bf16",
    )

  as_float = params
  for layer in params["model"]["layers"]:
    for part in ("self_attn", "mlp"):
      for projection in layer[part].values():
        projection["kernel"] = quantised(projection["kernel"])
  tokens = prompts(1, 9)
  got, _ = run(params, tokens, config=config)
  as_float = jax.tree.map(
    lambda x: x.dequantize().T if isinstance(x, QTensor) else x,
    params,
    is_leaf=lambda x: isinstance(x, QTensor),
  )
  want = numpy_llama.forward(as_float, np.asarray(tokens[0]), config)
  np.testing.assert_allclose(got[0], want, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_cache_and_cacheless_are_the_same_computation(name):
  params, tokens = lively_params(GQA, jnp.bfloat16), prompts(2, 9)
  kv = FORMATS[name]
  want, _ = run(params, tokens, config=GQA, kv=kv)
  got, cache = run(params, tokens, init_cache(GQA, 2, 16, kv), config=GQA)
  np.testing.assert_array_equal(cache.lengths, [9, 9])
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_equal_the_whole(name):
  """Prefill of n + 1 tokens = prefill of n and one decode step, and so on.

  The same keys and values are quantised and the same codes are read; in f32
  only the order of sums differs.
  """
  params, tokens = lively_params(GQA), prompts(2, 9)
  kv = FORMATS[name]
  whole, full = run(params, tokens, init_cache(GQA, 2, 12, kv), config=GQA)
  cache, parts, at = init_cache(GQA, 2, 12, kv), [], 0
  for size in (3, 5, 1):
    part = tokens[:, at : at + size]
    logits, cache = run(params, part, cache, config=GQA)
    parts.append(logits)
    at += size
  np.testing.assert_array_equal(
    cache.layers[0].k[:, :, :9], full.layers[0].k[:, :, :9]
  )
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-4)


@pytest.mark.parametrize("name", ["bf16", "int4, e4m3 scale and query"])
def test_ragged_rows_equal_each_alone(name):
  """Two ragged chunks a row, against each row alone at its own length."""
  params, kv = lively_params(GQA), FORMATS[name]
  tokens = prompts(3, 10)
  first, second = jnp.array([5, 1, 3]), jnp.array([2, 4, 0])
  cache = init_cache(GQA, 3, 16, kv)
  _, cache = run(params, tokens[:, :6], cache, config=GQA, counts=first)
  got, cache = run(
    params, tokens[:, 6:], cache, config=GQA, counts=second, last_only=True
  )
  np.testing.assert_array_equal(cache.lengths, first + second)
  assert got.shape == (3, GQA.vocab_size)
  for row, (a, b) in enumerate(zip(first, second, strict=True)):
    if b == 0:
      continue
    alone = jnp.concatenate([tokens[row, :a], tokens[row, 6 : 6 + b]])
    want, _ = run(params, alone[None], config=GQA, kv=kv)
    np.testing.assert_allclose(got[row], want[0, -1], atol=2e-4)


def test_padding_is_never_seen():
  params, tokens = lively_params(GQA), prompts(2, 8)
  counts = jnp.array([5, 3])
  padding = jnp.arange(8) >= counts[:, None]
  other = jnp.where(padding, (tokens + 1) % GQA.vocab_size, tokens)
  got = [
    run(params, t, config=GQA, counts=counts, last_only=True)[0]
    for t in (tokens, other)
  ]
  np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_key_scale_leaves_the_float_function(kv_heads):
  config = dataclasses.replace(GQA, num_key_value_heads=kv_heads)
  params, tokens = lively_params(config), prompts(1, 8)
  want, _ = run(params, tokens, config=config)
  for i, layer in enumerate(params["model"]["layers"]):
    scale = np.random.default_rng(i).uniform(0.2, 5, (kv_heads, 16))
    layer["self_attn"]["key_scale"] = jnp.asarray(scale, jnp.float32)
  got, _ = run(params, tokens, config=config)
  np.testing.assert_allclose(got, want, atol=2e-4)
  # It reaches the keys that are cached.
  assert not np.allclose(
    run(params, tokens, config=config, kv=INT4)[0], want, atol=2e-2
  )


def test_captured_activations():
  params, tokens = lively_params(GQA), prompts(1, 6)
  layer = params["model"]["layers"][0]
  layer["self_attn"]["key_scale"] = jnp.full((2, 16), 3.0)
  x = params["model"]["embed_tokens"]["embedding"][tokens]
  span = llama_layers.make_span(GQA, jnp.zeros(1, jnp.int32), jnp.array([6]), 6)
  run_layer = jax.jit(
    llama_layers.decoder_layer, static_argnames=("config", "capture")
  )
  out, cache, got = run_layer(layer, x, span=span, config=GQA, capture=True)
  assert cache is None
  plain = run_layer(layer, x, span=span, config=GQA)
  assert plain[1:] == (None, None)
  np.testing.assert_allclose(out, plain[0], atol=1e-5)
  f64 = lambda x: np.asarray(x, np.float64)
  qkv_in = numpy_llama.norm(
    f64(x), f64(layer["input_layernorm"]["weight"]), GQA.rms_norm_eps
  )
  k = qkv_in @ f64(layer["self_attn"]["k_proj"]["kernel"])
  k = k.reshape(1, 6, 2, 16)
  inv = numpy_llama.frequencies(GQA.rope, 16)
  turned = [
    [numpy_llama.rotate(head, t, inv) for head in row]
    for t, row in enumerate(k[0])
  ]
  np.testing.assert_allclose(got["qkv_in"], qkv_in, atol=1e-5)
  np.testing.assert_allclose(got["k_pre_rope"], k, atol=1e-4)
  np.testing.assert_allclose(got["k_post_rope"][0], turned, atol=1e-4)
  attended = f64(got["o_in"]) @ f64(layer["self_attn"]["o_proj"]["kernel"])
  middle = f64(x) + attended
  np.testing.assert_allclose(
    got["gate_up_in"],
    numpy_llama.norm(
      middle,
      f64(layer["post_attention_layernorm"]["weight"]),
      GQA.rms_norm_eps,
    ),
    atol=1e-4,
  )
  down = f64(got["down_in"]) @ f64(layer["mlp"]["down_proj"]["kernel"])
  np.testing.assert_allclose(out, middle + down, atol=1e-4)


def test_ids_outside_the_vocabulary_are_never_other_tokens():
  params = lively_params(GQA)
  for bad in (-1, GQA.vocab_size):
    logits, _ = run(params, jnp.array([[3, bad], [3, 4]]), config=GQA)
    assert np.isnan(logits[0, 1]).all() and np.isfinite(logits[1]).all()


def test_kv_format_is_the_caches():
  with pytest.raises(ConfigError, match="cache"):
    llama.forward(
      lively_params(GQA),
      prompts(1, 2),
      init_cache(GQA, 1, 4, INT4),
      config=GQA,
      kv=INT4,
    )


def test_module_face_equals_function():
  params, tokens = lively_params(GQA), prompts(2, 5)
  graph, state = nnx.split(llama.Llama(GQA, params))

  @jax.jit
  def call(state, tokens, cache):
    return nnx.merge(graph, state)(tokens, cache, last_only=True)

  got, cache = call(state, tokens, init_cache(GQA, 2, 8, INT4))
  want, _ = run(params, tokens, config=GQA, kv=INT4, last_only=True)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_array_equal(cache.lengths, [5, 5])
