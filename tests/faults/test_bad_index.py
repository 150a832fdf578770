"""Bad indices and folders (IX) are refused before any weight is read."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from harness import INDEX, SHARD, edit_json, expect_refusal, load, write

from fireq_jax.errors import CheckpointError, UnsupportedError

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
EMBEDDING = "model.embed_tokens.weight"


def point_at(file):
  """The index says the embedding is in `file`."""
  return edit_json(
    INDEX, lambda index: index["weight_map"].update({EMBEDDING: file})
  )


def link_out(folder):
  outside = folder.parent / "outside.safetensors"
  shutil.move(folder / FIRST, outside)
  (folder / FIRST).symlink_to(outside)


def link_config_out(folder):
  shutil.move(folder / "config.json", folder.parent / "config.json")
  (folder / "config.json").symlink_to("../config.json")


def copy_between_shards(folder):
  (folder / SECOND).write_bytes((folder / FIRST).read_bytes())


def add_single_file(folder):
  shutil.copy(folder / FIRST, folder / SHARD)


def directory_for_shard(folder):
  (folder / FIRST).unlink()
  (folder / FIRST).mkdir()


def pipe_for_shard(folder):
  (folder / FIRST).unlink()
  os.mkfifo(folder / FIRST)


def huge(folder):
  with (folder / INDEX).open("r+b") as file:
    file.truncate(200 << 20)


def twice(folder):
  text = (folder / INDEX).read_text()
  entry = json.dumps({EMBEDDING: SECOND})[1:-1]
  text = text.replace('"weight_map": {', f'"weight_map": {{{entry}, ')
  (folder / INDEX).write_text(text)


NOT_A_NAME = "weight_map names something other than a file of the folder"

BAD = [
  *(
    (f"IX01 {path!r}", point_at(path), NOT_A_NAME)
    for path in (
      "../x.safetensors",
      "/etc/passwd",
      "/etc/x.safetensors",
      "a/../../b.safetensors",
      "sub/x.safetensors",
      "..\\x.safetensors",
      "..",
      "",
      "config.json",
      7,
      None,
      [FIRST],
    )
  ),
  ("IX01 a nul byte", point_at("a\0.safetensors"), "."),
  ("IX01 a name too long", point_at("a" * 300 + ".safetensors"), "."),
  ("IX01 link out of the folder", link_out, "a link leads out of the folder"),
  ("IX01 config links out", link_config_out, "a link leads out of the folder"),
  (
    "IX02 missing shard",
    lambda folder: (folder / SECOND).unlink(),
    f"{SECOND}: no such file",
  ),
  ("IX02 a directory as shard", directory_for_shard, "no such file"),
  ("IX02 a pipe as shard", pipe_for_shard, "no such file"),
  (
    "IX03 listed in one, stored in the other",
    point_at(SECOND),
    f"wrong about '{EMBEDDING}', expected {SECOND}, got {FIRST}",
  ),
  (
    "IX03 listed, stored nowhere",
    edit_json(INDEX, lambda index: index["weight_map"].update(extra=FIRST)),
    f"wrong about 'extra', expected {FIRST}, got no such tensor",
  ),
  (
    "IX03 stored, listed nowhere",
    edit_json(INDEX, lambda index: index["weight_map"].pop(EMBEDDING)),
    f"wrong about '{EMBEDDING}', expected no such tensor, got {FIRST}",
  ),
  ("ST05 in two shards", copy_between_shards, f"is in two files.*{FIRST} and"),
  ("ST15 index and single file", add_single_file, "both model.safetensors an"),
  (
    "ST15 shards without index",
    lambda folder: (folder / INDEX).unlink(),
    "2 .safetensors files but no",
  ),
  ("IX04 empty", write(INDEX, b""), "not valid JSON"),
  ("IX04 truncated", write(INDEX, b'{"weight_map": {"a"'), "not valid JSON"),
  ("IX04 not UTF-8", write(INDEX, b'{"\xff\xfe": 1}'), "not valid JSON"),
  ("IX04 a list", write(INDEX, b"[]"), "not a JSON object"),
  ("IX04 a number", write(INDEX, b"1"), "not a JSON object"),
  ("IX04 no weight_map", write(INDEX, b"{}"), "no weight_map"),
  ("IX04 a list of weights", write(INDEX, b'{"weight_map": []}'), "no weight_"),
  ("IX04 empty map", write(INDEX, b'{"weight_map": {}}'), "no weight_map"),
  ("IX04 NaN", write(INDEX, b'{"weight_map": NaN}'), "NaN is not JSON"),
  ("IX04 nested deeply", write(INDEX, b"[" * 10**6), "not valid JSON"),
  ("IX04 digits", write(INDEX, b"1" * 10**6), "not valid JSON"),
  ("IX04 200 MB", huge, "too large"),
  ("IX04 duplicate keys", twice, f"'{EMBEDDING}' is given twice"),
]


@pytest.mark.parametrize(
  "mutate, pattern", [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_bad_index_is_refused(mutate, pattern, make_hf_checkpoint):
  folder = make_hf_checkpoint(shards=2)
  mutate(folder)
  start = time.perf_counter()
  expect_refusal(folder, CheckpointError, pattern)
  assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
  "name", ["pytorch_model.bin", "consolidated.00.pth", "a.ckpt", "a.pt"]
)
def test_pickles_are_refused_and_never_opened(name, make_hf_checkpoint):
  """IX05, with and without a configuration."""
  folder = make_hf_checkpoint()
  (folder / SHARD).rename(folder / name)
  opened = []
  sys.addaudithook(
    lambda event, args: event == "open" and opened.append(str(args[0]))
  )
  for _ in range(2):
    with pytest.raises(UnsupportedError, match=f"{name}: pickle checkpoints"):
      load(folder)
    (folder / "config.json").unlink(missing_ok=True)
  assert not [path for path in opened if Path(path).name == name]


def test_a_folder_without_weights_is_refused(tmp_path):
  expect_refusal(tmp_path, CheckpointError, "no .safetensors file")


def test_what_is_no_folder_is_refused(make_hf_checkpoint, tmp_path):
  with pytest.raises(CheckpointError, match="no such folder"):
    load(tmp_path / "absent")
  with pytest.raises(CheckpointError, match="not a folder"):
    load(make_hf_checkpoint() / SHARD)
