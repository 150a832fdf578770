"""Which thread holds what, for all 128 threads of a warpgroup."""

import numpy as np
import pytest

from fireq_jax.pallas import int4_fragments as fragments


def held_by_threads(layout, shape):
  """Indices [warp, g, t, register, element] into a flat array of `shape`."""
  layout = layout.to_mgpu()
  x = np.arange(np.prod(shape)).reshape(shape)
  for tile in layout.tiling.tiles:
    keep = x.ndim - len(tile)
    split = [
      part
      for n, size in zip(x.shape[keep:], tile)
      for part in (n // size, size)
    ]
    x = x.reshape(*x.shape[:keep], *split)
    outer = range(keep, x.ndim, 2)
    inner = range(keep + 1, x.ndim, 2)
    x = x.transpose(*range(keep), *outer, *inner)

  assert layout.vector_dim == -1
  warp = [d for d in layout.warp_dims if isinstance(d, int)]
  lane = [d for d in layout.lane_dims if isinstance(d, int)]
  x = np.moveaxis(x, [*warp, *lane], range(len(warp) + len(lane)))
  sizes = x.shape[len(warp) + len(lane) :]
  warps = int(np.prod(x.shape[: len(warp)]))
  x = x.reshape(warps, -1, *sizes)
  x = np.broadcast_to(x, (4, *x.shape[1:]))
  assert x.shape[1] == 32
  return x.reshape(4, 8, 4, -1, sizes[-1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_words(head_dim):
  words = head_dim // 8
  held = held_by_threads(fragments.key_words(head_dim), (2 * words, 128))
  for w, g, t, register, e in np.ndindex(held.shape):
    block, beta = divmod(register, 4)
    token = 128 * block + 32 * w + 4 * g + beta
    assert held[w, g, t, register, e] == token * words + words // 4 * t + e


@pytest.mark.parametrize("head_dim", [64, 128])
def test_value_words(head_dim):
  held = held_by_threads(
    fragments.value_words(head_dim), (8, head_dim // 32, 128)
  )
  for w, g, t, register, e in np.ndindex(held.shape):
    block, v = divmod(register, head_dim // 32)
    # Word 16 (channel // 4) + 4 t + channel % 4 of a block of 32 tokens.
    channel = 32 * v + 4 * g + e
    word = 16 * (channel // 4) + 4 * t + channel % 4
    assert held[w, g, t, register, e] == (4 * block + w) * 4 * head_dim + word


def test_scores_and_queries():
  scores = held_by_threads(fragments.SCORES, (256, 8))
  for w, g, t, register, e in np.ndindex(scores.shape):
    block, beta = divmod(register, 4)
    token = 128 * block + 32 * w + 4 * g + beta
    assert scores[w, g, t, register, e] == token * 8 + 2 * t + e
  queries = held_by_threads(fragments.queries(128), (8, 128))
  for w, g, t, register, e in np.ndindex(queries.shape):
    assert queries[w, g, t, register, e] == g * 128 + 32 * t + 8 * register + e


def test_outputs():
  outputs = held_by_threads(fragments.OUTPUTS, (32, 128))
  for w, g, t, register, e in np.ndindex(outputs.shape):
    v, row = divmod(register, 2)
    want = (8 * w + 2 * t + row) * 128 + 32 * v + 4 * g + e
    assert outputs[w, g, t, register, e] == want
