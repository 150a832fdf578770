"""Calibration: from a file to token windows, from activations to statistics."""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.errors import DataError

Encode = Callable[[str], Sequence[int]]

# The inputs of projections, in the order data flows through a layer.
SITES = ("qkv", "o", "gate_up", "down")


def read_tokens(
  path: str | pathlib.Path, *, vocab_size: int, encode: Encode | None = None
) -> np.ndarray:
  """Reads calibration data and returns its tokens, i32 [n].

  A `.npy` file holds token ids, of one document or one in each row. A `.jsonl`
  file holds a document a line: an object with "text" or "input_ids". Any
  other file is the text of one document. Documents are tokenised one by one
  and joined.

  Args:
    path: the file.
    vocab_size: every id must be below.
    encode: text to ids, with the special tokens a document starts with. None
      if there is no tokenizer; text is refused then.

  Raises:
    DataError: no such file, not such data, no tokens, or an id out of range;
      with the line.
  """
  path = pathlib.Path(path)
  try:
    if path.suffix == ".npy":
      documents = [("token ids", _load_npy(path))]
    elif path.suffix == ".jsonl":
      documents = list(_read_jsonl(path, encode))
    else:
      text = _decode(path.read_bytes(), str(path))
      documents = [("text", _tokenise(text, encode, str(path)))]
  except OSError as error:
    raise DataError(
      f"cannot be read: {error.strerror}", where=f"calibration file {path}"
    ) from error
  for where, ids in documents:
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
      raise DataError(
        "token id outside the vocabulary",
        where=f"{path}, {where}, position {int(outside.argmax())}",
        expected=f"0 to {vocab_size - 1}",
        got=int(ids[outside.argmax()]),
      )
  tokens = np.concatenate([ids for _, ids in documents] or [np.zeros(0)])
  if not tokens.size:
    raise DataError("no tokens", where=f"calibration file {path}")
  return tokens.astype(np.int32)


def cut_windows(
  *texts: np.ndarray, count: int, length: int, seed: int = 0
) -> np.ndarray:
  """Returns i32 [count, length]: windows of the texts that do not overlap.

  The windows are drawn without replacement from all texts alike; the same
  seed draws the same. If there are fewer than `count`, all are returned.

  Raises:
    DataError: a text is shorter than one window.
  """
  windows = []
  for tokens in texts:
    available = len(tokens) // length
    if not available:
      raise DataError(
        "too little calibration data",
        expected=f"at least {length} tokens, one window",
        got=len(tokens),
        hint="give more text or shorter windows",
      )
    windows.append(tokens[: available * length].reshape(-1, length))
  windows = np.concatenate(windows)
  chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
  return windows[np.sort(chosen)]


@flax.struct.dataclass
class LayerStats:
  """What the inputs of one layer's projections and its keys were like.

  Sums are over `tokens` tokens, one window after another, so they do not
  depend on how windows were batched.

  Attributes:
    tokens: f32 scalar, how many.
    abs_sum: site -> f32 [C], sum of |x|.
    qkv_moment: f32 [D, D], sum of x x^T over attention inputs; None when not
      asked for.
    pair_radius: f32 [K, H / 2], largest radius of the pair of channels that
      RoPE turns together (paper section 3, before RoPE).
    key_max: f32 [K, H], largest |k| after RoPE.
  """

  tokens: jax.Array
  abs_sum: dict[str, jax.Array]
  qkv_moment: jax.Array | None
  pair_radius: jax.Array
  key_max: jax.Array


def window_stats(captured: dict[str, jax.Array], *, moment: bool) -> LayerStats:
  """Statistics of one window's activations, as `decoder_layer` captures them.

  Args:
    captured: activations of [1, T, ...].
    moment: whether to compute `LayerStats.qkv_moment`.
  """
  inputs = {
    site: captured[f"{site}_in"].reshape(-1, captured[f"{site}_in"].shape[-1])
    for site in SITES
  }
  before = captured["k_pre_rope"].astype(jnp.float32)
  after = captured["k_post_rope"].astype(jnp.float32)
  first, second = jnp.split(before, 2, axis=-1)
  return LayerStats(
    tokens=jnp.float32(before.shape[0] * before.shape[1]),
    abs_sum={
      site: jnp.abs(x.astype(jnp.float32)).sum(axis=0)
      for site, x in inputs.items()
    },
    qkv_moment=outer_sum(inputs["qkv"]) if moment else None,
    pair_radius=jnp.hypot(first, second).max(axis=(0, 1)),
    key_max=jnp.abs(after).max(axis=(0, 1)),
  )


def merge_stats(a: LayerStats, b: LayerStats) -> LayerStats:
  """Statistics of what `a` and then `b` saw."""
  add = lambda x, y: jax.tree.map(jnp.add, x, y)
  return LayerStats(
    tokens=a.tokens + b.tokens,
    abs_sum=add(a.abs_sum, b.abs_sum),
    qkv_moment=add(a.qkv_moment, b.qkv_moment),
    pair_radius=jnp.maximum(a.pair_radius, b.pair_radius),
    key_max=jnp.maximum(a.key_max, b.key_max),
  )


def outer_sum(x: jax.Array) -> jax.Array:
  """[T, C] of any float dtype -> the sum over T of x x^T, f32 [C, C]."""
  return jnp.matmul(
    x.T, x, precision="highest", preferred_element_type=jnp.float32
  )


def _load_npy(path: pathlib.Path) -> np.ndarray:
  try:
    ids = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise DataError("not an .npy array", where=path) from error
  if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
    raise DataError(
      "not token ids",
      where=path,
      expected="integers [n] or [documents, n]",
      got=f"{ids.dtype}{list(ids.shape)}",
    )
  return ids.reshape(-1)


def _read_jsonl(
  path: pathlib.Path, encode: Encode | None
) -> Iterator[tuple[str, np.ndarray]]:
  for number, line in enumerate(path.read_bytes().splitlines(), start=1):
    where = f"{path}, line {number}"
    text = _decode(line, where)
    if not text.strip():
      continue
    try:
      document: Any = json.loads(text)
    except ValueError as error:
      raise DataError(f"not JSON: {error}", where=where) from error
    if isinstance(document, dict) and isinstance(document.get("text"), str):
      ids = _tokenise(document["text"], encode, where)
    elif isinstance(document, dict) and _is_ids(document.get("input_ids")):
      ids = np.array(document["input_ids"], np.int64)
    else:
      raise DataError(
        "not a document",
        where=where,
        expected='{"text": "..."} or {"input_ids": [...]}',
        got=text if len(text) < 40 else text[:40] + "...",
      )
    yield f"line {number}", ids


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and all(
    type(i) is int and abs(i) < 2**63 for i in value
  )


def _tokenise(text: str, encode: Encode | None, where: str) -> np.ndarray:
  if encode is None:
    raise DataError(
      "text needs a tokenizer", where=where, hint="or give token ids (.npy)"
    )
  return np.array(encode(text), np.int64) if text else np.zeros(0, np.int64)


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise DataError(
      f"not UTF-8 in line {line}" if b"\n" in data else "not UTF-8",
      where=where,
      got=f"byte 0x{data[error.start]:02x}",
    ) from error
