"""Opens a Hugging Face model folder without trusting it.

Only JSON and safetensors are read, all headers before any value, and no code
from the folder ever runs. The safetensors library checks that each header
describes its file byte for byte; what it accepts but must not mean anything
here (names given twice, other dtypes, an index that disagrees, paths out of
the folder, values that are not finite) is refused below.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fireq_jax.errors import (
  CheckpointError,
  ResourceError,
  UnsupportedError,
  disk_errors,
)
from fireq_jax.manifest import MANIFEST

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Files worth copying beside a quantised model.
_SIDE_FILES = (
  "config.json",
  "generation_config.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)

_DTYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F32": np.dtype(np.float32),
}

_PICKLES = (".bin", ".pth", ".pt", ".ckpt")

# A 405B model's index takes 0.1 MB; parsed JSON is tens of times its text.
_MAX_JSON_BYTES = 8 << 20

_AGAIN = "download it again"


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
  """Where a tensor's values lie: row-major, little-endian, from `offset`."""

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HFCheckpoint:
  """A validated model folder; values are read on demand.

  Attributes:
    path: the folder.
    config: `config.json`.
    generation_config: `generation_config.json`, if there is one.
    shards: the safetensors files.
    side_files: the tokenizer and configuration files that exist.
    tensors: by name.
  """

  path: Path
  config: Mapping[str, Any]
  generation_config: Mapping[str, Any] | None
  shards: tuple[Path, ...]
  side_files: tuple[Path, ...]
  tensors: Mapping[str, StoredTensor]

  @property
  def total_bytes(self) -> int:
    """Size of all values."""
    return sum(tensor.nbytes for tensor in self.tensors.values())

  def names(self) -> list[str]:
    return list(self.tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensor(name).shape

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Returns a tensor, or some of its rows, in its stored dtype.

    Raises:
      CheckpointError: no such tensor, a value is NaN or infinite, or the
        file has changed.
      ResourceError: the disk fails.
    """
    tensor = self._tensor(name)
    start, stop, step = rows.indices(tensor.shape[0] if tensor.shape else 1)
    if step != 1:
      raise ValueError(f"rows must be contiguous, got {rows}")
    shape = tensor.shape and (max(stop - start, 0), *tensor.shape[1:])
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    with disk_errors(tensor.file):
      values = np.fromfile(
        tensor.file,
        tensor.dtype,
        count=math.prod(shape),
        offset=tensor.offset + start * row,
      )
    if values.size != math.prod(shape):
      raise CheckpointError("the file has become shorter", where=tensor.file)
    bad = _count_nonfinite(values)
    if bad:
      raise CheckpointError(
        f"{bad} of {values.size} values of {name} are NaN or infinite",
        where=tensor.file.name,
        hint=_AGAIN,
      )
    return values.reshape(shape)

  def sha256(self) -> dict[str, str]:
    """Returns the digest of every file the model is made from, by name."""
    files = [*self.shards, *self.side_files]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      return dict(zip([f.name for f in files], pool.map(_sha256, files)))

  def _tensor(self, name: str) -> StoredTensor:
    if name not in self.tensors:
      raise CheckpointError(f"no tensor {name}", where=self.path)
    return self.tensors[name]


def open_checkpoint(path: str | os.PathLike) -> HFCheckpoint:
  """Validates every file of a model folder but its values.

  Raises:
    CheckpointError: a file is missing, damaged, or disagrees with another.
    UnsupportedError: pickled, or not in bf16, f16 or f32.
    ResourceError: a file cannot be read.
  """
  folder = Path(path).expanduser()
  with disk_errors(folder):
    if not folder.is_dir():
      raise CheckpointError(
        "not a folder" if folder.exists() else "no such folder",
        where=folder,
        hint="expected a downloaded Hugging Face model",
      )
    names = sorted(entry.name for entry in folder.iterdir())
  weight_map, shards = _find_shards(folder, names)
  config = _read_json(folder / "config.json")
  generation_config = None
  if "generation_config.json" in names:
    generation_config = _read_json(folder / "generation_config.json")
  tensors: dict[str, StoredTensor] = {}
  for shard in shards:
    for name, tensor in _read_header(shard).items():
      if name in tensors:
        raise CheckpointError(
          f"tensor {_show(name)} is in two files",
          where=folder,
          got=f"{tensors[name].file.name} and {shard.name}",
        )
      tensors[name] = tensor
  if weight_map is not None:
    _check_index(folder / INDEX, weight_map, tensors)
  # No model mixes these: one dtype was damaged into the other.
  if {_DTYPES["BF16"], _DTYPES["F16"]} <= {t.dtype for t in tensors.values()}:
    raise CheckpointError(
      "tensors of both BF16 and F16", where=folder, hint=_AGAIN
    )
  return HFCheckpoint(
    path=folder,
    config=config,
    generation_config=generation_config,
    shards=shards,
    side_files=tuple(
      _inside(folder / name) for name in _SIDE_FILES if name in names
    ),
    tensors=tensors,
  )


def _find_shards(
  folder: Path, names: list[str]
) -> tuple[dict[str, str] | None, tuple[Path, ...]]:
  """Returns the index's map of tensors to files, if any, and the files."""
  found = [name for name in names if name.endswith(".safetensors")]
  if not found and INDEX not in names:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
      raise UnsupportedError(
        "pickle checkpoints are refused: reading one can run any code",
        where=folder / pickles[0],
        hint="convert it to safetensors",
      )
    ours = MANIFEST in names
    raise CheckpointError(
      "no .safetensors file",
      where=folder,
      hint="the model is quantised already" if ours else "wrong folder?",
    )
  if INDEX in names:
    weight_map = _weight_map(folder / INDEX)
    used = sorted(set(weight_map.values()))
  else:
    weight_map = None
    used = [SINGLE] if SINGLE in found else found
    if len(used) > 1:
      raise CheckpointError(
        f"{len(used)} .safetensors files but no {INDEX}", where=folder
      )
  unused = [name for name in found if name not in used]
  if SINGLE in unused:
    raise CheckpointError(
      f"both {SINGLE} and an index of other files",
      where=folder,
      hint="delete what is not the model",
    )
  if unused:
    warnings.warn(
      f"{folder}: not part of the model: {', '.join(unused)}", stacklevel=3
    )
  return weight_map, tuple(_inside(folder / name) for name in used)


def _weight_map(path: Path) -> dict[str, str]:
  """Returns the index's tensor -> file, every file a plain name."""
  weight_map = _read_json(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise CheckpointError("no weight_map", where=path, hint=_AGAIN)
  for file in weight_map.values():
    plain = isinstance(file, str) and file == os.path.basename(file)
    if not plain or not file.endswith(".safetensors") or "\\" in file:
      raise CheckpointError(
        "weight_map names something other than a file of the folder",
        where=path,
        expected="NAME.safetensors",
        got=reprlib.repr(file),
      )
  return weight_map


def _check_index(
  path: Path,
  weight_map: Mapping[str, str],
  tensors: Mapping[str, StoredTensor],
) -> None:
  """Raises unless index and headers name the same tensors in the same files."""
  for name in sorted(weight_map.keys() | tensors.keys()):
    listed = weight_map.get(name)
    stored = tensors[name].file.name if name in tensors else None
    if listed != stored:
      raise CheckpointError(
        f"the index is wrong about {_show(name)}",
        where=path,
        expected=listed or "no such tensor",
        got=stored or "no such tensor",
      )


def _inside(path: Path) -> Path:
  """Returns `path` if it is a file that does not lead out of the folder.

  Of links, those within the folder are followed, and those of the Hugging
  Face cache, from `snapshots/REVISION/` to `blobs/`.
  """
  with disk_errors(path):
    if not path.is_file():
      raise CheckpointError("no such file", where=path, hint=_AGAIN)
    folder = path.parent.resolve()
    target = path.resolve()
  cache = folder.parent.parent / "blobs"
  in_cache = folder.parent.name == "snapshots" and target.parent == cache
  if folder not in target.parents and not in_cache:
    raise CheckpointError(
      "a link leads out of the folder", where=path, got=target
    )
  return path


def _read_json(path: Path) -> dict[str, Any]:
  """Returns the object a file holds."""
  with disk_errors(_inside(path)):
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
      raise CheckpointError(
        "too large to be what its name says",
        where=path,
        expected=f"at most {_MAX_JSON_BYTES} bytes",
        got=size,
      )
    text = path.read_bytes()
  return _parse_json(text, path)


def _parse_json(text: bytes, where: Path) -> dict[str, Any]:
  """Parses an object strictly: no duplicate keys, no NaN."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
      seen = set()
      for key, _ in pairs:
        if key in seen:
          raise ValueError(f"{_show(key)} is given twice")
        seen.add(key)
    return values

  def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")

  try:
    values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(
      "not valid JSON", where=where, got=str(error)[:200], hint=_AGAIN
    ) from error
  if not isinstance(values, dict):
    raise CheckpointError("not a JSON object", where=where, hint=_AGAIN)
  return values


def _read_header(shard: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a shard, after all checks but those of values."""
  with disk_errors(shard):
    size = shard.stat().st_size
    with shard.open("rb") as file:
      start = file.read(8)
      length = int.from_bytes(start, "little")
      text = b""
      if len(start) == 8 and length <= min(size - 8, _MAX_JSON_BYTES):
        text = file.read(length)
  if not text.startswith(b"{"):
    raise CheckpointError(
      "truncated, or not a safetensors file",
      where=shard,
      got=f"{size} bytes",
      hint=_pointer_hint(start),
    )
  header = _parse_json(text, shard)
  header.pop("__metadata__", None)
  _check_size(shard, header, 8 + length, size)
  try:
    with safe_open(shard, framework="numpy"):
      pass
  except SafetensorError as error:
    raise CheckpointError(
      "damaged safetensors header", where=shard, got=error, hint=_AGAIN
    ) from error
  except OSError as error:
    raise ResourceError(str(error), where=shard) from error
  for name, entry in header.items():
    if entry["dtype"] not in _DTYPES:
      raise UnsupportedError(
        f"unsupported dtype of {_show(name)}",
        where=shard,
        expected=", ".join(_DTYPES),
        got=entry["dtype"],
        hint="a quantised model cannot be the source",
      )
  return {
    name: StoredTensor(
      file=shard,
      dtype=_DTYPES[entry["dtype"]],
      shape=tuple(entry["shape"]),
      offset=8 + length + entry["data_offsets"][0],
    )
    for name, entry in header.items()
  }


def _check_size(
  shard: Path, header: Mapping[str, Any], start: int, size: int
) -> None:
  """Raises if a shard is cut off; all else is left to the strict reader."""
  ends = [0]
  for entry in header.values():
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list):
      ends += [end for end in offsets if isinstance(end, int)]
  if size < start + max(ends):
    raise CheckpointError(
      "truncated",
      where=shard,
      expected=f"{start + max(ends)} bytes",
      got=size,
      hint=_AGAIN,
    )


def _pointer_hint(start: bytes) -> str:
  if start == b"version ":
    return "a git-lfs pointer: run git lfs pull"
  if start.lstrip().startswith(b"<"):
    return "a web page: the download failed"
  return _AGAIN


def _count_nonfinite(values: np.ndarray) -> int:
  """Counts values whose exponent bits are all ones, a block at a time."""
  unsigned = np.dtype(f"u{values.dtype.itemsize}")
  one, infinity = unsigned.type(1), np.array(np.inf, values.dtype)
  limit = infinity.view(unsigned) << one
  bits = values.view(unsigned)
  block = 1 << 20
  return sum(
    int(np.count_nonzero((bits[i : i + block] << one) >= limit))
    for i in range(0, bits.size, block)
  )


def _sha256(file: Path) -> str:
  with disk_errors(file), file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _show(name: str) -> str:
  """A name from the file, safe to print on one line."""
  return repr(name) if len(name) < 100 else repr(name[:100]) + "..."
