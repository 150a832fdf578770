"""Damages model folders, and loads them as the library's users do."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fireq_jax import hf
from fireq_jax.config import LlamaConfig
from fireq_jax.errors import FireQError
from fireq_jax.models import llama_hf

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load(folder: Path) -> tuple[dict[str, Any], LlamaConfig]:
  ckpt = hf.open_checkpoint(folder)
  config = LlamaConfig.from_hf(ckpt.config, ckpt.generation_config)
  return llama_hf.load_params(ckpt, config), config


def digests(folder: Path) -> dict[str, str]:
  return {
    str(file): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.rglob("*"))
    if file.is_file() and file.stat().st_size < 1 << 24
  }


def expect_refusal(folder: Path, error: type[FireQError], pattern: str) -> None:
  """Loads `folder`: one clear line and untouched files are expected."""
  before = digests(folder)
  with pytest.raises(FireQError, match=pattern) as caught:
    load(folder)
  assert caught.type is error
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 4000
  assert digests(folder) == before


def edit_json(file: str, change: Callable[[dict], Any]) -> Callable:
  """Returns a mutation: `change` edits the object in place."""

  def mutate(folder: Path) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))

  return mutate


def set_keys(file: str, **values: Any) -> Callable:
  return edit_json(file, lambda content: content.update(values))


def write(file: str, content: bytes) -> Callable:
  return lambda folder: (folder / file).write_bytes(content)


def split(shard: bytes) -> tuple[dict[str, Any], bytes]:
  """Returns header and data of a safetensors file."""
  end = 8 + int.from_bytes(shard[:8], "little")
  return json.loads(shard[8:end]), shard[end:]


def join(header: bytes, data: bytes) -> bytes:
  return len(header).to_bytes(8, "little") + header + data


def edit_shard(
  change: Callable[[dict, bytes], tuple[dict, bytes] | None],
  file: str = SHARD,
) -> Callable:
  """Returns a mutation: `change` edits the header, or returns both anew."""

  def mutate(folder: Path) -> None:
    header, data = split((folder / file).read_bytes())
    header, data = change(header, data) or (header, data)
    content = join(json.dumps(header).encode(), data)
    (folder / file).write_bytes(content)

  return mutate
