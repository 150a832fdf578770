"""Model folders are read as they are, whichever way they are laid out."""

import errno
import hashlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from fireq_jax import hf
from fireq_jax.errors import CheckpointError, ResourceError


def contents(folder):
  """All tensors, by the safetensors library's own reader."""
  tensors = {}
  for file in folder.glob("*.safetensors"):
    tensors |= load_file(file)
  return tensors


def assert_reads(ckpt, expected):
  assert sorted(ckpt.names()) == sorted(expected)
  for name, values in expected.items():
    got = ckpt.read(name)
    assert got.dtype == values.dtype
    assert got.shape == ckpt.shape(name)
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_dtype_and_layout(dtype, shards, make_hf_checkpoint):
  folder = make_hf_checkpoint(dtype=dtype, shards=shards)
  ckpt = hf.open_checkpoint(folder)
  expected = contents(folder)
  assert_reads(ckpt, expected)
  assert len(ckpt.shards) == shards
  assert ckpt.total_bytes == sum(x.nbytes for x in expected.values())
  assert ckpt.config["model_type"] == "llama"
  assert ckpt.generation_config is None


def test_a_path_may_be_text(make_hf_checkpoint):
  folder = make_hf_checkpoint("a folder, é")
  assert_reads(hf.open_checkpoint(str(folder)), contents(folder))


def test_one_shard_with_an_index(make_hf_checkpoint):
  """ST16"""
  folder = make_hf_checkpoint(shards=2)
  names = sorted(folder.glob("*.safetensors"))
  expected = contents(folder)
  folder = make_hf_checkpoint("one")
  shard = "model-00001-of-00001.safetensors"
  (folder / "model.safetensors").rename(folder / shard)
  index = (names[0].parent / hf.INDEX).read_text()
  for name in names:
    index = index.replace(name.name, shard)
  (folder / hf.INDEX).write_text(index)
  assert_reads(hf.open_checkpoint(folder), expected)


def test_any_name_of_a_single_file(make_hf_checkpoint):
  folder = make_hf_checkpoint()
  expected = contents(folder)
  (folder / "model.safetensors").rename(folder / "weights.safetensors")
  assert_reads(hf.open_checkpoint(folder), expected)


def test_files_that_are_not_the_model_are_named(make_hf_checkpoint):
  """IX02: a warning, since the model is whole without them."""
  folder = make_hf_checkpoint()
  expected = contents(folder)
  shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
  with pytest.warns(UserWarning, match="not part.*consolidated.safetensors"):
    ckpt = hf.open_checkpoint(folder)
  assert_reads(ckpt, expected)


def test_links_of_the_hugging_face_cache_are_followed(make_hf_checkpoint):
  folder = make_hf_checkpoint(shards=2, tokenizer=True)
  expected = contents(folder)
  repository = folder.parent / "models--x--y"
  snapshot = repository / "snapshots" / "0123abc"
  (repository / "blobs").mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for i, file in enumerate(folder.iterdir()):
    shutil.copy(file, repository / "blobs" / f"{i}")
    (snapshot / file.name).symlink_to(f"../../blobs/{i}")
  assert_reads(hf.open_checkpoint(snapshot), expected)
  link = folder.parent / "latest"
  link.symlink_to(snapshot)
  assert_reads(hf.open_checkpoint(link), expected)


@pytest.mark.parametrize(
  "rows", [slice(3, 7), slice(0, 0), slice(310, 999), slice(None), slice(5)]
)
def test_reads_some_rows(rows, make_hf_checkpoint):
  folder = make_hf_checkpoint()
  name = "model.embed_tokens.weight"
  got = hf.open_checkpoint(folder).read(name, rows)
  np.testing.assert_array_equal(got, contents(folder)[name][rows])


def test_zeros_subnormals_and_the_largest_values_are_fine(make_hf_checkpoint):
  """ST12, ST13: every finite bf16 there is."""
  folder = make_hf_checkpoint(vocab_size=510, hidden_size=128)
  path = folder / "model.safetensors"
  content = bytearray(path.read_bytes())
  start = len(content) - sum(x.nbytes for x in contents(folder).values())
  bits = np.arange(1 << 16, dtype=np.uint16)
  finite = bits[(bits & 0x7F80) != 0x7F80]
  assert finite.size == 510 * 128
  tensor = hf.open_checkpoint(folder).tensors["model.embed_tokens.weight"]
  assert tensor.offset >= start
  content[tensor.offset : tensor.offset + tensor.nbytes] = finite.tobytes()
  path.write_bytes(content)
  got = hf.open_checkpoint(folder).read("model.embed_tokens.weight")
  np.testing.assert_array_equal(got.view(np.uint16).ravel(), finite)


def test_digests_and_side_files(make_hf_checkpoint):
  folder = make_hf_checkpoint(shards=2, tokenizer=True)
  (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
  (folder / "notes.txt").write_text("not ours")
  ckpt = hf.open_checkpoint(folder)
  assert ckpt.generation_config == {"eos_token_id": [1, 2]}
  side_files = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  assert {file.name for file in ckpt.side_files} == side_files
  shards = {file.name for file in ckpt.shards}
  assert ckpt.sha256() == {
    name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for name in side_files | shards
  }


def test_an_unknown_tensor_and_a_file_cut_off_later(make_hf_checkpoint):
  folder = make_hf_checkpoint()
  ckpt = hf.open_checkpoint(folder)
  with pytest.raises(CheckpointError, match="no tensor lm_head"):
    ckpt.read("lm_head")
  with (folder / "model.safetensors").open("r+b") as file:
    file.truncate(file.seek(0, 2) - 2)
  last = max(ckpt.tensors, key=lambda name: ckpt.tensors[name].offset)
  with pytest.raises(CheckpointError, match="has become shorter"):
    ckpt.read(last)


def test_a_failing_disk_is_named(make_hf_checkpoint, monkeypatch):
  """ME02"""
  ckpt = hf.open_checkpoint(make_hf_checkpoint())

  def fail(*args, **kwargs):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(np, "fromfile", fail)
  with pytest.raises(ResourceError, match="model.safetensors: Input/output"):
    ckpt.read("model.norm.weight")
