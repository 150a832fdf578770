"""Both generations of `config.json` become the same configuration."""

import dataclasses
import json

import pytest
import tiny_llama

from fireq_jax.config import LlamaConfig, RopeConfig
from fireq_jax.errors import ConfigError
from fireq_jax.plain import from_plain, to_plain


@pytest.mark.parametrize("rope", tiny_llama.ROPE)
def test_both_styles_are_the_same_model(rope):
  four = LlamaConfig.from_hf(tiny_llama.hf_config(style=4, rope=rope))
  five = LlamaConfig.from_hf(tiny_llama.hf_config(style=5, rope=rope))
  assert four == five
  assert hash(four) == hash(five)
  parameters = dict(tiny_llama.ROPE[rope])
  assert four.rope.type == parameters.pop("rope_type")
  assert four.rope.theta == parameters.pop("rope_theta")
  for name, value in parameters.items():
    assert getattr(four.rope, name) == value


def test_old_key_of_rope_type_and_the_alias_of_version_5():
  scaling = {"type": "linear", "factor": 2}
  old = tiny_llama.hf_config(style=4, rope_scaling=scaling)
  expected = RopeConfig(theta=10000.0, type="linear", factor=2.0)
  assert LlamaConfig.from_hf(old).rope == expected
  new = tiny_llama.hf_config(style=5)
  both = new | {"rope_scaling": new["rope_parameters"], "rope_theta": 1e4}
  assert LlamaConfig.from_hf(both) == LlamaConfig.from_hf(new)


def test_keys_that_the_first_llama_2_files_lack():
  config = tiny_llama.hf_config(style=4, num_attention_heads=4)
  for key in (
    "attention_bias",
    "head_dim",
    "mlp_bias",
    "num_key_value_heads",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
  ):
    del config[key]
  read = LlamaConfig.from_hf(config)
  assert read.num_key_value_heads == 4
  assert read.head_dim == 32
  assert read.rope == RopeConfig(theta=10000.0)
  assert read.tie_word_embeddings is False


def test_head_dim_is_not_hidden_size_over_heads():
  config = tiny_llama.hf_config(head_dim=64, num_attention_heads=3)
  config |= {"num_key_value_heads": 1}
  assert LlamaConfig.from_hf(config).head_dim == 64


@pytest.mark.parametrize(
  "config_ids, generation_ids, expected",
  [
    (257, None, (257,)),
    (None, None, ()),
    ([1, 2], None, (1, 2)),
    ([1, 2], {}, (1, 2)),
    (1, {"eos_token_id": None}, (1,)),
    (1, {"eos_token_id": 1}, (1,)),
    (3, {"eos_token_id": [1, 3, 2]}, (3, 1, 2)),
    (None, {"eos_token_id": [1, 2]}, (1, 2)),
    ([], {"eos_token_id": 2}, (2,)),
  ],
)
def test_eos_is_the_union_of_both_files(config_ids, generation_ids, expected):
  config = tiny_llama.hf_config(eos_token_id=config_ids)
  read = LlamaConfig.from_hf(config, generation_ids)
  assert read.eos_token_ids == expected


@pytest.mark.parametrize("rope", tiny_llama.ROPE)
def test_survives_json(rope):
  config = LlamaConfig.from_hf(
    tiny_llama.hf_config(rope=rope, eos_token_id=[1, 2])
  )
  text = json.dumps(to_plain(config))
  assert from_plain(LlamaConfig, json.loads(text), "config") == config


def test_checks_hold_without_a_file_too():
  config = LlamaConfig.from_hf(tiny_llama.hf_config())
  for change in (
    {"head_dim": 96},
    {"num_key_value_heads": 3},
    {"rms_norm_eps": float("nan")},
    {"eos_token_ids": (320,)},
    {"vocab_size": True},
  ):
    with pytest.raises(ConfigError, match=next(iter(change)).rstrip("s")):
      dataclasses.replace(config, **change)
  with pytest.raises(ConfigError, match="rope factor"):
    RopeConfig(theta=1e4, type="linear", factor=float("inf"))


# As published with the models; keys we do not read are left out.
PUBLISHED = {
  "Llama-2-7b": dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    rms_norm_eps=1e-05,
    max_position_embeddings=4096,
    rope_scaling=None,
    tie_word_embeddings=False,
    eos_token_id=2,
  ),
  "TinyLlama-1.1B": dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    rms_norm_eps=1e-05,
    max_position_embeddings=2048,
    rope_scaling=None,
    tie_word_embeddings=False,
    eos_token_id=2,
  ),
  "Llama-3.1-8B-Instruct": dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-05,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=dict(
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
      rope_type="llama3",
    ),
    tie_word_embeddings=False,
    eos_token_id=[128001, 128008, 128009],
  ),
  "Llama-3.2-1B": dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-05,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=dict(
      factor=32.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
      rope_type="llama3",
    ),
    tie_word_embeddings=True,
    eos_token_id=128001,
  ),
}


@pytest.mark.parametrize(
  "name, head_dim, factor",
  [
    ("Llama-2-7b", 128, 1.0),
    ("TinyLlama-1.1B", 64, 1.0),
    ("Llama-3.1-8B-Instruct", 128, 8.0),
    ("Llama-3.2-1B", 64, 32.0),
  ],
)
def test_published_models_are_read(name, head_dim, factor):
  values = PUBLISHED[name] | {"model_type": "llama", "hidden_act": "silu"}
  config = LlamaConfig.from_hf(values)
  assert config.head_dim == head_dim
  assert config.rope.factor == factor
  assert config.rope.theta == values.get("rope_theta", 10000.0)
