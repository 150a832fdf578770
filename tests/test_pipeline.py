"""Whole models through every recipe."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from fireq_jax import pipeline, solve
from fireq_jax import recipe as recipes
from fireq_jax.config import KVFormat
from fireq_jax.errors import ConfigError, QuantizationError
from fireq_jax.models import llama
from fireq_jax.pipeline import LayerReport, Source, quantize_model
from fireq_jax.qtensor import QTensor
from fireq_jax.recipe import Override, Recipe, Solver, WeightFormat

CONFIG = small_llama.config(
  hidden_size=128,
  intermediate_size=256,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=64,
  tie_word_embeddings=True,
)
PARAMS = llama.init_params(CONFIG, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 48), np.int32)
RECIPES = {name: recipes.load(name) for name in recipes.presets()} | {
  "best": dataclasses.replace(
    recipes.load("best"), tuning=recipes.Tuning(steps=3)
  ),
  "best-with-gptq": dataclasses.replace(
    recipes.load("best"),
    solver=Solver(scale="search", gptq=True),
    tuning=recipes.Tuning(steps=3),
  ),
  "everything": Recipe(
    name="everything",
    weight=WeightFormat(group=64),
    kv=recipes.load("fireq").kv,
    solver=Solver(scale="search", weighted=True, gptq=True),
    scaling=recipes.ChannelScaling(
      qkv=0.02, o=0.02, gate_up=0.02, down=0.02, awq=(0.0, 0.5)
    ),
    keys=recipes.KeyScaling(alpha=8.0, beta=8.0, top_k=4),
    rotation=recipes.Rotation(residual=True),
    head=WeightFormat(group=64),
    overrides=(
      Override(layers=(-1,), projections=("down_proj", "q_proj")),
      Override(
        layers=(0,),
        projections=("up_proj",),
        weight=WeightFormat(group=32, scale="bf16", activation="bf16"),
      ),
    ),
  ),
}


def quantize(recipe, params=PARAMS, tokens=TOKENS, **options):
  source = Source.from_params(params)
  return quantize_model(source, CONFIG, recipe, tokens, **options)


def logits(params, kv=None):
  params, tokens = jax.device_put((params, TOKENS))
  return llama.forward(params, tokens, config=CONFIG, kv=kv)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_the_described_tree_and_a_close_model(name):
  recipe = RECIPES[name]
  reports: list[LayerReport] = []
  params = quantize(recipe, on_layer=reports.append)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(params) == shapes(llama.abstract_params(CONFIG, recipe))
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
  assert [r.index for r in reports] == [0, 1]
  errors = [r.weight_error for r in reports]
  if recipe.weight is None:
    assert errors == [0, 0]
  else:
    assert all(0.05 < e < 0.2 for e in errors)
  want = logits(PARAMS)
  miss = logits(params, recipe.kv) - want
  distance = np.sqrt(np.square(miss).mean()) / np.std(want)
  assert distance < {"none": 1e-6}.get(name, 0.3)


def test_the_reported_error_is_that_of_the_weights():
  reports: list[LayerReport] = []
  params = quantize(RECIPES["w4a16"], tokens=None, on_layer=reports.append)
  for report, layer, exact in zip(
    reports, params["model"]["layers"], PARAMS["model"]["layers"]
  ):
    miss = total = 0.0
    for name, block in recipes.PROJECTIONS.items():
      kernel = np.asarray(exact[block][name]["kernel"], np.float64)
      value = np.asarray(layer[block][name]["kernel"].dequantize()).T
      miss += np.square(value - kernel).sum()
      total += np.square(kernel).sum()
    assert report.weight_error == pytest.approx((miss / total) ** 0.5, rel=1e-4)


def test_gptq_brings_logits_closer_on_calibration_data():
  plain = Recipe(
    name="plain",
    weight=WeightFormat(activation="bf16"),
    solver=Solver(scale="search"),
  )
  corrected = dataclasses.replace(
    plain, solver=Solver(scale="search", gptq=True)
  )
  want = logits(PARAMS)
  distance = lambda recipe: np.square(logits(quantize(recipe)) - want).mean()
  assert distance(corrected) < 0.5 * distance(plain)


def test_the_same_data_gives_the_same_bytes():
  recipe = RECIPES["best"]
  jax.tree.map(
    np.testing.assert_array_equal, quantize(recipe), quantize(recipe)
  )


@pytest.mark.parametrize("gain", [3.0, np.nan])
def test_a_layer_that_training_made_worse_stays(monkeypatch, gain):
  def spoil(exact, quantized, *inputs, **options):
    norm = {"weight": gain * quantized["input_layernorm"]["weight"]}
    return quantized | {"input_layernorm": norm}, None

  monkeypatch.setattr(pipeline.tune, "tune_layer", spoil)
  untrained = dataclasses.replace(RECIPES["best"], tuning=recipes.Tuning())
  jax.tree.map(
    np.testing.assert_array_equal,
    quantize(RECIPES["best"]),
    quantize(untrained),
  )


def test_windows_may_run_together():
  layer = PARAMS["model"]["layers"][0]
  rng = np.random.default_rng(2)
  windows = jnp.asarray(rng.normal(size=(3, 16, 128)), jnp.bfloat16)
  run = lambda parts: (
    pipeline._run_windows(layer, parts, CONFIG, moment=True),
    [
      functools.reduce(
        lambda moment, x: solve._add_moment(
          moment, layer, x, site=site, config=CONFIG, kv=KVFormat()
        ),
        parts,
        jnp.zeros((size, size)),
      )
      for site, size in zip(solve.READERS, (128, 256, 128, 256))
    ],
  )
  close = functools.partial(np.testing.assert_allclose, rtol=0.02, atol=0.01)
  (outputs, *seen), moments = run([windows[:2], windows[2:]])
  (single, *alone), others = run([x[None] for x in windows])
  close(*(np.concatenate(x, dtype=np.float32) for x in (outputs, single)))
  jax.tree.map(close, (seen, moments), (alone, others))


def test_overrides_reach_their_weights():
  recipe = RECIPES["everything"]
  layers = quantize(recipe)["model"]["layers"]
  assert layers[1]["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
  up = layers[0]["mlp"]["up_proj"]["kernel"]
  assert isinstance(up, QTensor)
  assert (up.group, up.activation) == (32, "bf16")


@pytest.mark.parametrize(
  "name, tokens",
  [
    ("best", np.zeros((2, 16), np.int32)),
    ("fireq", np.array([[5]], np.int32)),
  ],
)
def test_degenerate_calibration_gives_finite_models(name, tokens):
  """All tokens alike, and one token of one window."""
  params = quantize(RECIPES[name], tokens=tokens)
  assert np.isfinite(logits(params)).all()


@pytest.mark.parametrize("shape", [(7,), (33, 40), (3, 500)])
def test_weights_reach_the_device_whole(monkeypatch, shape):
  monkeypatch.setattr(pipeline, "_BLOCK", 1000)
  x = np.random.default_rng(0).normal(size=shape).astype(np.float16)
  for view in (x, x.T, x[::2], jnp.asarray(x)):
    np.testing.assert_array_equal(pipeline._on_device(view), view)


def with_kernel(value, name="v_proj", layer=1):
  params = jax.tree.map(lambda x: x, PARAMS)
  attn = params["model"]["layers"][layer]["self_attn"]
  attn[name]["kernel"] = value(attn[name]["kernel"])
  return params


def test_an_outlier_of_1e4_stays_finite():
  params = with_kernel(lambda k: k.at[3, 7].set(1e4), "k_proj")
  got = quantize(RECIPES["fireq"], params)
  for leaf in jax.tree.leaves(got):
    assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_what_is_not_finite_is_refused_by_name():
  bad = with_kernel(lambda k: k.at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf))
  with pytest.raises(
    QuantizationError, match="layer 1 self_attn/v_proj/kernel.*2 of them"
  ):
    quantize(RECIPES["w4a16"], bad)
  huge = with_kernel(lambda k: jnp.full_like(k, 3e38), "k_proj", layer=0)
  with pytest.raises(QuantizationError, match="layer 0: .*activations"):
    quantize(RECIPES["fireq"], huge)


def test_a_quantised_model_is_refused():
  once = quantize(RECIPES["w4a16"], tokens=None)
  with pytest.raises(QuantizationError, match="layer 0 .*already.*uint8"):
    quantize(RECIPES["w4a16"], once)


def test_missing_tokens_and_unfit_recipes_are_refused_before_reading():
  def read(*_):
    raise AssertionError("read")

  source = Source(embedding=read, layer=read, head=read)
  with pytest.raises(ConfigError, match="tokens are missing"):
    quantize_model(source, CONFIG, RECIPES["fireq"])
  with pytest.raises(ConfigError, match="does not divide"):
    quantize_model(
      source,
      dataclasses.replace(CONFIG, intermediate_size=192),
      RECIPES["w4a16"],
    )
