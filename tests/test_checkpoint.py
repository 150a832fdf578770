"""A checkpoint is either exactly what was saved, or refused."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_llama

from fireq_jax import atomic, checkpoint, recipe
from fireq_jax.errors import CheckpointError, FireQError, ResourceError
from fireq_jax.manifest import MANIFEST
from fireq_jax.models.llama import abstract_params

# orbax leaves event loops behind when a restore fails.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)

CONFIG = small_llama.config(
  vocab_size=96,
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=2,
  head_dim=32,
  max_position_embeddings=128,
  tie_word_embeddings=True,
  eos_token_ids=(1, 2),
)
RECIPE = recipe.from_dict(
  {
    "name": "test",
    "weight": {"group": 32, "activation": "bf16"},
    "kv": {"cache": "int4"},
    "keys": {"beta": 8.0, "top_k": 2},
    "overrides": [{"layers": [-1], "projections": ["down_proj"]}],
  }
)


def random_params(seed: int):
  """Random bytes in every leaf, so also NaN and subnormal values."""
  rng = np.random.default_rng(seed)

  def leaf(spec):
    size = int(np.prod(spec.shape)) * spec.dtype.itemsize
    return np.frombuffer(rng.bytes(size), spec.dtype).reshape(spec.shape)

  return jax.tree.map(leaf, abstract_params(CONFIG, RECIPE))


def as_bytes(params) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def save(path, seed=0, **options):
  return checkpoint.save(
    path, random_params(seed), config=CONFIG, recipe=RECIPE, **options
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
  """A checkpoint of seed 0 with a file beside it; copy it to change it."""
  folder = tmp_path_factory.mktemp("saved")
  side = folder / "tokenizer.json"
  side.write_text('{"model": "a tokenizer"}')
  save(
    folder / "ckpt",
    source=checkpoint.Provenance(
      digests={"model.safetensors": "00ff"},
      calibration={"seed": 3},
      side_files=[side],
    ),
  )
  return folder / "ckpt"


@pytest.fixture
def copy(saved, tmp_path) -> Path:
  return shutil.copytree(saved, tmp_path / "copy")


def test_round_trip(saved):
  loaded = checkpoint.load(saved)
  params = random_params(0)
  assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
  assert as_bytes(loaded.params) == as_bytes(params)
  assert [x.dtype for x in jax.tree.leaves(loaded.params)] == [
    x.dtype for x in jax.tree.leaves(params)
  ]
  assert loaded.config == CONFIG and loaded.recipe == RECIPE
  assert loaded.manifest.source == {"model.safetensors": "00ff"}
  assert loaded.manifest.calibration == {"seed": 3}
  assert (saved / "tokenizer.json").read_text() == '{"model": "a tokenizer"}'
  q_proj = loaded.params["model"]["layers"][0]["self_attn"]["q_proj"]["kernel"]
  assert q_proj.activation == "bf16" and q_proj.group == 32


def test_manifest_describes_every_leaf(saved):
  manifest = checkpoint.inspect(saved, verify=True)
  leaf = manifest.leaves["model/layers/0/mlp/down_proj/kernel/codes"]
  assert leaf.shape == (64, 64) and leaf.logical_dtype == "int4"
  assert "model/layers/1/mlp/down_proj/kernel" in manifest.leaves
  assert manifest.total_bytes == sum(map(len, as_bytes(random_params(0))))


def test_saving_twice_gives_the_same_digests(saved, tmp_path):
  again = save(tmp_path / "again")
  assert again.leaves == checkpoint.inspect(saved).leaves


def test_refuses_a_tree_the_recipe_does_not_describe(tmp_path):
  params = random_params(0)
  del params["model"]["norm"]
  params["model"]["layers"][0]["input_layernorm"]["weight"] = np.ones(64)
  with pytest.raises(CheckpointError) as error:
    checkpoint.save(tmp_path / "x", params, config=CONFIG, recipe=RECIPE)
  assert "model/norm/weight missing" in str(error.value)
  assert "layers/0/input_layernorm/weight expected bfloat16[64]" in str(
    error.value
  )
  assert not list(tmp_path.iterdir())


def flip_one_bit(path: Path, rng: random.Random) -> None:
  data = bytearray(path.read_bytes())
  position = rng.randrange(len(data))
  data[position] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def loads_unchanged_or_refuses(folder: Path, original: list[bytes]) -> bool:
  """Returns whether `folder` was refused; fails on changed values."""
  try:
    loaded = checkpoint.load(folder)
  except CheckpointError:
    return True
  assert as_bytes(loaded.params) == original
  assert loaded.config == CONFIG and loaded.recipe == RECIPE
  return False


def test_bit_flips_are_never_silent(saved, tmp_path):
  original = as_bytes(random_params(0))
  rng = random.Random(1)
  files = sorted(
    p for p in saved.rglob("*") if p.stat().st_size and p.is_file()
  )
  weights = [p.stat().st_size for p in files]
  chosen = files + rng.choices(files, weights, k=80)
  refused = 0
  for i, file in enumerate(chosen):
    copy = shutil.copytree(saved, tmp_path / str(i))
    flip_one_bit(copy / file.relative_to(saved), rng)
    refused += loads_unchanged_or_refuses(copy, original)
    shutil.rmtree(copy)
  # The others hit what no value depends on, such as timestamps.
  assert refused > len(chosen) // 2


@pytest.mark.parametrize("damage", ["delete", "truncate", "zero"])
def test_damaged_files_are_never_silent(saved, tmp_path, damage):
  original = as_bytes(random_params(0))
  for i, file in enumerate(p for p in sorted(saved.rglob("*")) if p.is_file()):
    copy = shutil.copytree(saved, tmp_path / str(i))
    victim = copy / file.relative_to(saved)
    size = victim.stat().st_size
    if damage == "delete":
      victim.unlink()
    elif damage == "truncate":
      victim.write_bytes(victim.read_bytes()[: size // 2])
    else:
      victim.write_bytes(bytes(size))
    refused = loads_unchanged_or_refuses(copy, original)
    if file.name in (MANIFEST, "tokenizer.json"):
      assert refused


def test_verify_false_skips_digests_only(copy):
  data = max((copy / "state").rglob("*"), key=lambda p: p.stat().st_size)
  assert checkpoint.load(copy, verify=False).config == CONFIG
  (copy / MANIFEST).unlink()
  with pytest.raises(CheckpointError, match="not a fireq_jax checkpoint"):
    checkpoint.load(copy, verify=False)
  assert data.is_file()


def edit(folder: Path, change) -> None:
  path = folder / MANIFEST
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def reseal(content) -> None:
  """Recomputes the manifest's own digest, as an editor in earnest would."""
  content.pop("sha256")
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  content["sha256"] = hashlib.sha256(text.encode()).hexdigest()


