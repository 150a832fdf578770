"""generate() as compiled for Hopper: made of our kernels, the cache in place.

Where a kernel says that it cannot run, plain JAX takes over without a word, so
a mistake there would only be slow.
"""

import functools
import importlib

import deviceless
import jax
import jax.numpy as jnp
import pytest
import small_llama
from benchmarks.generate import random_params

from fireq_jax import recipe as recipes
from fireq_jax.config import GenerateConfig
from fireq_jax.request import Request

LAYERS = 1
CONFIG = small_llama.config(
  vocab_size=256,
  hidden_size=2048,
  intermediate_size=4096,
  num_hidden_layers=LAYERS,
  num_attention_heads=16,
  num_key_value_heads=4,
  head_dim=128,
  max_position_embeddings=256,
)
# Of a layer: four projections and, for many tokens, their rounding; append and
# attention, which at first has another kernel for its operands. The chain joins
# projections of neighbouring layers.
PREFILL, STEP, CHAINED = 4 * 2 + 3, 4 + 2, 3


@pytest.mark.slow
@deviceless.needs_plugin
@pytest.mark.parametrize(
  "batch, kernels",
  [
    (16, LAYERS * (PREFILL + STEP)),
    (1, LAYERS * (PREFILL + CHAINED) + 1),
  ],
)
def test_generate_is_made_of_kernels(batch, kernels, monkeypatch):
  for name in ("linear", "attention", "models.llama_layers"):
    module = importlib.import_module(f"fireq_jax.{name}")
    monkeypatch.setattr(module, "require_hopper", lambda **_: None)
  generate = importlib.import_module("fireq_jax.generate")
  recipe = recipes.load("fireq")
  request = Request(
    tokens=jnp.zeros((batch, 64), jnp.int32),
    lengths=jnp.full(batch, 64, jnp.int32),
    keys=jax.random.split(jax.random.key(0), batch),
    temperature=None,
    top_p=jnp.ones(batch),
  )
  program = deviceless.compile_for_hopper(
    functools.partial(
      generate._generate.__wrapped__,
      kv=recipe.kv,
      config=CONFIG,
      options=GenerateConfig(max_new_tokens=32),
      implementation="auto",
    ),
    (random_params(CONFIG, recipe), request),
  )
  text = program.as_text()
  assert text.count('custom_call_target="mosaic_gpu_v2"') == kernels
  words = [f"u32[{batch},4,96,16]", f"u32[{batch},4,3,4,128]"]  # k, v
  assert all(shape in text for shape in words)
  lines = [x for x in text.splitlines() if any(shape in x for shape in words)]
  copies = [x for x in lines if " copy(" in x and "copy(%broadcast" not in x]
  assert not copies  # but of zeros, with which caches begin
