import dataclasses

import pytest
import small_llama
import yaml

from fireq_jax import recipe as recipes
from fireq_jax.config import KVFormat, LlamaConfig
from fireq_jax.errors import ConfigError
from fireq_jax.recipe import KeyScaling, Override, Recipe, WeightFormat


def config(**changes) -> LlamaConfig:
  sizes = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
  }
  return small_llama.config(**sizes | changes)


@pytest.mark.parametrize("name", recipes.presets())
def test_preset_says_what_it_is_and_survives_a_round_trip(name, tmp_path):
  recipe = recipes.load(name)
  assert recipe.name == name
  path = tmp_path / "copy.yaml"
  path.write_text(recipes.dumps(recipe))
  assert recipes.load(path) == recipe
  recipe.check_model(config())


def test_presets_are_those_promised():
  promised = {"best", "fireq", "fireq-bf16-scale", "w4a16", "kv4-only", "none"}
  assert promised <= set(recipes.presets())


def test_the_published_constants():
  recipe = recipes.load("fireq")
  assert recipe.weight == WeightFormat(codes="full")
  assert recipe.kv == KVFormat(cache="int4", scale="e4m3", query="e4m3")
  assert recipe.keys == KeyScaling(alpha=8, beta=8, top_k=8)
  scaling = recipe.scaling
  assert (scaling.qkv, scaling.o, scaling.gate_up, scaling.down) == (
    0,
    0,
    0.0096,
    0.015,
  )
  assert (scaling.statistic, scaling.v_mul) == ("abs_mean", 0.9)


def test_a_recipe_with_every_field_set_survives_a_round_trip():
  recipe = Recipe(
    name="all",
    weight=WeightFormat(group=64, scale="bf16"),
    head=WeightFormat(group=32),
    overrides=(
      Override(layers=(0, -1)),
      Override(projections=("down_proj",), weight=WeightFormat(group=32)),
    ),
    scaling=recipes.ChannelScaling(down=1e-7, awq=(0.0, 0.3)),
    solver=recipes.Solver(scale="search", gptq=True),
    tuning=recipes.Tuning(steps=7, batch=2, weight_rate=0.5),
  )
  text = recipes.dumps(recipe)
  assert recipes.from_dict(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize(
  "text, message",
  [
    ("name: a\nwieght: null", "unknown key 'wieght', did you mean 'weight'?"),
    ("name: a\nweight: {gruop: 64}", "weight: unknown key 'gruop'.*'group'"),
    ("name: a\nhead: {gruop: 64}", "head: unknown key 'gruop'.*'group'"),
    ("name: a\nweight: {group: 100}", "unsupported weight group.*got 100"),
    ("name: a\nweight: {group: -1}", "unsupported weight group.*got -1"),
    ("name: a\nweight: {group: true}", "group: wrong type, expected int"),
    ("name: a\nweight: {scale: f8}", "unknown scale, expected e4m3 or bf16"),
    ("name: a\nscaling: {down: '0.1'}", "down: wrong type, expected float"),
    ("name: a\nscaling: {down: .nan}", "down must be finite"),
    ("name: a\nscaling: {v_mul: 0}", "v_mul must be positive"),
    ("name: a\nkeys: {beta: 8.0}", "beta and top_k"),
    ("name: a\nkeys: {fit: true, alpha: 8.0}", "fit replaces alpha"),
    ("name: a\nsolver: {gptq: true}", "gptq need the scale search"),
    ("name: a\ntuning: {steps: -1}", "steps must not be negative"),
    ("name: a\ntuning: {batch: 0}", "batch must be positive"),
    ("name: a\ntuning: {weight_rate: -0.1}", "weight_rate must be finite"),
    ("name: a\ntuning: {settling: 1.0}", "settling must be below 1"),
    ("name: a\nkv: {cache: int4, codes: half}", "unknown kv codes format"),
    ("name: a\nkv: {cache: int3}", "cache format"),
    ("name: a\nscaling: {awq: 1.0}", "awq: not a list"),
    ("name: a\noverrides: [{projections: [q]}]", "unknown projection 'q'"),
    ("weight: null", "no 'name'"),
    ("[1, 2]", "not a mapping"),
    ("name: [", "not YAML"),
    ("", "not a mapping"),
  ],
)
def test_an_invalid_file_gets_one_clear_line(tmp_path, text, message):
  path = tmp_path / "bad.yaml"
  path.write_text(text)
  with pytest.raises(ConfigError, match=message) as error:
    recipes.load(path)
  assert "\n" not in str(error.value)
  assert str(path) in str(error.value)


def test_an_unknown_preset_gets_a_hint():
  with pytest.raises(ConfigError, match="did you mean 'fireq'"):
    recipes.load("firq")


def test_overrides_apply_in_order():
  small = WeightFormat(group=32)
  recipe = Recipe(
    name="mixed",
    weight=WeightFormat(),
    overrides=(
      Override(projections=("down_proj",), weight=small),
      Override(layers=(0, -1), weight=None),
    ),
  )
  formats = {
    (layer, name): recipe.weight_format(layer, name, 3)
    for layer in range(3)
    for name in ("q_proj", "down_proj")
  }
  assert formats == {
    (0, "q_proj"): None,
    (0, "down_proj"): None,
    (1, "q_proj"): WeightFormat(),
    (1, "down_proj"): small,
    (2, "q_proj"): None,
    (2, "down_proj"): None,
  }


def test_a_group_that_does_not_divide_names_projection_and_valid_sizes():
  recipe = Recipe(name="r", weight=WeightFormat(group=128))
  with pytest.raises(
    ConfigError, match="192 inputs of down_proj, expected group 32 or 64"
  ):
    recipe.check_model(config(intermediate_size=192))
  with pytest.raises(ConfigError, match="48 inputs of down_proj.*bf16"):
    recipe.check_model(config(intermediate_size=48))
  head = Recipe(name="r", head=WeightFormat(group=128))
  head.check_model(config())
  with pytest.raises(ConfigError, match="192 inputs of lm_head, .* 32 or 64"):
    head.check_model(config(hidden_size=192))
  left_out = dataclasses.replace(
    recipe, overrides=(Override(projections=("down_proj",)),)
  )
  left_out.check_model(config(intermediate_size=48))


def test_overrides_and_top_k_must_fit_the_model():
  with pytest.raises(ConfigError, match="layer.*-3 to 2, got 3"):
    Recipe(name="r", overrides=(Override(layers=(3,)),)).check_model(config())
  recipe = Recipe(name="r", keys=KeyScaling(beta=1.0, top_k=33))
  with pytest.raises(ConfigError, match="top_k is more than half"):
    recipe.check_model(config())
