"""A model split over four devices is the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
from jax.sharding import AxisType, PartitionSpec

from fireq_jax import checkpoint, kv_cache, pipeline, recipe, sharding
from fireq_jax.config import (
  GenerateConfig,
  KVFormat,
)
from fireq_jax.errors import ConfigError, UnsupportedError
from fireq_jax.generate import generate
from fireq_jax.models import llama
from fireq_jax.prepare import prepare

CONFIG = small_llama.config(
  vocab_size=256,
  hidden_size=128,
  intermediate_size=256,
  num_hidden_layers=2,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=32,
  max_position_embeddings=128,
)
# INT4 weights in every way to split them; no activation is rounded to few bits,
# so that results depend on the order of sums only in their last bits.
RECIPE = recipe.from_dict(
  {
    "name": "smooth",
    "weight": {"group": 32, "activation": "bf16"},
    "head": {"group": 32, "activation": "bf16"},
    "keys": {"beta": 8.0, "top_k": 4},
    "overrides": [{"layers": [1], "projections": ["o_proj", "up_proj"]}],
  }
)
FP8 = dataclasses.replace(
  RECIPE, weight=recipe.WeightFormat(group=32), kv=KVFormat(cache="int4")
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12), np.int32)


def mesh_of(count, axis_type=AxisType.Auto, name=sharding.AXIS):
  return jax.make_mesh(
    (count,),
    (name,),
    axis_types=(axis_type,),
    devices=jax.devices("cpu")[:count],
  )


def save(path, steps):
  float_params = llama.init_params(CONFIG, jax.random.key(1))
  # Larger weights, so that no two logits are nearly equal.
  float_params = jax.tree.map(lambda x: x * jnp.bfloat16(4), float_params)
  params = pipeline.quantize_model(
    pipeline.Source.from_params(float_params), CONFIG, steps, TOKENS
  )
  checkpoint.save(path, params, config=CONFIG, recipe=steps)
  return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return save(tmp_path_factory.mktemp("sharding") / "ckpt", RECIPE)


def run(params, kv):
  """Logits f32 [B, T, V] and greedily generated tokens [B, 6]."""
  logits = jax.jit(
    lambda params: llama.forward(
      params, jnp.asarray(TOKENS), config=CONFIG, kv=kv
    )[0]
  )(params)
  output = generate(
    params,
    jnp.asarray(TOKENS),
    jnp.asarray([12, 7]),
    config=CONFIG,
    kv=kv,
    options=GenerateConfig(max_new_tokens=6),
  )
  return np.asarray(logits), np.asarray(output.tokens)


@pytest.fixture(scope="module")
def whole(saved):
  """Parameters on one device, and what they give."""
  params = checkpoint.load(saved).params
  return params, *run(params, RECIPE.kv)


@pytest.mark.parametrize(
  "count, axis_type", [(2, AxisType.Explicit), (4, AxisType.Auto)]
)
def test_sharded_model_gives_the_same_tokens(saved, whole, count, axis_type):
  params, logits, tokens = whole
  split = checkpoint.load(saved, mesh_of(count, axis_type)).params
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(split)):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  split_logits, split_tokens = run(split, RECIPE.kv)
  np.testing.assert_allclose(split_logits, logits, rtol=0.05, atol=0.1)
  np.testing.assert_array_equal(split_tokens, tokens)


def test_parameters_of_several_devices_are_not_prepared(saved):
  params = checkpoint.load(saved, mesh_of(2)).params
  with pytest.raises(UnsupportedError, match="one device.*parameters on 2"):
    prepare(params)


def test_rounded_activations_see_the_whole_row(tmp_path):
  """A row's scale spans all devices; a few values fall on the other side."""
  path = save(tmp_path / "ckpt", FP8)
  logits, _ = run(checkpoint.load(path).params, FP8.kv)
  split, _ = run(checkpoint.load(path, mesh_of(2)).params, FP8.kv)
  close = np.isclose(split, logits, rtol=0.05, atol=0.1)
  assert close.mean() > 0.8


def test_each_device_holds_its_part(saved):
  params = checkpoint.load(saved, mesh_of(4)).params
  attention = params["model"]["layers"][0]["self_attn"]

  def local(x):
    return x.addressable_shards[1].data.shape

  q, o = attention["q_proj"]["kernel"], attention["o_proj"]["kernel"]
  assert local(q.codes) == (64, 64) and local(q.scale) == (64, 4)
  assert local(o.codes) == (128, 32) and local(o.scale) == (128, 2)
  assert local(attention["key_scale"]) == (1, 32)
  head = params["lm_head"]["kernel"]
  assert local(head.codes) == (64, 64) and local(head.scale) == (64, 4)
  second = params["model"]["layers"][1]
  assert local(second["self_attn"]["o_proj"]["kernel"]) == (64, 128)
  assert local(second["mlp"]["up_proj"]["kernel"]) == (128, 64)
  embedding = params["model"]["embed_tokens"]["embedding"]
  assert local(embedding) == embedding.shape


def test_a_vocabulary_that_does_not_divide_is_replicated():
  config = dataclasses.replace(CONFIG, vocab_size=254)
  for steps in (RECIPE, recipe.load("none")):
    params = llama.abstract_params(config, steps)
    placed = sharding.param_shardings(params, config, mesh_of(4))
    for leaf in jax.tree.leaves(placed["lm_head"]):
      assert leaf.spec == PartitionSpec()
  placed = sharding.param_shardings(
    llama.abstract_params(CONFIG, recipe.load("none")), CONFIG, mesh_of(4)
  )
  assert placed["lm_head"]["kernel"].spec == PartitionSpec(None, "tp")


def test_cache_splits_on_kv_heads():
  cache = jax.eval_shape(
    lambda: kv_cache.init_cache(CONFIG, 2, 16, KVFormat(cache="int4"))
  )
  shardings = sharding.cache_shardings(cache, mesh_of(4))
  for leaf, placed in zip(
    jax.tree.leaves(cache.layers), jax.tree.leaves(shardings.layers)
  ):
    shape = list(leaf.shape)
    shape[1] //= 4
    assert list(placed.shard_shape(leaf.shape)) == shape
  assert shardings.lengths.spec == PartitionSpec()


def test_mesh_that_does_not_divide_is_refused_by_name(saved):
  with pytest.raises(ConfigError, match="layer 0 k_proj.*1 or 2 or 4"):
    checkpoint.load(saved, mesh_of(3))
  with pytest.raises(ConfigError, match="no axis 'tp'"):
    checkpoint.load(saved, mesh_of(2, name="data"))


def test_groups_are_never_split():
  """Llama 2 7B: 11008 / 4 is 21.5 groups of 128."""
  config = dataclasses.replace(
    CONFIG,
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    num_hidden_layers=1,
  )
  quantized = llama.abstract_params(config, recipe.load("w4a16"))
  with pytest.raises(ConfigError, match="down_proj.*of 1 or 2$"):
    sharding.param_shardings(quantized, config, mesh_of(4))
  sharding.param_shardings(quantized, config, mesh_of(2))
  in_floats = llama.abstract_params(config, recipe.load("none"))
  sharding.param_shardings(in_floats, config, mesh_of(4))
