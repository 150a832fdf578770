"""Model configuration and options: frozen, validated, hashable."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from fireq_jax.errors import ConfigError

_frozen = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)

Implementation = Literal["auto", "mosaic_gpu", "xla"]


def check(ok: bool, what: str, **details: Any) -> None:
  """Raises `ConfigError(what, **details)` unless `ok`."""
  if not ok:
    raise ConfigError(what, **details)


@_frozen
class RopeConfig:
  """Rotary position embedding.

  `linear` divides positions by `factor`; `llama3` interpolates only the low
  frequencies (Llama 3.1), and needs the last three fields as well.
  """

  theta: float
  type: Literal["default", "linear", "llama3"] = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    check(
      self.type in ("default", "linear", "llama3"),
      "unknown rope_type",
      expected="default, linear or llama3",
      got=repr(self.type),
    )
    for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
      value = getattr(self, name)
      check(
        math.isfinite(value) and value > 0,
        f"rope {name} must be positive and finite",
        got=value,
      )
    check(
      self.low_freq_factor < self.high_freq_factor,
      "rope low_freq_factor must be below high_freq_factor",
      got=f"{self.low_freq_factor} and {self.high_freq_factor}",
    )


@_frozen
class LlamaConfig:
  """Shape and constants of a Llama model; field names as in `config.json`."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  max_position_embeddings: int
  rope: RopeConfig
  tie_word_embeddings: bool
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()

  @classmethod
  def from_hf(
    cls,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
  ) -> "LlamaConfig":
    """Reads a `config.json` of transformers 4 or 5.

    Raises:
      ConfigError: a key is missing or has a value no Llama can have.
      UnsupportedError: a valid model, but not one of this family.
    """
    raise NotImplementedError


@_frozen
class KVFormat:
  """How keys, values and queries are held during attention.

  `int4` and `e4m3` hold one scale per token and kv head, of dtype `scale`;
  `bf16` holds none. `query` is the dtype queries are rounded to, per token
  and head, before they meet the keys.
  """

  cache: Literal["int4", "e4m3", "bf16"] = "bf16"
  scale: Literal["bf16", "e4m3", "f32"] = "bf16"
  query: Literal["bf16", "e4m3"] = "bf16"

  def __post_init__(self):
    for name, allowed in (
      ("cache", ("int4", "e4m3", "bf16")),
      ("scale", ("bf16", "e4m3", "f32")),
      ("query", ("bf16", "e4m3")),
    ):
      value = getattr(self, name)
      check(
        value in allowed,
        f"unknown kv {name} format",
        expected=" or ".join(allowed),
        got=repr(value),
      )


@_frozen
class GenerateConfig:
  """What shapes and stops a generation; a change compiles a new program.

  Attributes:
    max_new_tokens: tokens to produce per sequence, at most.
    eos_token_ids: any of these ends a sequence; it is part of the output.
    pad_token_id: fills the output after the end of a sequence.
    top_k: keep the k most likely tokens before sampling; 0 keeps all.
    cache_capacity: tokens per sequence the cache holds; None = prompt length
      plus `max_new_tokens`.
  """

  max_new_tokens: int
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int = 0
  top_k: int = 0
  cache_capacity: int | None = None

  def __post_init__(self):
    check(
      self.max_new_tokens >= 0,
      "max_new_tokens must not be negative",
      got=self.max_new_tokens,
    )
    check(self.top_k >= 0, "top_k must not be negative", got=self.top_k)
    check(
      self.cache_capacity is None or self.cache_capacity > 0,
      "cache_capacity must be positive",
      got=self.cache_capacity,
    )
