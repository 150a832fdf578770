"""Model configuration and options: frozen, validated, hashable."""

import dataclasses
import reprlib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from fireq_jax.errors import ConfigError, UnsupportedError

_frozen = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)

Implementation = Literal["auto", "mosaic_gpu", "xla"]


def check(ok: bool, what: str, **details: Any) -> None:
  """Raises `ConfigError(what, **details)` unless `ok`."""
  if not ok:
    raise ConfigError(what, **details)


def check_implementation(implementation: str) -> None:
  """Raises `ConfigError` unless it is an `Implementation`."""
  known = typing.get_args(Implementation)
  check(
    implementation in known,
    "unknown implementation",
    expected=" or ".join(known),
    got=repr(implementation),
  )


# Beyond any model: sizes are refused before anything is allocated for them.
_MAX_SIZE = 2**24
_MAX_LAYERS = 2**10
_HEAD_DIMS = (16, 32, 64, 128, 256)


def _check_int(name: str, value: Any, least: int, most: int) -> None:
  check(
    type(value) is int and least <= value <= most,
    f"invalid {name}",
    expected=f"an integer from {least} to {most}",
    got=reprlib.repr(value),
  )


def _check_positive(name: str, value: Any, most: float = 1e12) -> None:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  check(
    number and 0 < value <= most,
    f"invalid {name}",
    expected=f"a positive number up to {most:g}",
    got=reprlib.repr(value),
  )


