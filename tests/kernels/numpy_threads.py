"""`pallas.threads.Threads` on NumPy: a register holds all threads' values.

Integers are int64, of which memory and `as_f32` see the low 32 bits. A word
written twice, or read and written by different threads, is an error.
"""

import contextlib

import ml_dtypes
import numpy as np

WARP = 32


class NumpyThreads:
  def __init__(self, ctas: int):
    threads = np.arange(ctas * 128)
    self.warp, self.lane = threads // WARP, threads % WARP
    self.index = threads % 128
    self._active = np.ones(threads.size, bool)
    self._owners = {}  # id of an array -> thread that writes each byte

  def load(self, ref, index, words, when=None):
    active = self._active if when is None else self._active & when
    memory, place = _bytes(ref), self._places(ref, index, active, 4 * words)
    owners = self._owners.get(id(ref))
    if owners is not None:
      owner = owners[place]
      assert ((owner < 0) | (owner == self._threads(active))).all(), "race"
    out = np.zeros((self.lane.size, words), np.int64)
    out[active] = memory[place].copy().view(np.uint32)
    return list(out.T)

  def store(self, ref, index, values, when=None, bits=32):
    active = self._active if when is None else self._active & when
    data = np.stack([x & 0xFFFFFFFF for x in values], axis=-1)[active]
    data = data.astype(np.uint32).view(np.uint8)[:, : len(values) * bits // 8]
    place = self._places(ref, index, active, data.shape[1])
    assert np.unique(place).size == place.size, "race"
    owners = self._owners.setdefault(id(ref), np.full(ref.nbytes, -1))
    assert (owners[place] < 0).all(), "race"
    owners[place] = self._threads(active)
    _bytes(ref)[place] = data

  def fence(self):
    """All threads meet here: what follows sees what came before."""
    for owners in self._owners.values():
      owners[:] = -1

  def arrive(self, counter, counters, of):
    came = np.zeros(counters, np.int64)
    before = np.zeros(self.lane.size, np.int64)
    for warp in range(self.lane.size // WARP):
      mine = slice(warp * WARP, (warp + 1) * WARP)
      if self._active[mine].any():
        before[mine] = came[counter[mine][0]]
        came[counter[mine][0]] += 1
    assert np.isin(came, (0, of)).all(), "an arrival is missing"
    return before

  def _threads(self, active):
    return np.flatnonzero(active)[:, None]

  def _places(self, ref, index, active, size):
    index = np.broadcast_to(index, active.shape)[active]
    first = index * ref.dtype.itemsize
    assert (first % size == 0).all(), "misaligned"
    assert ((first >= 0) & (first + size <= ref.nbytes)).all(), "outside"
    return first[:, None] + np.arange(size)

  @contextlib.contextmanager
  def when(self, condition):
    by_warp = condition.reshape(-1, WARP)
    assert (by_warp == by_warp[:, :1]).all(), "lanes disagree"
    saved, self._active = self._active, self._active & condition
    yield
    self._active = saved

  def shuffle_xor(self, x, lanes):
    return x[np.arange(x.size) ^ lanes]

  def select(self, condition, yes, no):
    floats = any(np.asarray(x).dtype.kind == "f" for x in (yes, no))
    dtype = np.float32 if floats else np.result_type(yes, no)
    return np.where(condition, yes, no).astype(dtype)

  def as_f32(self, x):
    return (x & 0xFFFFFFFF).astype(np.uint32).view(np.float32)

  def bits(self, x):
    assert x.dtype == np.float32
    return x.view(np.uint32).astype(np.int64)

  def permute(self, low, high, places):
    low, high, places = (
      np.broadcast_to(x, self.lane.shape) for x in (low, high, places)
    )
    both = (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32
    out = np.zeros_like(self.lane)
    for i in range(4):
      place = (places >> 4 * i) & 15
      assert (place < 8).all(), "bit 3 would spread a sign"
      out |= (
        (both.astype(np.uint64) >> (8 * place).astype(np.uint64)) & 255
      ).astype(np.int64) << 8 * i
    return out

  def absolute(self, x):
    return np.abs(x)

  def maximum(self, a, b):
    return np.maximum(a, np.float32(b))

  def minimum(self, a, b):
    return np.minimum(a, np.float32(b))

  def exp2(self, x):
    return np.exp2(x)

  def divide(self, a, b):
    with np.errstate(all="ignore"):  # of lanes without a head
      return a / b

  def pack_bf16(self, low, high):
    low, high = (
      x.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int64)
      for x in (low, high)
    )
    return low | (high << 16)

  def pack_e4m3(self, low, high):
    low, high = (
      x.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
      for x in (low, high)
    )
    return low.astype(np.int64) | (high.astype(np.int64) << 8)

  def unpack_e4m3(self, x):
    byte = (x & 255).astype(np.uint8)
    return byte.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _bytes(ref):
  return ref.reshape(-1).view(np.uint8)
