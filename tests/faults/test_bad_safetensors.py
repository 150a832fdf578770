"""Damaged weights (ST) are refused with one line that says what is wrong."""

import json

import numpy as np
import pytest
from harness import SHARD, edit_shard, expect_refusal, join, split, write

from fireq_jax.errors import CheckpointError, UnsupportedError

UP = "model.layers.1.mlp.up_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


def truncate(count):
  return lambda folder: write(SHARD, (folder / SHARD).read_bytes()[:-count])(
    folder
  )


def halve(folder):
  content = (folder / SHARD).read_bytes()
  (folder / SHARD).write_bytes(content[: len(content) // 2])


def append(folder):
  with (folder / SHARD).open("ab") as file:
    file.write(b"\0" * 64)


def shift(name, by):
  def change(header, data):
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [start + by, end + by]

  return edit_shard(change)


def hole(header, data):
  """Eight bytes that no tensor owns, in front of all."""
  for name, entry in header.items():
    if name != "__metadata__":
      entry["data_offsets"] = [x + 8 for x in entry["data_offsets"]]
  return header, b"\0" * 8 + data


def negative(header, data):
  header[UP]["data_offsets"][0] = -1


def overflow(header, data):
  header[UP]["shape"] = [2**40, 2**40]


def given_twice(folder):
  header, data = split((folder / SHARD).read_bytes())
  text = json.dumps(header)
  entry = json.dumps({UP: header[UP]})[1:-1]
  (folder / SHARD).write_bytes(join(f"{text[:-1]}, {entry}}}".encode(), data))


def retype(dtype, width):
  """The bytes of UP as another dtype; `width` in bits."""

  def change(header, data):
    rows, columns = header[UP]["shape"]
    header[UP] |= {"dtype": dtype, "shape": [rows, columns * 16 // width]}

  return edit_shard(change)


def drop(names):
  def change(header, data):
    kept, parts, offset = {}, [], 0
    for name, entry in header.items():
      if name == "__metadata__" or name in names:
        continue
      start, end = entry["data_offsets"]
      parts.append(data[start:end])
      kept[name] = entry | {"data_offsets": [offset, offset + end - start]}
      offset += end - start
    return kept, b"".join(parts)

  return edit_shard(change)


def rename(old, new):
  def change(header, data):
    header[new] = header.pop(old)

  return edit_shard(change)


def transpose(name):
  return edit_shard(lambda header, data: header[name]["shape"].reverse())


def every_name_of_gpt2(header, data):
  for i, name in enumerate(list(header)):
    if name != "__metadata__":
      header[f"h.{i}.attn.c_attn.weight"] = header.pop(name)


LAYER_1 = [
  f"model.layers.1.{name}.weight"
  for name in (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
  )
]

DAMAGE = [
  ("ST01 empty", write(SHARD, b""), "truncated, or not.*got 0 bytes"),
  ("ST01 7 bytes", write(SHARD, b"\x10" * 7), "truncated, or not"),
  ("ST01 only a length", write(SHARD, b"\x10" + b"\0" * 7), "truncated, or no"),
  ("ST01 length 2^63", write(SHARD, b"\0" * 7 + b"\x80{}"), "truncated, or"),
  ("ST01 length 2^40", write(SHARD, b"\0\0\0\0\0\1\0\0{}"), "truncated, or"),
  ("ST01 header a list", write(SHARD, join(b"[]", b"")), "not a safetensors"),
  ("ST01 header no JSON", write(SHARD, join(b"{nonsense", b"")), "not valid"),
  ("ST01 not UTF-8", write(SHARD, join(b'{"\xff": 1}', b"")), "not valid"),
  ("ST01 no tensors", write(SHARD, join(b"{}", b"")), "21 tensors missing"),
  ("ST02 1 byte", truncate(1), r"truncated, expected \d+ bytes, got \d+"),
  ("ST02 1 KiB", truncate(1024), "truncated"),
  ("ST02 half", halve, "truncated"),
  ("ST03 trailing bytes", append, "damaged safetensors header"),
  ("ST03 overlap", shift(UP, -2), "damaged safetensors header"),
  ("ST03 hole", edit_shard(hole), "damaged safetensors header"),
  ("ST03 negative offset", edit_shard(negative), "damaged safetensors header"),
  ("ST03 shape overflow", edit_shard(overflow), "damaged safetensors header"),
  (
    "ST03 an entry without dtype",
    edit_shard(lambda header, data: header[UP].pop("dtype") and None),
    "damaged safetensors header",
  ),
  ("ST04 twice in a header", given_twice, f"{UP}' is given twice"),
  (
    "ST06 git-lfs pointer",
    write(SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "git lfs pull",
  ),
  ("ST06 web page", write(SHARD, b"<!DOCTYPE html><html>"), "a web page"),
  ("ST07 BF16 and F16", retype("F16", 16), "both BF16 and F16"),
  ("ST08 one missing", drop([UP]), f"1 tensor missing: {UP}$"),
  (
    "ST08 eleven missing",
    drop([*LAYER_1, "model.norm.weight", "lm_head.weight"]),
    r"11 tensors missing: .*up_proj.weight, .*, \.\.\.$",
  ),
  (
    "ST09 unexpected",
    rename(UP, UP + "_scale"),
    f"1 tensor missing: {UP}; 1 tensor unexpected: '{UP}_scale'",
  ),
  (
    "ST09 another architecture",
    edit_shard(every_name_of_gpt2),
    "21 tensors missing: .*; 21 tensors unexpected: 'h.",
  ),
  (
    "ST09 a name that would break the line",
    rename(UP, "a\n\x1b[2J"),
    "1 tensor unexpected: 'a",
  ),
  (
    "ST10 transposed",
    transpose(K),
    r"k_proj.weight expected \[64, 128\] got \[128, 64\]",
  ),
  (
    "ST10 vector as matrix",
    edit_shard(
      lambda header, data: header["model.norm.weight"].update(shape=[1, 128])
    ),
    r"norm.weight expected \[128\] got \[1, 128\]",
  ),
]


@pytest.mark.parametrize(
  "mutate, pattern",
  [case[1:] for case in DAMAGE],
  ids=[case[0] for case in DAMAGE],
)
def test_damage_is_refused(mutate, pattern, make_hf_checkpoint):
  folder = make_hf_checkpoint()
  mutate(folder)
  expect_refusal(folder, CheckpointError, pattern)


@pytest.mark.parametrize(
  "dtype, width",
  [("F8_E4M3", 8), ("I8", 8), ("U8", 8), ("F64", 64), ("I32", 32), ("F4", 4)],
)
def test_other_dtypes_are_refused(dtype, width, make_hf_checkpoint):
  folder = make_hf_checkpoint()
  retype(dtype, width)(folder)
  pattern = f"unsupported dtype of '{UP}'.*BF16, F16, F32, got {dtype}"
  expect_refusal(folder, UnsupportedError, pattern)


@pytest.mark.parametrize("shard", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 1024])
def test_every_truncated_shard_is_named(shard, count, make_hf_checkpoint):
  folder = make_hf_checkpoint(shards=3)
  name = f"model-{shard:05}-of-00003.safetensors"
  content = (folder / name).read_bytes()
  (folder / name).write_bytes(content[:-count])
  expect_refusal(folder, CheckpointError, f"{name}: truncated")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(
  dtype, value, make_hf_checkpoint
):
  """ST11, in every tensor: at its first, its last, or a middle element."""
  folder = make_hf_checkpoint(dtype=dtype, num_hidden_layers=1)
  header, data = split((folder / SHARD).read_bytes())
  bits = np.array(value, np.dtype(dtype)).tobytes()
  del header["__metadata__"]
  for i, (name, entry) in enumerate(header.items()):
    start, end = entry["data_offsets"]
    last = (end - start) // len(bits) - 1
    at = start + len(bits) * (0, last, last // 2)[i % 3]
    damaged = data[:at] + bits + data[at + len(bits) :]
    content = join(json.dumps(header).encode(), damaged)
    (folder / SHARD).write_bytes(content)
    pattern = rf"1 of {last + 1} values of {name} are NaN or infinite"
    expect_refusal(folder, CheckpointError, pattern)
