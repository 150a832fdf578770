"""The configuration of a Llama small enough for any test."""

from typing import Any

from fireq_jax.config import LlamaConfig, RopeConfig


def config(**changes: Any) -> LlamaConfig:
  """A model of one layer with two query heads and one kv head, or another."""
  values: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope": RopeConfig(theta=10000.0),
    "tie_word_embeddings": False,
  }
  return LlamaConfig(**(values | changes))