def _check_bool(name: str, value: Any) -> None:
  check(
    isinstance(value, bool),
    f"invalid {name}",
    expected="true or false",
    got=reprlib.repr(value),
  )


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
      _check_positive(f"rope {name}", getattr(self, name))
    _check_int(
      "rope original_max_position_embeddings",
      self.original_max_position_embeddings,
      1,
      _MAX_SIZE,
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

  def __post_init__(self):
    for name in (
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_attention_heads",
      "num_key_value_heads",
      "max_position_embeddings",
    ):
      _check_int(name, getattr(self, name), 1, _MAX_SIZE)
    _check_int("num_hidden_layers", self.num_hidden_layers, 1, _MAX_LAYERS)
    check(
      type(self.head_dim) is int and self.head_dim in _HEAD_DIMS,
      "invalid head_dim",
      expected="one of " + ", ".join(map(str, _HEAD_DIMS)),
      got=reprlib.repr(self.head_dim),
    )
    check(
      self.num_attention_heads % self.num_key_value_heads == 0,
      "num_attention_heads must be a multiple of num_key_value_heads",
      got=f"{self.num_attention_heads} and {self.num_key_value_heads}",
    )
    _check_positive("rms_norm_eps", self.rms_norm_eps, most=1.0)
    _check_bool("tie_word_embeddings", self.tie_word_embeddings)
    if self.bos_token_id is not None:
      _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
    for token in self.eos_token_ids:
      _check_int("eos_token_id", token, 0, self.vocab_size - 1)

  @classmethod
  def from_hf(
    cls,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
  ) -> "LlamaConfig":
    """Reads a `config.json` of transformers 4 or 5.

    Only keys that old Llama files lack have defaults: `num_key_value_heads`
    (as many as query heads), `head_dim` (hidden size over heads),
    `rope_theta` (10000), `tie_word_embeddings` and the biases (false).
    Sequences end at the EOS ids of either file.

    Raises:
      ConfigError: a key is missing or has a value no Llama can have.
      UnsupportedError: a valid model, but not one of this family.
    """
    try:
      _check_family(config)
      heads = _required(config, "num_attention_heads")
      _check_int("num_attention_heads", heads, 1, _MAX_SIZE)
      hidden = _required(config, "hidden_size")
      _check_int("hidden_size", hidden, 1, _MAX_SIZE)
      head_dim = config.get("head_dim")
      if head_dim is None:
        check(
          hidden % heads == 0,
          "hidden_size must be a multiple of num_attention_heads",
          got=f"{hidden} and {heads}",
          hint="or name head_dim",
        )
        head_dim = hidden // heads
      kv_heads = config.get("num_key_value_heads")
      eos_token_ids = _eos_token_ids(config)
      if generation_config is not None:
        eos_token_ids |= _eos_token_ids(generation_config)
      return cls(
        vocab_size=_required(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_required(config, "intermediate_size"),
        num_hidden_layers=_required(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_required(config, "rms_norm_eps"),
        max_position_embeddings=_required(config, "max_position_embeddings"),
        rope=_rope(config),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos_token_ids),
      )
    except ConfigError as error:
      raise ConfigError(str(error), where="config.json") from error


def _required(values: Mapping[str, Any], key: str) -> Any:
  check(values.get(key) is not None, f"no {key!r}")
  return values[key]


def _check_family(config: Mapping[str, Any]) -> None:
  """Raises `UnsupportedError` unless the model computes what a Llama does."""

  def refuse(what: str, value: Any, expected: str) -> None:
    raise UnsupportedError(
      f"unsupported {what}",
      where="config.json",
      expected=expected,
      got=reprlib.repr(value),
    )

  model_type = _required(config, "model_type")
  if model_type != "llama":
    refuse("model_type", model_type, "llama")
  architectures = config.get("architectures") or ["LlamaForCausalLM"]
  if architectures != ["LlamaForCausalLM"]:
    refuse("architectures", architectures, "LlamaForCausalLM")
  activation = _required(config, "hidden_act")
  if activation != "silu":
    refuse("hidden_act", activation, "silu")
  for key in ("attention_bias", "mlp_bias"):
    bias = config.get(key, False)
    _check_bool(key, bias)
    if bias:
      refuse(key, bias, "false")
  if config.get("quantization_config") is not None:
    raise UnsupportedError(
      "the model is quantised already (quantization_config)",
      where="config.json",
      hint="start from the original bf16 model",
    )


_ROPE_KEYS = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
}


def _rope(config: Mapping[str, Any]) -> RopeConfig:
  """Reads `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4)."""
  new, old = config.get("rope_parameters"), config.get("rope_scaling")
  check(
    new is None or old is None or new == old,
    "rope_parameters and rope_scaling disagree",
  )
  parameters = (old if new is None else new) or {}
  check(
    isinstance(parameters, Mapping),
    "invalid rope parameters",
    expected="an object",
    got=reprlib.repr(parameters),
  )
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if not isinstance(kind, str) or kind not in _ROPE_KEYS:
    raise UnsupportedError(
      "unsupported rope_type",
      where="config.json",
      expected=", ".join(_ROPE_KEYS),
      got=reprlib.repr(kind),
    )
  partial = parameters.get("partial_rotary_factor", 1.0)
  if partial != 1.0:
    raise UnsupportedError(
      "unsupported partial_rotary_factor",
      where="config.json",
      expected="1.0",
      got=reprlib.repr(partial),
    )
  theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
  check(
    theta == config.get("rope_theta", theta),
    "two values of rope_theta",
    got=f"{reprlib.repr(theta)} and {reprlib.repr(config.get('rope_theta'))}",
  )
  values = {key: _required(parameters, key) for key in _ROPE_KEYS[kind]}
  return RopeConfig(theta=theta, type=kind, **values)


def _eos_token_ids(values: Mapping[str, Any]) -> dict[int, None]:
  """Returns the ids in order, as the keys of a dict."""
  ids = values.get("eos_token_id")
  ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
  for token in ids:
    _check_int("eos_token_id", token, 0, _MAX_SIZE)
  return dict.fromkeys(ids)


@_frozen
class KVFormat:
  """How keys, values and queries are held during attention.

  `int4` and `e4m3` hold one scale per token and kv head, of dtype `scale`;
  `bf16` holds none. `query` is the dtype queries are rounded to, per token
  and head, before they meet the keys. INT4 `codes` are `symmetric`, [-7, 7]
  with the largest magnitude at 7 (published), or `full`, [-8, 7] with the
  least scale at which nothing lies half a step beyond.
  """

  cache: Literal["int4", "e4m3", "bf16"] = "bf16"
  scale: Literal["bf16", "e4m3", "f32"] = "bf16"
  query: Literal["bf16", "e4m3"] = "bf16"
  codes: Literal["symmetric", "full"] = "symmetric"

  def __post_init__(self):
    for name, allowed in (
      ("cache", ("int4", "e4m3", "bf16")),
      ("scale", ("bf16", "e4m3", "f32")),
      ("query", ("bf16", "e4m3")),
      ("codes", ("symmetric", "full")),
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
    prefill_chunk: prompt tokens per sequence that are read at a time, so that
      a long prompt needs the memory of few; None reads all at once.
  """

  max_new_tokens: int
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int = 0
  top_k: int = 0
  cache_capacity: int | None = None
  prefill_chunk: int | None = None

  def __post_init__(self):
    _check_int("max_new_tokens", self.max_new_tokens, 0, _MAX_SIZE)
    _check_int("pad_token_id", self.pad_token_id, -(2**31), 2**31 - 1)
    _check_int("top_k", self.top_k, 0, _MAX_SIZE)
    for name in ("cache_capacity", "prefill_chunk"):
      if getattr(self, name) is not None:
        _check_int(name, getattr(self, name), 1, _MAX_SIZE)
    check(
      isinstance(self.eos_token_ids, tuple),
      "eos_token_ids must be a tuple",
      got=reprlib.repr(self.eos_token_ids),
    )
    for token in self.eos_token_ids:
      _check_int("eos_token_ids", token, 0, _MAX_SIZE)
