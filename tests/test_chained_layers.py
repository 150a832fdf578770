"""Layers cut at their attentions compute what layers one by one compute.

Wiring only, with the kernels replaced by their definitions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
from benchmarks.generate import random_params

from fireq_jax import kv_cache
from fireq_jax import recipe as recipes
from fireq_jax.models import llama_layers
from fireq_jax.models.llama import forward
from fireq_jax.pallas import reference

CONFIG = small_llama.config(
  hidden_size=2048,
  intermediate_size=2048,
  num_hidden_layers=2,
  num_attention_heads=16,
  num_key_value_heads=2,
  head_dim=128,
)
RECIPE = recipes.load("best")


@pytest.fixture(scope="module")
def params():
  return random_params(CONFIG, RECIPE)


@pytest.fixture
def chained(monkeypatch):
  """How often the chain was called, after `forward` takes that path."""
  calls = []

  def chain(x, a, stages, counters, *, eps):
    calls.append(len(stages))
    return reference.decode_chain(x, a, stages, eps=eps)

  def nowhere(*_, **__):
    raise NotImplementedError

  monkeypatch.setattr(llama_layers, "require_hopper", lambda **_: None)
  monkeypatch.setattr(llama_layers, "rope_append", nowhere)
  monkeypatch.setattr(llama_layers.decode_chain, "decode_chain", chain)
  return calls


def cache_of(params, batch):
  """A cache that holds five tokens of each row."""
  cache = kv_cache.init_cache(CONFIG, batch, 32, RECIPE.kv)
  tokens = jnp.arange(batch * 5, dtype=jnp.int32).reshape(batch, 5)
  return forward(params, tokens, cache, config=CONFIG, implementation="xla")[1]


@pytest.mark.parametrize("shape", [(3, 1), (1, 2)])
def test_chained_layers_agree_with_layers_one_by_one(params, chained, shape):
  cache = cache_of(params, shape[0])
  tokens = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape) + 7
  run = lambda implementation: forward(
    params, tokens, cache, config=CONFIG, implementation=implementation
  )
  got, cache_got = run("auto")
  assert chained == [1, 4, 3]  # qkv; o, gate and up, down, qkv; the last three
  wanted, cache_wanted = run("xla")
  assert chained == [1, 4, 3]
  np.testing.assert_allclose(got, wanted, rtol=0, atol=0.02 * wanted.std())
  same = jax.tree.map(lambda a, b: (a == b).mean(), cache_got, cache_wanted)
  assert min(jax.tree.leaves(same)) > 0.99


def test_what_the_chain_cannot_do_runs_layer_by_layer(params, chained):
  many = jnp.zeros((1, 9), jnp.int32)
  forward(params, many, cache_of(params, 1), config=CONFIG)
  first = params["model"]["layers"][0]
  float_mlp = first | {
    "mlp": first["mlp"] | {"down_proj": {"kernel": jnp.zeros((2048, 2048))}}
  }
  layers = [float_mlp, params["model"]["layers"][1]]
  x = jnp.zeros((1, 1, 2048), jnp.bfloat16)
  assert not llama_layers.chains(layers, x, "auto")
  assert not llama_layers.chains(params["model"]["layers"], x, "xla")
  assert llama_layers.chains(params["model"]["layers"], x, "auto")
  assert not chained
