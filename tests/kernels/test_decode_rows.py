"""How splits of decode attention add up, thread by thread."""

import ml_dtypes
import numpy as np
import pytest
from numpy_threads import NumpyThreads

from fireq_jax.pallas import decode_rows


@pytest.mark.parametrize(
  "heads, head_dim", [(1, 128), (2, 64), (2, 128), (4, 128), (8, 64)]
)
def test_last_split_adds_up_all(heads, head_dim):
  """A CTA a split of two parts; one part's result is not wanted."""
  parts, splits = 2, 3
  rng = np.random.default_rng(0)
  shape = (parts, splits, heads)
  sums = rng.normal(size=(*shape, head_dim)).astype(np.float32)
  top = (5 * rng.normal(size=shape)).astype(np.float32)
  total = rng.uniform(1, 9, shape).astype(np.float32)
  top[0, 1], total[0, 1], sums[0, 1] = -1e30, 0, 0  # a split without tokens
  total[1], sums[1] = 0, 0  # and a sequence without any

  by_thread = held_by_threads(sums)
  threads = NumpyThreads(parts * splits)
  cta = np.arange(parts * splits).repeat(128)
  part, split = cta // splits, cta % splits
  row = held_by_threads(np.broadcast_to(np.arange(heads)[:, None], sums.shape))
  row = row[:, 0]
  out = np.full((4, heads, head_dim), 7, ml_dtypes.bfloat16)
  memory = (
    np.zeros_like(sums),
    np.zeros((*shape[:2], max(heads, 4), 2), np.float32),
  )
  wanted = np.broadcast_to(1 - (part == 3), part.shape)
  decode_rows.finish_program(
    threads,
    list(by_thread.T),
    top[part, split, row],
    total[part, split, row],
    (part, split, (part + 1) * heads * head_dim, wanted),
    (*memory, out),
    shape=(parts, splits, heads, head_dim),
  )
  weight = np.exp2(top.astype(np.float64) - top.max(1, keepdims=True))
  want = (weight[..., None] * sums).sum(1)
  want = want[0] / (weight * total).sum(1)[0, :, None]
  np.testing.assert_allclose(out[1].astype(np.float64), want, rtol=1e-2)
  assert not out[2].astype(np.float32).any()
  assert (out[[0, 3]].astype(np.float32) == 7).all()


def held_by_threads(x):
  """[parts, splits, heads, H] -> [threads of all CTAs, numbers of each].

  A row after the other, as the merged layout deals them to threads.
  """
  return x.reshape(-1, x.shape[-2] * x.shape[-1] // 128)
