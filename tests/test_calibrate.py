import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax.calibrate import (
  SITES,
  cut_windows,
  merge_stats,
  read_tokens,
  window_stats,
)
from fireq_jax.errors import DataError

BOS = 1


def encode(text):
  return [BOS, *text.encode()]


def write(path, data):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def read(path, **options):
  return read_tokens(path, **{"vocab_size": 300, "encode": encode} | options)


def test_documents_are_tokenised_one_by_one_and_joined(tmp_path):
  lines = [{"text": "ab"}, {"input_ids": [5, 6]}, {"text": "c"}]
  text = "\n".join(map(json.dumps, lines)) + "\n\n"
  path = write(tmp_path / "a.jsonl", text)
  assert read(path).tolist() == [BOS, 97, 98, 5, 6, BOS, 99]


def test_a_text_file_is_one_document(tmp_path):
  path = write(tmp_path / "a.txt", "a\n\nb")
  assert read(path).tolist() == [BOS, 97, 10, 10, 98]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_token_arrays(tmp_path, dtype):
  np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], dtype))
  tokens = read(tmp_path / "a.npy", encode=None)
  assert tokens.tolist() == [1, 2, 3, 4] and tokens.dtype == np.int32


@pytest.mark.parametrize(
  "name, data, message",
  [
    ("a.txt", "", "no tokens"),
    ("a.jsonl", "\n", "no tokens"),
    ("a.txt", b"ok\nb\xffd", "not UTF-8 in line 2, got byte 0xff"),
    ("a.jsonl", b'{"text": "a"}\n\xff', "line 2: not UTF-8"),
    ("a.jsonl", '{"text": "a"}\n{', "line 2: not JSON"),
    ("a.jsonl", '{"text": 3}', "line 1: not a document"),
    ("a.jsonl", '{"input_ids": [1.5]}', "line 1: not a document"),
    ("a.jsonl", '{"input_ids": [true]}', "line 1: not a document"),
    ("a.jsonl", "[1, 2]", "line 1: not a document"),
    (
      "a.jsonl",
      '{"text": "a"}\n{"input_ids": [1, 300]}',
      "line 2, position 1: token id .* 0 to 299, got 300",
    ),
    ("a.jsonl", '{"input_ids": [-1]}', "line 1, position 0.* got -1"),
    ("a.npy", b"nonsense", "not an .npy array"),
    ("a.npy", np.ones(3), "not token ids.*float64"),
    ("a.npy", np.ones((1, 1, 1), int), "not token ids"),
    ("a.npy", np.array([None]), "not an .npy array"),
    ("a.npy", np.array([7, 300]), "position 1: token id"),
  ],
)
def test_bad_data_names_file_and_line(tmp_path, name, data, message):
  path = tmp_path / name
  if isinstance(data, np.ndarray):
    np.save(path, data, allow_pickle=True)
  else:
    write(path, data)
  with pytest.raises(DataError, match=message) as error:
    read(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_missing_tokenizer(tmp_path):
  with pytest.raises(DataError, match="cannot be read: No such file"):
    read(tmp_path / "none.txt")
  path = write(tmp_path / "a.txt", "text")
  with pytest.raises(DataError, match="needs a tokenizer"):
    read(path, encode=None)


def test_windows_are_seeded_disjoint_and_in_order():
  tokens = np.arange(1000, dtype=np.int32)
  cut = lambda seed: cut_windows(tokens, count=10, length=32, seed=seed)
  first = cut(0)
  assert first.shape == (10, 32)
  np.testing.assert_array_equal(first, cut(0))
  assert (first != cut(1)).any()
  np.testing.assert_array_equal(first, first[:, :1] + np.arange(32))
  assert (first[:, 0] % 32 == 0).all() and len(set(first[:, 0])) == 10


def test_fewer_windows_than_asked_for_are_all_returned():
  tokens = np.arange(70, dtype=np.int32)
  windows = cut_windows(tokens, count=10, length=32)
  np.testing.assert_array_equal(windows, tokens[:64].reshape(2, 32))
  both = cut_windows(tokens, tokens[30:], count=10, length=32)
  np.testing.assert_array_equal(both[:2], windows)
  np.testing.assert_array_equal(both[2:], tokens[None, 30:62])
  with pytest.raises(DataError, match="at least 71 tokens.*got 70"):
    cut_windows(tokens, count=1, length=71)


def captured(rng, tokens):
  widths = dict(zip(SITES, (8, 12, 8, 16)))
  found = {
    f"{site}_in": rng.normal(size=(1, tokens, width)).astype(np.float32)
    for site, width in widths.items()
  }
  for name in ("k_pre_rope", "k_post_rope"):
    found[name] = rng.normal(size=(1, tokens, 2, 6)).astype(np.float32)
  return found


def test_statistics_against_numpy():
  rng = np.random.default_rng(0)
  windows = [captured(rng, 5) for _ in range(3)]
  stats = window_stats(jax.tree.map(jnp.asarray, windows[0]), moment=True)
  for window in windows[1:]:
    stats = merge_stats(stats, window_stats(window, moment=True))
  whole = {k: np.concatenate([w[k][0] for w in windows]) for k in windows[0]}
  assert stats.tokens == 15
  for site in SITES:
    x = whole[f"{site}_in"].astype(np.float64)
    np.testing.assert_allclose(stats.abs_sum[site], np.abs(x).sum(0), rtol=1e-6)
  x = whole["qkv_in"].astype(np.float64)
  np.testing.assert_allclose(stats.qkv_moment, x.T @ x, atol=1e-5)
  k = whole["k_pre_rope"]
  radius = np.sqrt(k[..., :3] ** 2 + k[..., 3:] ** 2).max(0)
  np.testing.assert_allclose(stats.pair_radius, radius, rtol=1e-6)
  np.testing.assert_array_equal(
    stats.key_max, np.abs(whole["k_post_rope"]).max(0)
  )


def test_the_moment_is_optional():
  window = captured(np.random.default_rng(1), 2)
  assert window_stats(window, moment=False).qkv_moment is None
