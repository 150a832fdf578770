"""Smoothing and rotation leave the float model as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from fireq_jax import keys as key_scaling
from fireq_jax import rotate, smooth
from fireq_jax.calibrate import window_stats
from fireq_jax.config import LlamaConfig
from fireq_jax.models import llama, llama_layers
from fireq_jax.recipe import ChannelScaling, KeyScaling
from fireq_jax.rope import apply_rope, cos_sin

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), "int32")


def make_config(**changes) -> LlamaConfig:
  sizes = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
  }
  return small_llama.config(**sizes | changes)


CONFIGS = {
  "gqa": make_config(),
  "mha": make_config(num_attention_heads=2, num_key_value_heads=2),
  "mqa": make_config(num_attention_heads=4, num_key_value_heads=1),
}


def random_params(config, dtype=jnp.float32):
  """Random weights with channels, pairs and gains of very unequal size."""
  params = llama.init_params(config, jax.random.key(0), dtype)
  rng = np.random.default_rng(1)
  for layer in params["model"]["layers"]:
    attn = layer["self_attn"]
    for name in ("input_layernorm", "post_attention_layernorm"):
      gain = np.exp(rng.normal(size=config.hidden_size))
      layer[name]["weight"] = jnp.asarray(gain, dtype)
    for name in ("k_proj", "v_proj"):
      kernel = attn[name]["kernel"].astype(jnp.float32)
      size = np.exp(rng.normal(size=kernel.shape[1]))
      attn[name]["kernel"] = (3 * kernel * size).astype(dtype)
  gain = np.exp(rng.normal(size=config.hidden_size))
  params["model"]["norm"]["weight"] = jnp.asarray(gain, dtype)
  return params


def logits(params, config):
  return llama.forward(params, TOKENS, config=config)[0]


def capture(params, config):
  model = params["model"]
  x = model["embed_tokens"]["embedding"][TOKENS[:1]]
  counts = jnp.full(1, x.shape[1], jnp.int32)
  span = llama_layers.make_span(config, counts * 0, counts, x.shape[1])
  layer = model["layers"][0]
  return llama_layers.decoder_layer(
    layer, x, span=span, config=config, capture=True
  )[2]


def with_layers(params, change):
  layers = [change(layer) for layer in params["model"]["layers"]]
  return params | {"model": params["model"] | {"layers": layers}}


SCALINGS = {
  "qkv": ChannelScaling(qkv=0.02),
  "o": ChannelScaling(o=0.02, statistic="abs_max"),
  "gate_up": ChannelScaling(gate_up=0.0096),
  "down": ChannelScaling(down=0.015),
  "constant": ChannelScaling(
    qkv=3.0, o=0.3, gate_up=2.0, down=0.5, statistic="constant"
  ),
  "v_mul": ChannelScaling(v_mul=0.9),
  "all": ChannelScaling(qkv=0.02, o=0.1, gate_up=0.01, down=0.1, v_mul=0.7),
}
KEYS = {
  "before": KeyScaling(alpha=8.0),
  "after": KeyScaling(beta=8.0, top_k=3),
  "both": KeyScaling(alpha=2.0, beta=4.0, top_k=5),
}


def check_same_function(config, before, after):
  """f32 logits agree to 1e-5; bf16 ones lose no more than rounding takes.

  That is: they are at most twice as far from the f32 logits as they were.
  """
  dtype = before["model"]["embed_tokens"]["embedding"].dtype
  want = logits(jax.tree.map(lambda x: x.astype(jnp.float32), before), config)
  distance = lambda x: np.sqrt(np.square(np.asarray(x - want)).mean())
  if dtype == jnp.float32:
    difference = np.abs(np.asarray(logits(after, config) - want))
    assert difference.max() < 1e-5 * np.abs(np.asarray(want)).max()
  else:
    rounding = distance(logits(before, config))
    assert distance(logits(after, config)) < 2 * rounding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("name", SCALINGS)
def test_channel_scaling_preserves_the_float_function(name, shape, dtype):
  config = CONFIGS[shape]
  params = random_params(config, dtype)
  factors = lambda layer: smooth.channel_factors(layer, SCALINGS[name], config)
  folded = with_layers(params, lambda x: smooth.fold(x, factors(x)))
  check_same_function(config, params, folded)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("name", KEYS)
def test_key_scaling_preserves_the_float_function(name, shape, dtype):
  config = CONFIGS[shape]
  params = random_params(config, dtype)
  stats = window_stats(capture(params, config), moment=False)
  key, key_scale = key_scaling.published_scales(stats, KEYS[name])
  factors = dataclasses.replace(
    smooth.identity(config), key=key, key_scale=key_scale
  )
  folded = with_layers(params, lambda x: smooth.fold(x, factors))
  check_same_function(config, params, folded)


@pytest.mark.parametrize("name", KEYS)
def test_scaled_keys_have_the_size_asked_for(name):
  """Every ordinary pair has radius alpha, every outlier magnitude beta."""
  config, keys = CONFIGS["gqa"], KEYS[name]
  params = random_params(config)
  stats = window_stats(capture(params, config), moment=False)
  key, key_scale = key_scaling.published_scales(stats, keys)
  factors = dataclasses.replace(
    smooth.identity(config), key=key, key_scale=key_scale
  )
  seen = capture(
    with_layers(params, lambda layer: smooth.fold(layer, factors)), config
  )
  half = config.head_dim // 2
  k = np.asarray(seen["k_pre_rope"])[0]
  radius = np.hypot(k[..., :half], k[..., half:]).max(0)
  peak = np.asarray(stats.key_max)
  for head in range(config.num_key_value_heads):
    top = np.argsort(-peak[head])[: keys.top_k] % half
    outlier = np.isin(np.arange(half), top)
    if keys.alpha:
      np.testing.assert_allclose(radius[head][~outlier], keys.alpha, rtol=1e-4)
    if keys.top_k:
      k_after = np.asarray(seen["k_post_rope"] * key_scale)[0, :, head]
      np.testing.assert_allclose(
        np.abs(k_after).max(0)[np.tile(outlier, 2)], keys.beta, rtol=1e-4
      )
      assert (np.asarray(key_scale)[head][~np.tile(outlier, 2)] == 1).all()
      assert (np.asarray(key)[head][np.tile(outlier, 2)] == 1).all()


@pytest.mark.parametrize(
  "statistic, constant", [("abs_mean", 0.015), ("abs_max", 0.1)]
)
def test_scaled_weights_have_the_size_asked_for(statistic, constant):
  """Against NumPy over what each channel meets, GQA's sharing included."""
  config = CONFIGS["gqa"]
  layer = random_params(config)["model"]["layers"][0]
  scaling = ChannelScaling(
    statistic=statistic,
    qkv=constant,
    o=constant,
    gate_up=constant,
    down=constant,
    v_mul=0.9,
  )
  folded = smooth.fold(layer, smooth.channel_factors(layer, scaling, config))
  attn, mlp = folded["self_attn"], folded["mlp"]
  reduce = {"abs_mean": np.mean, "abs_max": np.max}[statistic]
  kernel = lambda p: np.abs(np.asarray(p["kernel"], np.float64))
  original = {
    name: kernel(layer["self_attn"][name])
    for name in ("q_proj", "k_proj", "v_proj")
  }
  ratio = kernel(attn["q_proj"]) / original["q_proj"]
  wanted = constant / reduce(np.concatenate(list(original.values()), 1), axis=1)
  np.testing.assert_allclose(
    ratio, np.tile(wanted[:, None], ratio.shape[1]), rtol=1e-4
  )
  o = kernel(attn["o_proj"]).reshape(2, 3, 32, 96)
  np.testing.assert_allclose(reduce(o, axis=(1, 3)), constant, rtol=1e-4)
  np.testing.assert_allclose(
    reduce(kernel(mlp["down_proj"]), axis=1), constant, rtol=1e-4
  )
  before = {n: kernel(layer["mlp"][n]) for n in ("gate_proj", "up_proj")}
  ratio = kernel(mlp["gate_proj"])[:, 0] / before["gate_proj"][:, 0]
  size = reduce(np.concatenate(list(before.values()), 1), axis=1)
  np.testing.assert_allclose(ratio * size, constant, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", CONFIGS)
def test_fitted_keys_and_values_preserve_the_float_function(shape, dtype):
  config = CONFIGS[shape]
  params = random_params(config, dtype)
  captured = capture(params, config)
  moment = window_stats(captured, moment=True).qkv_moment

  def change(layer):
    kernel = layer["self_attn"]["q_proj"]["kernel"]
    power = key_scaling.query_power(kernel, moment, config)
    scale, shift = key_scaling.fit_scales(
      captured["k_pre_rope"][0], power, config
    )
    layer = rotate.change_value_basis(layer, moment, config.head_dim)
    return smooth.fold(
      layer,
      dataclasses.replace(
        smooth.identity(config), key_scale=scale, key_shift=shift
      ),
    )

  check_same_function(config, params, with_layers(params, change))


def rounded(x):
  """INT4 with one step per row, in NumPy."""
  step = np.abs(x).max(axis=-1, keepdims=True) / 7
  return np.round(x / step) * step


def test_fitted_keys_have_less_error_in_their_scores():
  """Keys with a mean, unequal channels and unequal queries."""
  config = make_config(num_attention_heads=1, num_key_value_heads=1)
  rng = np.random.default_rng(0)
  pairs = lambda spread: np.tile(np.exp(rng.normal(size=16) * spread), 2)
  size, query_size = pairs(1.0), pairs(0.7)
  before = rng.normal(size=(512, 1, 32)) * size + 3 * size
  power = jnp.asarray(query_size[None] ** 2, jnp.float32)
  scale, shift = key_scaling.fit_scales(
    jnp.asarray(before, jnp.float32), power, config
  )
  positions = jnp.asarray(rng.integers(0, 64, (1, 512)), jnp.int32)
  cos, sin = cos_sin(positions, config.rope, 32)
  keys = np.asarray(apply_rope(jnp.asarray(before)[None], cos, sin))[0, :, 0]
  queries = rng.normal(size=(64, 32)) * query_size

  def error(scale, shift):
    kept = (rounded(keys * scale - shift) + shift) / scale
    scores = queries @ (kept - keys).T
    return np.square(scores - scores.mean(axis=1, keepdims=True)).mean()

  pair_radius = np.tile(np.hypot(keys[:, :16], keys[:, 16:]).max(0), 2)
  published = error(8 / pair_radius, 0.0)
  fitted = error(np.asarray(scale)[0], np.asarray(shift)[0])
  assert fitted < 0.6 * published


def test_the_value_basis_is_better_whatever_the_model_did_to_it():
  rng = np.random.default_rng(1)
  values = rng.normal(size=(4096, 32)) @ rng.normal(size=(32, 32))
  readers = rng.normal(size=(32, 96)) * np.exp(rng.normal(size=(32, 1)))

  def error(values, readers):
    basis, inverse = map(
      np.asarray,
      rotate.value_basis(
        jnp.asarray(values.T @ values, jnp.float32),
        jnp.asarray(readers @ readers.T, jnp.float32),
      ),
    )
    np.testing.assert_allclose(basis @ inverse, np.eye(32), atol=1e-3)
    miss = rounded(values @ basis) @ inverse - values
    return np.square(miss @ readers).mean()

  plain = np.square((rounded(values) - values) @ readers).mean()
  found = error(values, readers)
  assert found < 0.7 * plain
  outlier = np.where(np.arange(32) == 3, 32.0, 1.0)
  again = error(values * outlier, readers / outlier[:, None])
  assert abs(again - found) < 0.05 * found


def test_channels_of_zeros_keep_their_scale():
  config = CONFIGS["gqa"]
  layer = jax.tree.map(
    jnp.zeros_like, random_params(config)["model"]["layers"][0]
  )
  factors = smooth.channel_factors(layer, SCALINGS["all"], config)
  folded = smooth.fold(layer, factors)
  assert all(not np.asarray(x).any() for x in jax.tree.leaves(folded))


@pytest.mark.parametrize("size", [1, 2, 3, 12, 64, 96, 160, 320])
def test_rotations_are_orthogonal_and_spread(size):
  matrix = rotate.orthogonal(size).astype(np.float64)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
  assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6 or size == 1
  if size & (size - 1) == 0:
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("hidden", [64, 96])
@pytest.mark.parametrize("tied", [True, False])
def test_residual_rotation_preserves_the_float_function(tied, hidden, dtype):
  config = make_config(hidden_size=hidden, tie_word_embeddings=tied)
  params = random_params(config, dtype)
  model, matrix = params["model"], jnp.asarray(rotate.orthogonal(hidden))
  head = {"norm": model["norm"]}
  if not tied:
    head["lm_head"] = params["lm_head"]
  head = rotate.rotate_head(head, model["embed_tokens"]["embedding"], matrix)
  rotated = {
    "model": {
      **rotate.rotate_embedding(
        {"embed_tokens": model["embed_tokens"]}, matrix
      ),
      "layers": [rotate.rotate_layer(x, matrix) for x in model["layers"]],
      "norm": head["norm"],
    },
    "lm_head": head["lm_head"],
  }
  check_same_function(config, params, rotated)
