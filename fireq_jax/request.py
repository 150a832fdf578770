"""What a call of `generate` asks for, checked before anything is computed."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.config import GenerateConfig, LlamaConfig, check
from fireq_jax.errors import DataError


@flax.struct.dataclass
class Request:
  """What a call asks for, checked, one value per row.

  Attributes:
    tokens: i32 [B, P].
    lengths: i32 [B].
    keys: PRNG keys [B]; row b's t-th token uses fold_in(keys[b], t).
    temperature: f32 [B], or None if all are 0: the program then only takes
      the most likely tokens.
    top_p: f32 [B].
  """

  tokens: jax.Array
  lengths: jax.Array
  keys: jax.Array
  temperature: jax.Array | None
  top_p: jax.Array


def check_request(
  tokens: Any,
  lengths: Any,
  config: LlamaConfig,
  options: GenerateConfig,
  key: Any,
  temperature: Any,
  top_p: Any,
) -> Request:
  """Returns the request, or raises what is wrong with it."""
  ids, sizes, heat, nucleus = map(
    _values, (tokens, lengths, temperature, top_p)
  )
  _check_prompts(ids, sizes, config)
  batch, width = ids.shape
  _check_options(options, config, width)
  if _known(sizes):
    check(
      int(sizes.max()) + options.max_new_tokens
      <= config.max_position_embeddings,
      "prompt and max_new_tokens exceed the model's positions",
      expected=f"at most {config.max_position_embeddings} together",
      got=f"{sizes.max()} and {options.max_new_tokens}",
    )
  for name, x in (("temperature", heat), ("top_p", nucleus)):
    check(
      x.shape in ((), (batch,)),
      f"{name} must be a scalar or have one value per row",
      got=x.shape,
    )
  if _known(heat):
    check(
      bool((np.isfinite(heat) & (heat >= 0)).all()),
      "temperature must be finite and not negative",
      got=heat.tolist(),
    )
  if _known(nucleus):
    check(
      bool(((nucleus > 0) & (nucleus <= 1)).all()),
      "top_p must be above 0 and at most 1",
      got=nucleus.tolist(),
    )
  greedy = _known(heat) and not heat.any()
  check(greedy or key is not None, "sampling needs a key")
  per_row = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), batch)
  return Request(
    tokens=jnp.asarray(ids, jnp.int32),
    lengths=jnp.asarray(sizes, jnp.int32),
    keys=_keys(jax.random.key(0) if key is None else key, batch),
    temperature=None if greedy else per_row(heat),
    top_p=per_row(nucleus),
  )


def _check_prompts(ids: Any, sizes: Any, config: LlamaConfig) -> None:
  """Raises unless `ids` are prompts of `sizes` tokens of the vocabulary."""
  for name, x in (("tokens", ids), ("lengths", sizes)):
    if not np.issubdtype(x.dtype, np.integer):
      raise DataError(f"{name} must be integers", got=x.dtype)
  if ids.ndim != 2 or not ids.size or sizes.shape != ids.shape[:1]:
    raise DataError(
      "prompts cannot be used",
      expected="tokens [B, P] and lengths [B], B and P at least 1",
      got=f"{ids.shape} and {sizes.shape}",
    )
  width = ids.shape[1]
  if _known(sizes) and not ((sizes >= 1) & (sizes <= width)).all():
    raise DataError(
      "a prompt is empty or longer than its row",
      expected=f"lengths of 1 to {width}",
      got=sizes.tolist(),
    )
  if _known(ids) and not ((ids >= 0) & (ids < config.vocab_size)).all():
    raise DataError(
      "a token id is outside the vocabulary",
      expected=f"0 to {config.vocab_size - 1}",
      got=f"{ids.min()} to {ids.max()}",
    )


def _keys(key: Any, batch: int) -> jax.Array:
  """Returns typed PRNG keys [batch] from one, or from one of each row."""
  check(
    isinstance(key, jax.Array | np.ndarray),
    "key must be a PRNG key",
    got=repr(key),
    hint="jax.random.key(SEED)",
  )
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  check(
    key.shape in ((), (batch,)),
    "key must be a scalar or have one key per row",
    got=key.shape,
  )
  return key if key.ndim else _row_keys(key, batch)


@functools.partial(jax.jit, static_argnames="batch")
def _row_keys(key: jax.Array, batch: int) -> jax.Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def _check_options(
  options: GenerateConfig, config: LlamaConfig, width: int
) -> None:
  check(
    options.top_k <= config.vocab_size,
    "top_k exceeds the vocabulary",
    expected=f"at most {config.vocab_size}",
    got=options.top_k,
  )
  check(
    all(0 <= eos < config.vocab_size for eos in options.eos_token_ids),
    "eos_token_ids holds an id outside the vocabulary",
    expected=f"0 to {config.vocab_size - 1}",
    got=options.eos_token_ids,
  )
  check(
    width + options.max_new_tokens <= capacity_of(options, width),
    "padded prompts and max_new_tokens exceed cache_capacity",
    expected=f"at least {width + options.max_new_tokens}",
    got=options.cache_capacity,
  )


def capacity_of(options: GenerateConfig, width: int) -> int:
  """Tokens a row of the cache must have room for, at prompts of `width`."""
  return options.cache_capacity or width + options.max_new_tokens


def _values(x: Any) -> Any:
  """Returns x as a NumPy array, or as it is if `jit` traces it."""
  return np.asarray(x) if _known(x) else x


def _known(x: Any) -> bool:
  return not isinstance(x, jax.core.Tracer)
