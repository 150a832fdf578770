"""Execution parameters compute what the parameters they come from compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from fireq_jax.config import KVFormat
from fireq_jax.errors import ConfigError
from fireq_jax.models.llama import forward, init_params
from fireq_jax.pallas.layouts import PackedInt4
from fireq_jax.pipeline import Source, quantize_model
from fireq_jax.prepare import prepare
from fireq_jax.qtensor import QTensor
from fireq_jax.recipe import Override, Recipe, WeightFormat

W4A8 = WeightFormat(group=32)
KEEP_O = Override(layers=(1,), projections=("o_proj",))
KEEP_V = Override(layers=(0,), projections=("v_proj", "gate_proj"))


def quantised(weight, ffn=128, overrides=()):
  config = small_llama.config(
    hidden_size=64,
    intermediate_size=ffn,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  )
  params = init_params(config, jax.random.key(0))
  recipe = Recipe(name="test", weight=weight, overrides=overrides)
  tree = quantize_model(Source.from_params(params), config, recipe)

  def widen(leaf):  # so that rounding of activations hides nothing
    return leaf if isinstance(leaf, QTensor) else leaf.astype(jnp.float32)

  is_weight = lambda leaf: isinstance(leaf, QTensor)
  tree = jax.tree.map(widen, tree, is_leaf=is_weight)
  return jax.tree.map(jnp.asarray, tree), config


@pytest.mark.parametrize(
  "weight, ffn, overrides",
  [
    (W4A8, 128, ()),
    (W4A8, 96, ()),
    (WeightFormat(group=64, scale="bf16", codes="full"), 128, ()),
    (WeightFormat(group=32, activation="bf16", scale="bf16"), 128, ()),
    (W4A8, 128, (KEEP_O, KEEP_V)),
    (None, 128, ()),
  ],
)
def test_prepared_model_gives_the_same_logits(weight, ffn, overrides):
  params, config = quantised(weight, ffn, overrides)
  ready = prepare(params)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 64)
  run = jax.jit(
    lambda p: forward(p, tokens, config=config, kv=KVFormat(cache="int4"))[0]
  )
  got, want = np.asarray(run(ready)), np.asarray(run(params))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * want.std())


def test_projections_are_fused_where_their_formats_agree():
  params, _ = quantised(W4A8, overrides=(KEEP_O, KEEP_V))
  first, second = prepare(params)["model"]["layers"]
  assert set(first["self_attn"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
  assert set(first["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
  assert set(second["self_attn"]) == {"qkv_proj", "o_proj"}
  assert set(second["mlp"]) == {"gate_up_proj", "down_proj"}
  assert isinstance(first["self_attn"]["q_proj"]["kernel"], PackedInt4)
  assert isinstance(first["self_attn"]["v_proj"]["kernel"], jax.Array)
  assert isinstance(second["self_attn"]["o_proj"]["kernel"], jax.Array)
  assert second["mlp"]["gate_up_proj"]["kernel"].gated


def test_donated_parameters_are_deleted_and_the_rest_is_kept():
  params, _ = quantised(W4A8)
  codes = params["model"]["layers"][0]["self_attn"]["q_proj"]["kernel"].codes
  ready = prepare(params, donate=True)
  assert codes.is_deleted()
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ready))


def test_preparing_twice_is_refused():
  params, _ = quantised(W4A8)
  with pytest.raises(ConfigError, match="prepared already"):
    prepare(prepare(params))
