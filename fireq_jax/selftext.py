"""Calibration text that a model writes itself.

It needs no data, lies where the model works, and reaches beyond any one
collection of texts: each window starts with a token drawn from the whole
vocabulary, and goes on as the model would (Liu et al. 2023, LLM-QAT, arXiv
2305.17888).
"""

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.checkpoint import Checkpoint
from fireq_jax.config import GenerateConfig
from fireq_jax.generate import generate


def write_windows(
  model: Checkpoint,
  *,
  count: int,
  length: int,
  seed: int = 0,
  temperature: float = 1.0,
  batch: int = 128,
) -> np.ndarray:
  """Returns i32 [count, length] of token ids, each row a text of its own.

  Args:
    model: float, or quantised.
    count: of the windows.
    length: in tokens, at least 2.
    seed: the same writes the same.
    temperature: of the sampling.
    batch: windows written at a time.
  """
  options = GenerateConfig(max_new_tokens=length - 1)
  windows = []
  for i in range(0, count, batch):
    key, start = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
    # The last batch is as large as the others, for the same program.
    shape, vocab_size = (batch, 1), model.config.vocab_size
    first = jax.random.randint(start, shape, 0, vocab_size, jnp.int32)
    output = generate(
      model.params,
      first,
      jnp.ones(batch, jnp.int32),
      config=model.config,
      kv=model.recipe.kv,
      options=options,
      key=key,
      temperature=temperature,
    )
    windows.append(np.concatenate([first, output.tokens], axis=1))
  return np.concatenate(windows)[:count]