EDITS = {
  "group": lambda c: c["recipe"]["weight"].update(group=64),
  "activation": lambda c: c["recipe"]["weight"].update(activation="e4m3"),
  "eps": lambda c: c["config"].update(rms_norm_eps=1e-6),
  "leaf": lambda c: next(iter(c["leaves"].values())).update(dtype="int8"),
  "missing key": lambda c: c.pop("recipe"),
  "extra key": lambda c: c.update(more=1),
  "no digest": lambda c: c.pop("sha256"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_manifest_is_refused(copy, name):
  edit(copy, EDITS[name])
  with pytest.raises(CheckpointError, match="edited or damaged"):
    checkpoint.inspect(copy)


@pytest.mark.parametrize("name", ["group", "leaf", "missing key"])
def test_resealed_nonsense_is_refused(copy, name):
  edit(copy, lambda c: (EDITS[name](c), reseal(c)))
  with pytest.raises(CheckpointError):
    checkpoint.load(copy)


def test_future_format_says_upgrade(copy):
  edit(copy, lambda c: c.update(format_version=999))
  with pytest.raises(CheckpointError, match="upgrade"):
    checkpoint.inspect(copy)


@pytest.mark.parametrize(
  "text", ["", "[]", "{", "[" * 100_000, '{"format_version": "1"}', "\0"]
)
def test_malformed_manifest_is_refused(copy, text):
  (copy / MANIFEST).write_text(text)
  with pytest.raises(CheckpointError, match="manifest|version"):
    checkpoint.inspect(copy)


def test_foreign_folders_are_named(tmp_path):
  with pytest.raises(CheckpointError, match="no such checkpoint"):
    checkpoint.load(tmp_path / "absent")
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(CheckpointError, match="Hugging Face"):
    checkpoint.load(tmp_path)
  other = tmp_path / "x.orbax-checkpoint-tmp"
  other.mkdir()
  with pytest.raises(CheckpointError, match="interrupted save"):
    checkpoint.load(other)


def test_existing_destinations(tmp_path):
  save(tmp_path / "c", seed=0)
  with pytest.raises(CheckpointError, match="exists"):
    save(tmp_path / "c", seed=1)
  save(tmp_path / "c", seed=1, overwrite=True)
  assert as_bytes(checkpoint.load(tmp_path / "c").params) == as_bytes(
    random_params(1)
  )
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  mine = tmp_path / "mine"
  mine.mkdir()
  save(mine)  # an empty folder is as good as none
  (tmp_path / "file").write_text("x")
  with pytest.raises(CheckpointError, match="is a file"):
    save(tmp_path / "file")
  (tmp_path / "work").mkdir()
  (tmp_path / "work" / "thesis.tex").write_text("x")
  with pytest.raises(CheckpointError, match="never overwritten"):
    save(tmp_path / "work", overwrite=True)
  assert (tmp_path / "work" / "thesis.tex").read_text() == "x"


def test_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  for path in ("relative", "~/home", "with space", "ünïcödé 日本", "x" * 250):
    save(path)
    assert checkpoint.load(path).config == CONFIG
  assert (tmp_path / "home" / MANIFEST).is_file()
  for path in ("gs://bucket/x", "", "y" * 300, "z/" * 3000):
    with pytest.raises(CheckpointError):
      save(path)
    with pytest.raises(CheckpointError):
      checkpoint.load(path)


def test_destination_checks(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  for target in (source, source / "out", tmp_path):
    with pytest.raises(CheckpointError):
      checkpoint.check_destination(target, source=source)
  with pytest.raises(ResourceError, match="disk space"):
    checkpoint.check_destination(tmp_path / "o", needed_bytes=10**18)
  (tmp_path / "file").write_text("")
  with pytest.raises(FireQError):
    checkpoint.check_destination(tmp_path / "file" / "under")


@pytest.mark.parametrize(
  ("failure", "says"),
  [
    ("RESOURCE_EXHAUSTED: [os_error_code='28']", "No space left"),
    ("RESOURCE_EXHAUSTED: ... No space left on device", "No space left"),
    ("OUT_OF_RANGE: ... [os_error_code='27']", "File too large"),
    ("[os_error_code='122']", "quota"),
  ],
)
def test_full_disk_leaves_nothing(failure, says, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise ValueError(failure)

  save(tmp_path / "old", seed=0)
  monkeypatch.setattr(checkpoint.ocp, "save", full)
  with pytest.raises(ResourceError, match=says):
    save(tmp_path / "new")
  with pytest.raises(ResourceError, match=says):
    save(tmp_path / "old", seed=1, overwrite=True)
  assert [p.name for p in tmp_path.iterdir()] == ["old"]
  monkeypatch.undo()
  assert as_bytes(checkpoint.load(tmp_path / "old").params) == as_bytes(
    random_params(0)
  )


def test_nothing_is_left_by_threads_that_write_on(tmp_path, monkeypatch):
  """As orbax has them when one of its arrays fails."""
  threads = []

  def fail(folder, tree):
    def write_on():
      end = time.monotonic() + 0.1
      while time.monotonic() < end:
        with contextlib.suppress(OSError):
          Path(folder, "more").mkdir(parents=True)

    threads.append(threading.Thread(target=write_on))
    threads[0].start()
    raise ValueError("[os_error_code='28']")

  monkeypatch.setattr(checkpoint.ocp, "save", fail)
  with pytest.raises(ResourceError):
    save(tmp_path / "c")
  threads[0].join()
  assert not list(tmp_path.iterdir())


def test_overwrite_without_exchange(tmp_path, monkeypatch):
  """Where names cannot be swapped, the old one is named in the window."""
  save(tmp_path / "c", seed=0)
  monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
  save(tmp_path / "c", seed=1, overwrite=True)
  assert [p.name for p in tmp_path.iterdir()] == ["c"]
  os.rename(tmp_path / "c", atomic.backup_path(tmp_path / "c"))
  with pytest.raises(CheckpointError, match="rename it back"):
    checkpoint.load(tmp_path / "c")


def test_one_of_two_savers_wins(tmp_path, monkeypatch):
  """Another process publishes while this one is writing."""
  write = checkpoint.ocp.save

  def slow(folder, tree):
    write(folder, tree)
    monkeypatch.setattr(checkpoint.ocp, "save", write)
    save(tmp_path / "c", seed=1)

  monkeypatch.setattr(checkpoint.ocp, "save", slow)
  with pytest.raises(ResourceError, match="another process"):
    save(tmp_path / "c", seed=0)
  assert as_bytes(checkpoint.load(tmp_path / "c").params) == as_bytes(
    random_params(1)
  )
  assert [p.name for p in tmp_path.iterdir()] == ["c"]


_SAVER = """
import os, sys
sys.path[:0] = [{tests!r}]
import test_checkpoint
for line in sys.stdin:  # a process that has run no threads yet, so it may fork
  child = os.fork()
  if child:
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
    continue
  path, warm = line.split()
  test_checkpoint.save(warm, overwrite=True)
  print("ready", flush=True)
  for seed in range(2, 60):
    test_checkpoint.save(path, seed=seed, overwrite=True)
  os._exit(1)
"""


@pytest.fixture
def kill_while_saving(tmp_path_factory):
  """Returns a function: in a process, saves at a path until it is killed."""
  warm = tmp_path_factory.mktemp("warm") / "ckpt"
  saver = subprocess.Popen(
    [sys.executable, "-c", _SAVER.format(tests=str(Path(__file__).parent))],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    cwd=Path(__file__).parent.parent,
  )
  assert saver.stdin is not None and saver.stdout is not None

  def kill(path: Path, delay: float) -> None:
    saver.stdin.write(f"{path} {warm}\n")
    saver.stdin.flush()
    child = int(saver.stdout.readline())
    assert saver.stdout.readline() == "ready\n"
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert saver.stdout.readline() == "ended\n"

  with saver:
    yield kill
    saver.kill()


@pytest.mark.slow
def test_kill_leaves_a_complete_checkpoint(tmp_path, kill_while_saving):
  """Killed at random during save and overwrite: old or new, never neither."""
  rng = random.Random(5)
  possible = {tuple(as_bytes(random_params(seed))) for seed in range(60)}
  save(tmp_path / "c", seed=0)
  start = time.perf_counter()
  save(tmp_path / "c", seed=0, overwrite=True)
  once = time.perf_counter() - start
  there = 0
  for i in range(6):  # no checkpoint before
    path = tmp_path / f"fresh{i}"
    kill_while_saving(path, rng.uniform(0, 1.5 * once))
    if path.exists():
      there += 1
      assert tuple(as_bytes(checkpoint.load(path).params)) in possible
    save(path, seed=1, overwrite=True)  # sweeps what was left
  path = tmp_path / "c"
  before, changed = None, 0
  for _ in range(10):
    kill_while_saving(path, rng.uniform(0, 2 * once))
    now = tuple(as_bytes(checkpoint.load(path).params))
    assert now in possible
    changed += now != before
    before = now
  print(f"{once:.2f} s, {there} of 6 saved, {changed} of 10 overwritten")
  save(path, seed=1, overwrite=True)
  names = {f"fresh{i}" for i in range(6)} | {"c"}
  assert {p.name for p in tmp_path.iterdir()} == names
