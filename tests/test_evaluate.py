"""Perplexity against sums written out in NumPy."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from fireq_jax import recipe
from fireq_jax.checkpoint import Checkpoint
from fireq_jax.errors import DataError
from fireq_jax.evaluate import cut_text, evaluate
from fireq_jax.models import llama

CONFIG = small_llama.config(
  vocab_size=50, intermediate_size=32, num_attention_heads=1, head_dim=32
)


def model(seed):
  params = llama.init_params(CONFIG, jax.random.key(seed), jnp.float32)
  params = jax.tree.map(lambda x: x * jnp.float32(5), params)
  return Checkpoint(
    params=params,
    config=CONFIG,
    recipe=recipe.load("none"),
    path=Path("."),
    manifest=None,
  )


def log_softmax(x):
  x = x.astype(np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_scores_are_the_published_sums():
  windows = np.random.default_rng(0).integers(0, 50, (3, 9)).astype(np.int32)
  models = [model(0), model(1)]
  logs = [
    log_softmax(
      np.asarray(
        llama.forward(
          m.params, jnp.asarray(windows), config=CONFIG, kv=m.recipe.kv
        )[0]
      )
    )[:, :-1]
    for m in models
  ]
  seen = []
  scores = evaluate(models, windows, on_window=lambda: seen.append(1))
  assert len(seen) == 3
  for score, log_p in zip(scores, logs):
    nll = [-log_p[w, t, windows[w, t + 1]] for w in range(3) for t in range(8)]
    p = np.exp(logs[0])
    np.testing.assert_allclose(score.ppl, np.exp(np.mean(nll)), rtol=1e-5)
    np.testing.assert_allclose(
      score.kl,
      np.mean((p * (logs[0] - log_p)).sum(-1)),
      rtol=1e-4,
      atol=1e-6,
    )
    agree = logs[0].argmax(-1) == log_p.argmax(-1)
    np.testing.assert_allclose(score.top1, agree.mean(), rtol=1e-6)
  assert scores[0].kl == 0 and scores[0].top1 == 1
  assert scores[1].kl > 0.01 and scores[1].top1 < 1


def test_the_recipe_s_kv_format_is_used():
  windows = np.random.default_rng(1).integers(0, 50, (2, 16)).astype(np.int32)
  exact = model(0)
  kv4 = dataclasses.replace(exact, recipe=recipe.load("kv4-only"))
  scores = evaluate([exact, kv4], windows)
  assert 0 < scores[1].kl < 0.5


def test_windows():
  windows = cut_text(list(range(10)), length=3)
  np.testing.assert_array_equal(windows, np.arange(9).reshape(3, 3))
  assert cut_text(list(range(10)), length=3, count=2).shape == (2, 3)
  with pytest.raises(DataError, match="shorter than one window"):
    cut_text([1, 2], length=3)
  with pytest.raises(DataError, match="at least 2"):
    cut_text([1, 2], length=1)
