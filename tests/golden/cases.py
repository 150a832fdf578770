"""What the stored Hugging Face logits were computed on; NumPy only."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tiny_llama

LOGITS = Path(__file__).with_name("hf_logits.npz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A random model and the tokens it saw.

  Attributes:
    config: arguments of `tiny_llama.hf_config`.
    length: tokens.
    rows: the last so many positions whose logits are stored.
    query_gain: multiplies query weights, so that attention is selective.
    embedding_gain: multiplies the embedding; small ones make the epsilon of
      the norms count.
  """

  config: dict[str, Any]
  length: int = 32
  rows: int = 32
  query_gain: float = 4.0
  embedding_gain: float = 1.0

  def hf_config(self) -> dict[str, Any]:
    return tiny_llama.hf_config(**self.config)

  def tensors(self) -> dict[str, np.ndarray]:
    """Returns float32 weights by Hugging Face name."""
    tensors = tiny_llama.hf_tensors(self.hf_config(), seed=1)
    for name in tensors:
      if name.endswith("q_proj.weight"):
        tensors[name] *= np.float32(self.query_gain)
    tensors["model.embed_tokens.weight"] *= np.float32(self.embedding_gain)
    return tensors

  def tokens(self) -> np.ndarray:
    vocab = self.hf_config()["vocab_size"]
    random = np.random.RandomState(2)
    return random.randint(0, vocab, size=(1, self.length)).astype(np.int32)

  def columns(self) -> slice:
    """The vocabulary entries whose logits are stored."""
    return slice(None, None, self.hf_config()["vocab_size"] // 64)


CASES = {
  "gqa": Case(config={}),
  "mha": Case(config={"style": 4, "num_key_value_heads": 4}),
  "head_dim": Case(config={"head_dim": 64, "num_key_value_heads": 1}),
  "tied": Case(config={"tie_word_embeddings": True}),
  "eps": Case(config={"rms_norm_eps": 1e-5}, embedding_gain=0.005),
  "linear": Case(config={"style": 4, "rope": "linear"}, length=128),
  "llama3": Case(
    config={
      "style": 4,
      "rope": "llama3",
      "hidden_size": 64,
      "intermediate_size": 64,
      "head_dim": 64,
      "num_attention_heads": 1,
      "num_key_value_heads": 1,
      "max_position_embeddings": 131072,
    },
    length=8320,
    rows=64,
  ),
}
