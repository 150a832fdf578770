"""Weights that are valid but awkward quantise to finite values (ST12, ST13)."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from harness import load

from fireq_jax import pipeline, recipe
from fireq_jax.models import llama

Q = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def zero(tensors):
  """A whole tensor, one output row, and one group of another."""
  tensors[Q][:] = 0
  tensors[GATE][3] = 0
  tensors[DOWN][5, :128] = 0


def tiny(tensors):
  tensors[Q][:] = 1e-30
  tensors[GATE][3] = -1e-38
  tensors[DOWN][5, :128] = 2.0**-133


def zero_channels(tensors):
  """Channels that smoothing would divide by."""
  tensors["model.layers.0.input_layernorm.weight"][7] = 0
  tensors[GATE][:, 9] = 0
  tensors["model.layers.0.self_attn.k_proj.weight"][4] = 0
  tensors["model.layers.0.self_attn.v_proj.weight"][4] = 0


@pytest.mark.parametrize("name", ["fireq", "fireq-bf16-scale"])
@pytest.mark.parametrize("change", [zero, tiny, zero_channels])
def test_awkward_weights_stay_finite(name, change, tmp_path):
  config = tiny_llama.hf_config(num_hidden_layers=1)
  tensors = tiny_llama.hf_tensors(config)
  change(tensors)
  tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  tiny_llama.write_checkpoint(tmp_path, config, tensors)
  params, config = load(tmp_path)
  tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
  steps = recipe.load(name)
  quantised = pipeline.quantize_model(
    pipeline.Source.from_params(params), config, steps, tokens
  )
  forward = jax.jit(llama.forward, static_argnames=("config", "kv"))
  logits, _ = forward(
    quantised, jnp.asarray(tokens), config=config, kv=steps.kv
  )
  assert np.isfinite(np.asarray(logits)).all()
  layer = quantised["model"]["layers"][0]
  weights = {
    "q": layer["self_attn"]["q_proj"]["kernel"],
    "gate": layer["mlp"]["gate_proj"]["kernel"],
    "down": layer["mlp"]["down_proj"]["kernel"],
  }
  for weight in weights.values():
    assert np.all(np.asarray(weight.scale, np.float32) > 0)
  if change is zero:
    assert not np.asarray(weights["q"].dequantize()).any()
    assert not np.asarray(weights["gate"].dequantize())[3].any()
    assert not np.asarray(weights["down"].dequantize())[5, :128].any()
