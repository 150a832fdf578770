"""Small random Llama checkpoints in the Hugging Face layout.

Written apart from the library: only NumPy, safetensors and the published
tensor names. `numpy.random.RandomState` never changes its stream, so a seed
names the same weights on every machine and NumPy version.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROPE = {
  "default": {"rope_type": "default", "rope_theta": 10000.0},
  "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
  "llama3": {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  },
}


def hf_config(
  *, style: int = 5, rope: str = "default", **overrides: Any
) -> dict[str, Any]:
  """Returns a `config.json` as transformers 4 or 5 (`style`) writes it."""
  config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 320,
  }
  parameters = dict(ROPE[rope])
  if style == 5:
    config |= {"dtype": "bfloat16", "rope_parameters": parameters}
  else:
    config["torch_dtype"] = "bfloat16"
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = None if rope == "default" else parameters
  return config | overrides


def hf_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  """Returns float32 tensors, by Hugging Face name and layout (out, in)."""
  random = np.random.RandomState(seed)
  hidden, ffn = config["hidden_size"], config["intermediate_size"]
  q = config["num_attention_heads"] * config["head_dim"]
  kv = config["num_key_value_heads"] * config["head_dim"]

  def matrix(rows, columns):
    values = random.standard_normal((rows, columns)) / np.sqrt(columns)
    return values.astype(np.float32)

  def norm():
    return (1 + 0.1 * random.standard_normal(hidden)).astype(np.float32)

  embedding = random.standard_normal((config["vocab_size"], hidden))
  tensors = {"model.embed_tokens.weight": embedding.astype(np.float32)}
  for i in range(config["num_hidden_layers"]):
    tensors |= {
      f"model.layers.{i}.{name}.weight": values
      for name, values in (
        ("input_layernorm", norm()),
        ("self_attn.q_proj", matrix(q, hidden)),
        ("self_attn.k_proj", matrix(kv, hidden)),
        ("self_attn.v_proj", matrix(kv, hidden)),
        ("self_attn.o_proj", matrix(hidden, q)),
        ("post_attention_layernorm", norm()),
        ("mlp.gate_proj", matrix(ffn, hidden)),
        ("mlp.up_proj", matrix(ffn, hidden)),
        ("mlp.down_proj", matrix(hidden, ffn)),
      )
    }
  tensors["model.norm.weight"] = norm()
  if not config["tie_word_embeddings"]:
    tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
  return tensors


def write_checkpoint(
  path: Path,
  config: dict[str, Any],
  tensors: dict[str, np.ndarray],
  *,
  shards: int = 1,
) -> Path:
  """Writes `config.json`, the weights, and an index when sharded."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(config, indent=2))
  names = list(tensors)
  weight_map = {}
  for i in range(shards):
    file = (
      "model.safetensors"
      if shards == 1
      else f"model-{i + 1:05}-of-{shards:05}.safetensors"
    )
    part = {name: tensors[name] for name in names[i::shards]}
    save_file(part, path / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  if shards > 1:
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path


def write_tokenizer(path: Path) -> None:
  """Writes a byte-level tokenizer: ids 0-255 bytes, 256 bos, 257 eos."""
  from tokenizers import AddedToken, Tokenizer, decoders, models
  from tokenizers import pre_tokenizers as pre

  vocabulary = {c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))}
  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
  )
  tokenizer.save(str(path / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
  }
  (path / "tokenizer_config.json").write_text(json.dumps(settings))
