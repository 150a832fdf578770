"""An lm_head in INT4 or e4m3, from the recipe to the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_llama

from fireq_jax import checkpoint
from fireq_jax import recipe as recipes
from fireq_jax.config import GenerateConfig
from fireq_jax.errors import ConfigError, QuantizationError
from fireq_jax.generate import generate
from fireq_jax.loading import load_model
from fireq_jax.models import llama
from fireq_jax.pallas.layouts import PackedInt4
from fireq_jax.pipeline import Source, quantize_model
from fireq_jax.prepare import prepare
from fireq_jax.qtensor import QTensor
from fireq_jax.recipe import Override, Recipe, Solver, WeightFormat

CONFIG = small_llama.config(
  vocab_size=192, hidden_size=128, intermediate_size=256, head_dim=64
)
TOKENS = np.random.default_rng(0).integers(0, 192, (2, 7), np.int32)
BF16_INPUTS = WeightFormat(group=64, scale="bf16", activation="bf16")
E4M3 = WeightFormat(codes="e4m3")


def quantise(head, config=CONFIG, **options):
  """The float model, the same with its head quantised, and the recipe."""
  params = llama.init_params(config, jax.random.key(0))
  # A gain that matters, so that one left out shows.
  gain = jnp.linspace(0.5, 2, config.hidden_size).astype(jnp.bfloat16)
  params["model"]["norm"]["weight"] = gain
  recipe = Recipe(name="head", head=head, **options)
  source = Source.from_params(params)
  return params, quantize_model(source, config, recipe, TOKENS), recipe


def values(w: QTensor) -> np.ndarray:
  """What codes and scales stand for, f64 [V, D], in NumPy."""
  packed = np.asarray(w.codes)
  if w.is_e4m3:
    return packed.astype(np.float64) * np.asarray(w.scale)
  codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(w.shape)
  codes = np.where(codes > 7, codes.astype(int) - 16, codes)
  scale = np.asarray(w.scale).astype(np.float32)
  products = codes * np.repeat(scale, w.group, axis=1)
  if w.scale.dtype == jnp.float8_e4m3fn:
    products = np.clip(products, -448, 448).astype(ml_dtypes.float8_e4m3fn)
  return products.astype(np.float64) / float(w.tensor_scale)


def head_inputs(params, config, tokens=TOKENS) -> np.ndarray:
  """What the head multiplies, f64 [B, T, D]: logits of an identity."""
  identity = jnp.eye(config.hidden_size, dtype=jnp.bfloat16)
  probe = params | {"lm_head": {"kernel": identity}}
  logits, _ = llama.forward(probe, jnp.asarray(tokens), config=config)
  return np.asarray(logits, np.float64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
  "head",
  [
    WeightFormat(),
    WeightFormat(group=32, codes="full"),
    BF16_INPUTS,
    E4M3,
    dataclasses.replace(E4M3, activation="bf16"),
  ],
)
def test_logits_are_products_with_the_codes(head, tied):
  config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
  params, quantised, recipe = quantise(head, config)
  weight = quantised["lm_head"]["kernel"]
  assert isinstance(weight, QTensor)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(quantised) == shapes(llama.abstract_params(config, recipe))

  exact = params["model"]["embed_tokens"]["embedding"]
  if not tied:
    exact = params["lm_head"]["kernel"].T
  miss = values(weight) - np.asarray(exact, np.float64)
  least, most = (0.01, 0.04) if weight.is_e4m3 else (0.05, 0.2)
  assert least < np.linalg.norm(miss) / np.linalg.norm(exact) < most

  want = head_inputs(quantised, config) @ values(weight).T
  ready = prepare(jax.device_put(quantised))
  packed = ready["lm_head"]["kernel"]
  assert isinstance(packed, QTensor if weight.is_e4m3 else PackedInt4)
  for tree in (jax.device_put(quantised), ready):
    logits, _ = llama.forward(tree, TOKENS, config=config)
    assert logits.dtype == jnp.float32
    # e4m3 rounds inputs by 3 % at most, 1.5 % on average.
    miss = np.linalg.norm(logits - want) / np.linalg.norm(want)
    assert miss < (0.03 if head.activation == "e4m3" else 1e-5)


def test_the_solver_finds_scales_and_needs_no_moments():
  params, published, _ = quantise(WeightFormat())
  search = Solver(scale="search")
  _, searched, _ = quantise(WeightFormat(), solver=search)
  full = dataclasses.replace(search, weighted=True, gptq=True)
  _, solved, _ = quantise(WeightFormat(), solver=full)
  want = np.asarray(params["lm_head"]["kernel"], np.float64).T
  miss = lambda tree: np.square(values(tree["lm_head"]["kernel"]) - want).sum()
  assert miss(searched) < 0.95 * miss(published)
  jax.tree.map(np.testing.assert_array_equal, searched, solved)


def test_a_quantised_head_is_refused_as_source():
  _, once, recipe = quantise(WeightFormat())
  with pytest.raises(QuantizationError, match="head lm_head.*already"):
    quantize_model(Source.from_params(once), CONFIG, recipe)


def test_donated_codes_are_deleted_and_the_rest_is_kept():
  _, quantised, _ = quantise(WeightFormat())
  placed = jax.device_put(quantised)
  ready = prepare(placed, donate=True)
  assert placed["lm_head"]["kernel"].codes.is_deleted()
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ready))


def test_only_the_head_can_be_e4m3():
  for options in (
    {"weight": E4M3},
    {"overrides": (Override(projections=("o_proj",), weight=E4M3),)},
  ):
    with pytest.raises(ConfigError, match="only lm_head"):
      Recipe(name="bad", **options)
  named = recipes.from_dict({"name": "x", "head": {"codes": "e4m3"}})
  assert named.head == E4M3


@pytest.mark.parametrize("head", [WeightFormat(), E4M3])
def test_the_demo_model_from_quantising_to_tokens(tmp_path, head):
  model = load_model("demo")
  config = model.config
  recipe = dataclasses.replace(recipes.load("w4a16"), name="test", head=head)
  quantised = quantize_model(Source.from_params(model.params), config, recipe)
  path = tmp_path / "ckpt"
  checkpoint.save(path, quantised, config=config, recipe=recipe)
  manifest = checkpoint.inspect(path, verify=True)
  stored = manifest.leaves["lm_head/kernel/codes"].logical_dtype
  assert stored == ("float8_e4m3fn" if head == E4M3 else "int4")
  loaded = checkpoint.load(path)
  assert loaded.recipe == recipe
  jax.tree.map(np.testing.assert_array_equal, loaded.params, quantised)

  weight = values(quantised["lm_head"]["kernel"])
  for params in (loaded.params, prepare(loaded.params)):
    tokens = generate(
      params,
      jnp.asarray(TOKENS),
      jnp.full(2, TOKENS.shape[1]),
      config=config,
      kv=recipe.kv,
      options=GenerateConfig(max_new_tokens=5),
    ).tokens
    # Each is the likeliest after those before it, but for rounded inputs.
    text = np.concatenate([TOKENS, tokens], axis=1)[:, :-1]
    logits = head_inputs(loaded.params, config, text) @ weight.T
    logits = logits[:, TOKENS.shape[1] - 1 :]
    chosen = np.take_along_axis(logits, np.asarray(tokens)[..., None], axis=2)
    below = logits.max(axis=2) - chosen[..., 0]
    assert below.max() < 0.1 * logits.std()
