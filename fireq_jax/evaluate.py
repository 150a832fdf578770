"""Perplexity of one model, or of several against the first.

Protocol, as published with GPTQ: the text is tokenised once, with whatever
the tokenizer puts at its head; windows of equal length do not overlap and the
tail is dropped; logits are f32; the result is exp of the mean over windows of
each window's mean negative log-likelihood of tokens 2 to T.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.checkpoint import Checkpoint
from fireq_jax.errors import DataError
from fireq_jax.models.llama import forward

PROTOCOL = (
  "GPTQ protocol: text tokenised once, non-overlapping windows, tail dropped,"
  " f32 logits, exp of the mean negative log-likelihood"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Score:
  """Of one model over all windows; the first model is the reference.

  Attributes:
    ppl: perplexity.
    kl: mean KL divergence from the reference's distribution to this one, in
      nats per token.
    top1: fraction of tokens whose likeliest successor is the reference's.
    seconds: of this model's forward passes, compilation excluded.
  """

  ppl: float
  kl: float
  top1: float
  seconds: float


def cut_text(
  tokens: Sequence[int], *, length: int, count: int | None = None
) -> np.ndarray:
  """Returns the first `count` (None = all) windows of a text, i32 [W, T].

  Raises:
    DataError: the text is shorter than one window, or a window than 2 tokens.
  """
  if length < 2:
    raise DataError("a window needs at least 2 tokens", got=length)
  available = len(tokens) // length
  if not available:
    raise DataError(
      "the text is shorter than one window",
      expected=f"at least {length} tokens",
      got=len(tokens),
      hint="lower seq_len",
    )
  windows = np.asarray(tokens[: available * length], np.int32)
  return windows.reshape(-1, length)[:count]


def evaluate(
  models: Sequence[Checkpoint],
  windows: np.ndarray,
  *,
  on_window: Callable[[], object] = lambda: None,
) -> list[Score]:
  """Runs every model on the same windows, one window at a time.

  Keys, values and queries go through each recipe's `kv` format, and weights
  through the same products as in generation.

  Args:
    models: the first is the reference.
    windows: i32 [W, T].
    on_window: called after every window.
  """
  seconds = [0.0] * len(models)
  sums = [np.zeros(3)] * len(models)
  first = jnp.asarray(windows[:1])
  for model in models:
    jax.block_until_ready(_logits(model, first))  # compile
  for window in windows:
    tokens = jnp.asarray(window)[None]
    reference = None
    for i, model in enumerate(models):
      start = time.perf_counter()
      logits = jax.block_until_ready(_logits(model, tokens))
      seconds[i] += time.perf_counter() - start
      reference = logits if reference is None else reference
      sums[i] = sums[i] + np.asarray(_compare(logits, reference, tokens))
    on_window()
  return [
    Score(ppl=float(np.exp(nll)), kl=float(kl), top1=float(top1), seconds=spent)
    for (nll, kl, top1), spent in zip(
      (total / len(windows) for total in sums), seconds
    )
  ]


def _logits(model: Checkpoint, tokens: jax.Array) -> jax.Array:
  return _forward(
    model.params, tokens, config=model.config, kv=model.recipe.kv
  )[0]


@functools.partial(jax.jit, static_argnames=("config", "kv"))
def _forward(params: Any, tokens: jax.Array, *, config, kv):
  return forward(params, tokens, config=config, kv=kv)


@jax.jit
def _compare(
  logits: jax.Array, reference: jax.Array, tokens: jax.Array
) -> jax.Array:
  """f32 [3]: mean negative log-likelihood, KL divergence, top-1 agreement."""
  log_p = jax.nn.log_softmax(logits[:, :-1])
  log_q = jax.nn.log_softmax(reference[:, :-1])
  nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()
  kl = (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
  top1 = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
  return jnp.stack([nll, kl, top1.astype(jnp.float32).mean()])
