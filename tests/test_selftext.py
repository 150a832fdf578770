"""Text a model writes for its own calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import small_llama

from fireq_jax import recipe
from fireq_jax.checkpoint import Checkpoint
from fireq_jax.models.llama import init_params
from fireq_jax.selftext import write_windows

CONFIG = small_llama.config(vocab_size=29, eos_token_ids=(3,))
PARAMS = jax.tree.map(
  lambda x: x * 20 if x.ndim == 2 else x,
  init_params(CONFIG, jax.random.key(3), jnp.float32),
)
MODEL = Checkpoint(
  params=PARAMS,
  config=CONFIG,
  recipe=recipe.load("none"),
  path=None,
  manifest=None,
)


def test_windows_are_drawn_from_the_model_s_distribution():
  windows = write_windows(MODEL, count=150, length=12, seed=1, batch=64)
  assert windows.shape == (150, 12) and windows.dtype == np.int32
  # Any token starts a text, the end of a text does not end a window.
  assert set(windows[:, 0]) >= set(range(CONFIG.vocab_size)) - {0}
  assert (windows[:, :-1] == 3).any()
  assert len(np.unique(windows, axis=0)) == 150
  surprise, entropy = [], []
  for window in windows:
    logits = numpy_llama.forward(PARAMS, window, CONFIG)[:-1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    surprise.append(-np.log(p[np.arange(11), window[1:]]))
    entropy.append(-(p * np.log(p)).sum(-1))
  surprise, entropy = np.array(surprise), np.array(entropy)
  # Of a sample, surprise is entropy on average; of anything else it is not.
  error = (surprise - entropy).std() / np.sqrt(surprise.size)
  assert abs((surprise - entropy).mean()) < 4 * error
  assert entropy.mean() < 0.9 * np.log(CONFIG.vocab_size)


def test_the_seed_decides_and_the_count_does_not():
  write = lambda **options: write_windows(MODEL, length=6, batch=8, **options)
  some, more = write(count=5), write(count=20)
  np.testing.assert_array_equal(some, more[:5])
  assert (write(count=5, seed=1) != some).any()
