"""Samplers against the distributions they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax.sampling import sample

LOGITS = np.array([0.5, 2.0, -1.0, 1.5, 0.0, -3.0], np.float32)
ROWS = 20000


def frequencies(temperature=1.0, top_p=1.0, top_k=0):
  """How often each token is drawn in many rows with keys of their own."""
  tokens = sample(
    jnp.tile(LOGITS, (ROWS, 1)),
    jax.random.split(jax.random.key(0), ROWS),
    temperature=jnp.full(ROWS, temperature),
    top_p=jnp.full(ROWS, top_p),
    top_k=top_k,
  )
  assert tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=len(LOGITS)) / ROWS


def expected(temperature=1.0, top_p=1.0, top_k=0):
  p = np.exp(LOGITS.astype(np.float64) / temperature)
  order = np.argsort(-p)
  kept = order[: top_k or len(p)]
  share = p[kept] / p[kept].sum()
  enough = np.searchsorted(np.cumsum(share), top_p - 1e-12) + 1
  out = np.zeros(len(p))
  out[kept[:enough]] = p[kept[:enough]]
  return out / out.sum()


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 6},
    {"top_p": 0.3},
    {"top_p": 0.75},
    {"top_p": 0.999},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.8},
    # top_p counts what top_k left: without order, 3 tokens would remain.
    {"top_k": 2, "top_p": 0.6},
  ],
  ids=str,
)
def test_distribution(options):
  got, want = frequencies(**options), expected(**options)
  assert (got[want == 0] == 0).all()
  deviation = np.sqrt(want * (1 - want) / ROWS)
  assert (np.abs(got - want) <= 5 * deviation).all()


def test_all_tokens_stay_at_top_p_one():
  """The f32 sum reaches 1 long before the tail ends; the tail still counts."""
  size = 1 << 14
  logits = jnp.where(jnp.arange(size) == 5, 0.0, -8.0)[None]
  want = (size - 1) * np.exp(-8.0)
  want /= 1 + want
  keys = jax.random.split(jax.random.key(1), 400)
  draw = lambda key: sample(
    logits, key[None], temperature=jnp.ones(1), top_p=jnp.ones(1)
  )[0]
  tokens = jax.jit(jax.vmap(draw))(keys)
  others = np.asarray(tokens) != 5
  assert abs(others.mean() - want) < 5 * np.sqrt(want * (1 - want) / 400)
  assert np.asarray(tokens)[others].max() > size * 0.9


def test_greedy_and_sampled_rows_together():
  logits = jax.random.normal(jax.random.key(0), (64, 50))
  keys = jax.random.split(jax.random.key(1), 64)
  warm = jnp.arange(64) % 2 == 1
  temperature = jnp.where(warm, 5.0, 0.0)
  tokens = sample(logits, keys, temperature=temperature, top_p=jnp.ones(64))
  best = jnp.argmax(logits, -1)
  np.testing.assert_array_equal(tokens[~warm], best[~warm])
  assert (tokens[warm] != best[warm]).sum() > 20


def test_a_row_depends_on_nothing_else():
  logits = jax.random.normal(jax.random.key(0), (8, 50))
  keys = jax.random.split(jax.random.key(1), 8)
  temperature, top_p = jnp.linspace(0, 2, 8), jnp.linspace(0.2, 1, 8)
  together = sample(
    logits, keys, temperature=temperature, top_p=top_p, top_k=20
  )
  for i in range(8):
    alone = sample(
      logits[i : i + 1],
      keys[i : i + 1],
      temperature=temperature[i : i + 1],
      top_p=top_p[i : i + 1],
      top_k=20,
    )
    assert alone[0] == together[i]


def test_equal_logits_take_the_first_when_greedy():
  tokens = sample(
    jnp.zeros((1, 9)).at[0, 3:5].set(1.0),
    jax.random.split(jax.random.key(0), 1),
    temperature=jnp.zeros(1),
    top_p=jnp.ones(1),
  )
  assert tokens.tolist() == [3]
