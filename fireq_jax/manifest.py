"""`fireq_manifest.json`: what a checkpoint is, checked before it is believed.

The file carries the sha256 of its own content, so an edited or damaged
manifest is refused as damaged values are.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fireq_jax.config import LlamaConfig
from fireq_jax.errors import CheckpointError, ConfigError
from fireq_jax.plain import from_plain, to_plain
from fireq_jax.recipe import Recipe

MANIFEST = "fireq_manifest.json"
FORMAT_VERSION = 1
_MAX_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
  """One stored array. INT4 codes are stored packed: uint8, low nibble first.

  Attributes:
    dtype: as stored.
    shape: as stored.
    logical_dtype: what the bytes mean: "int4" for packed codes, else `dtype`.
    sha256: of the bytes in C order; empty where no values exist yet.
  """

  dtype: str
  shape: tuple[int, ...]
  logical_dtype: str
  sha256: str

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  def __str__(self) -> str:
    return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
  """Everything about a checkpoint but its values.

  Attributes:
    producer: versions of the packages that wrote it.
    source: sha256 of every file it was made from, by name.
    calibration: how calibration tokens were chosen.
    leaves: by "/"-joined path, in tree order.
    files: sha256 of every file copied beside the parameters.
  """

  producer: Mapping[str, str]
  config: LlamaConfig
  recipe: Recipe
  source: Mapping[str, str]
  calibration: Mapping[str, Any]
  leaves: Mapping[str, Leaf]
  files: Mapping[str, str]

  @property
  def total_bytes(self) -> int:
    return sum(leaf.nbytes for leaf in self.leaves.values())

  def write(self, folder: Path) -> None:
    content: dict[str, Any] = {
      "format_version": FORMAT_VERSION,
      "producer": dict(self.producer),
      "config": to_plain(self.config),
      "recipe": to_plain(self.recipe),
      "source": dict(self.source),
      "calibration": dict(self.calibration),
      "leaves": {name: to_plain(leaf) for name, leaf in self.leaves.items()},
      "files": dict(self.files),
      "total_bytes": self.total_bytes,
    }
    content["sha256"] = _digest(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")

  @classmethod
  def read(cls, folder: Path) -> "Manifest":
    """Raises `CheckpointError` for anything `write` did not write."""
    path = folder / MANIFEST
    content = _read_json(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
      newer = isinstance(version, int) and version > FORMAT_VERSION
      raise CheckpointError(
        "unknown format version",
        where=path,
        expected=FORMAT_VERSION,
        got=repr(version),
        hint="written by a newer fireq_jax: upgrade" if newer else None,
      )
    digest = content.pop("sha256", None)
    if digest != _digest(content):
      raise CheckpointError(
        "the manifest was edited or damaged",
        where=path,
        hint="make the checkpoint again or copy it again",
      )
    try:
      return cls(
        producer=content["producer"],
        config=from_plain(LlamaConfig, content["config"], "config"),
        recipe=from_plain(Recipe, content["recipe"], "recipe"),
        source=content["source"],
        calibration=content["calibration"],
        leaves={
          name: from_plain(Leaf, leaf, name)
          for name, leaf in content["leaves"].items()
        },
        files=content["files"],
      )
    except (ConfigError, KeyError, AttributeError, TypeError) as error:
      raise CheckpointError(
        "the manifest has invalid content", where=path, got=str(error)
      ) from error


def _digest(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
  try:
    if path.stat().st_size > _MAX_BYTES:
      raise CheckpointError("the manifest is too large", where=path)
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise CheckpointError(
      "the manifest is not JSON",
      where=path,
      hint="make the checkpoint again or copy it again",
    ) from error
  if not isinstance(content, dict):
    raise CheckpointError("the manifest is not a JSON object", where=path)
  return content
