"""Quantised checkpoints: self-contained, verified, replaced atomically.

A checkpoint is one folder:
  state/ and orbax's own files   the parameters, in logical order;
  fireq_manifest.json            what they are, with a sha256 of every leaf;
  config.json, tokenizer*, ...   copied from the source, also digested.

The parameters are stored as nested dicts of plain arrays (a QTensor becomes
`codes`, `scale`, `tensor_scale`), so orbax alone can read them. Everything
orbax does not promise is here: value checks, and an overwrite that at every
instant leaves either the old or the new checkpoint under the final name.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from fireq_jax import __version__, atomic, sharding
from fireq_jax.config import LlamaConfig
from fireq_jax.errors import CheckpointError, ResourceError, disk_errors
from fireq_jax.manifest import MANIFEST, Leaf, Manifest
from fireq_jax.models.llama import abstract_params
from fireq_jax.plan import size
from fireq_jax.recipe import Recipe

Params = Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
  """What a checkpoint was made from.

  Attributes:
    digests: sha256 of every input file, by name.
    calibration: how the calibration tokens were chosen, as JSON values.
    side_files: files to copy beside the parameters (tokenizer, configs).
  """

  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
  calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  side_files: Sequence[Path] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
  """A loaded model: the parameter tree and what it is.

  `manifest` is None for a model that comes from a Hugging Face folder.
  """

  params: Params
  config: LlamaConfig
  recipe: Recipe
  path: Path
  manifest: Manifest | None


def save(
  path: str | os.PathLike,
  params: Params,
  *,
  config: LlamaConfig,
  recipe: Recipe,
  source: Provenance | None = None,
  overwrite: bool = False,
  verify: bool = True,
) -> Manifest:
  """Writes `params` under `path`, all or nothing.

  Writes to a temporary sibling, reads it back and compares digests unless
  `verify` is False, then renames. An existing checkpoint is replaced only
  with `overwrite`, in one step where the file system can exchange names.

  Raises:
    CheckpointError: the destination is taken, or the tree is not what
      `config` and `recipe` describe.
    ResourceError: no permission, no space, or another process got there first.
  """
  source = source or Provenance()
  target = check_destination(path, overwrite=overwrite)
  leaves = {k: np.asarray(v) for k, v in leaf_paths(params).items()}
  described = {
    name: dataclasses.replace(_describe(name, x), sha256=digest)
    for (name, x), digest in zip(leaves.items(), _digests(leaves.values()))
  }
  _same_leaves(described, _expected(config, recipe), target)
  with _disk_errors(target), atomic.staging(target) as folder:
    _in_a_thread(_store, folder, leaves)
    for file in source.side_files:
      shutil.copyfile(file, folder / file.name)
    manifest = Manifest(
      producer={
        "fireq_jax": __version__,
        "jax": jax.__version__,
        "orbax": importlib.metadata.version("orbax-checkpoint"),
      },
      config=config,
      recipe=recipe,
      source=dict(source.digests),
      calibration=dict(source.calibration),
      leaves=described,
      files={f.name: _file_digest(folder / f.name) for f in source.side_files},
    )
    manifest.write(folder)
    if verify:
      _check(folder, verify=True)
    atomic.publish(folder, target, overwrite=overwrite)
  return manifest


def load(
  path: str | os.PathLike,
  mesh: jax.sharding.Mesh | None = None,
  verify: bool = True,
) -> Checkpoint:
  """Reads a checkpoint, one decoder layer at a time.

  Args:
    path: folder written by `save`.
    mesh: shards tensor-parallel over its axis `tp` (`sharding.py`), however
      many devices wrote the checkpoint; None = the default device.
    verify: compares the sha256 of every leaf; False trusts the disk.

  Raises:
    CheckpointError: missing, foreign, damaged, or of a newer format.
    ConfigError: the mesh does not divide the model.
  """
  folder = _absolute(path)
  manifest = inspect(folder)
  abstract = abstract_params(manifest.config, manifest.recipe)
  placement = dict.fromkeys(leaf_paths(abstract))
  if mesh is not None:
    placement = leaf_paths(
      sharding.param_shardings(abstract, manifest.config, mesh)
    )
  placed = {}
  for part in _read_parts(folder, manifest, verify):
    placed |= {n: jax.device_put(x, placement[n]) for n, x in part.items()}
  params = jax.tree.unflatten(
    jax.tree.structure(abstract), [placed[name] for name in placement]
  )
  return Checkpoint(
    params=params,
    config=manifest.config,
    recipe=manifest.recipe,
    path=folder,
    manifest=manifest,
  )


def inspect(path: str | os.PathLike, verify: bool = False) -> Manifest:
  """Returns the manifest of a checkpoint after checking all but its values.

  With `verify`, reads the values too and compares their digests.

  Raises:
    CheckpointError: as `load`.
  """
  folder = _absolute(path)
  _refuse_foreign(folder)
  return _check(folder, verify)


def check_destination(
  path: str | os.PathLike,
  *,
  overwrite: bool = False,
  needed_bytes: int = 0,
  source: Path | None = None,
) -> Path:
  """Returns the absolute destination if `save` could write there.

  Args:
    path: where the checkpoint is to be.
    overwrite: whether an existing checkpoint may be replaced.
    needed_bytes: free disk space required.
    source: folder of the model being quantised; must not be touched.

  Raises:
    CheckpointError: taken, not a folder, or inside (or around) the source.
    ResourceError: not writable, or too little space.
  """
  target = _absolute(path)
  with _disk_errors(target):
    if target.exists() and not target.is_dir():
      raise CheckpointError("destination is a file", where=target)
    if target.exists() and any(target.iterdir()):
      if not (target / MANIFEST).is_file():
        raise CheckpointError(
          "destination holds other files, which are never overwritten",
          where=target,
        )
      if not overwrite:
        raise CheckpointError(
          "destination exists", where=target, hint="--overwrite replaces it"
        )
    if source is not None:
      origin = source.resolve()
      if origin in (target, *target.parents) or target in origin.parents:
        raise CheckpointError(
          "destination and source overlap", where=target, got=origin
        )
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
      raise CheckpointError("not a folder", where=parent)
    if not os.access(parent, os.W_OK | os.X_OK):
      raise ResourceError("no permission to write", where=parent)
    free = shutil.disk_usage(parent).free
  if free < needed_bytes:
    raise ResourceError(
      "too little disk space",
      where=parent,
      expected=size(needed_bytes),
      got=size(free),
    )
  return target


def leaf_paths(tree: Params) -> dict[str, Any]:
  """Leaves by "/"-joined path, in tree order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


_DAMAGED = "the checkpoint is damaged: make it again or copy it again"


def _store(folder: Path, leaves: Mapping[str, np.ndarray]) -> None:
  """Lets orbax write arrays from where they are.

  By default it copies the model and holds it once more, compressed, which
  INT4 codes are already.
  """
  context = ocp.Context()
  context.memory.deepcopy_host_arrays = False
  context.array.saving.use_compression = False
  with context:
    ocp.save(str(folder), _nest(leaves))


def _in_a_thread(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args)`, waiting for its end even when interrupted.

  What a signal's handler raises, it raises in the main thread. Orbax would
  swallow it there, and goes on writing in threads of its own after it.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # Interrupted while it starts a thread, a pool does not wait for that one.
    pool.submit(int).result()
    return pool.submit(function, *args).result()


def _absolute(path: str | os.PathLike) -> Path:
  text = os.fspath(path)
  if "://" in text:
    raise CheckpointError(
      "only local paths are supported", got=text, hint="copy it here first"
    )
  if not text:
    raise CheckpointError("the path of a checkpoint is empty")
  try:
    return Path(text).expanduser().resolve()
  except (OSError, RuntimeError) as error:
    raise CheckpointError("not a usable path", got=text[:100]) from error


def _refuse_foreign(folder: Path) -> None:
  """Says what `folder` is when it is no checkpoint of ours."""
  with _disk_errors(folder):
    if (folder / MANIFEST).is_file() and not atomic.is_temporary(folder):
      return
    if not folder.exists():
      backup = atomic.backup_path(folder)
      raise CheckpointError(
        "no such checkpoint",
        where=folder,
        hint=f"an interrupted overwrite left it as {backup}: rename it back"
        if backup.exists()
        else None,
      )
    hint = None
    if any(folder.glob("*.safetensors")):
      hint = "a Hugging Face folder: scripts/quantize.py makes a checkpoint"
    elif atomic.is_temporary(folder) or folder.name.endswith(
      ".orbax-checkpoint-tmp"
    ):
      hint = "left by an interrupted save; it can be deleted"
    raise CheckpointError(
      "not a fireq_jax checkpoint",
      where=folder,
      expected=f"a folder with {MANIFEST}",
      hint=hint,
    )


def _check(folder: Path, verify: bool) -> Manifest:
  """The work of `inspect`, also for a folder not yet under its final name."""
  manifest = Manifest.read(folder)
  _same_leaves(
    manifest.leaves, _expected(manifest.config, manifest.recipe), folder
  )
  for name, digest in manifest.files.items():
    file = folder / name
    if not file.is_file() or _file_digest(file) != digest:
      raise CheckpointError(
        "file differs from what was written", where=file, hint=_DAMAGED
      )
  if verify:  # a deque of length 0 holds no part while the next is read
    collections.deque(_read_parts(folder, manifest, verify=True), maxlen=0)
  return manifest


def _expected(config: LlamaConfig, recipe: Recipe) -> dict[str, Leaf]:
  return {
    name: _describe(name, x)
    for name, x in leaf_paths(abstract_params(config, recipe)).items()
  }


def _describe(name: str, x: Any) -> Leaf:
  dtype = str(np.dtype(x.dtype))
  return Leaf(
    dtype=dtype,
    shape=tuple(x.shape),
    logical_dtype=(
      "int4" if name.endswith("/codes") and dtype == "uint8" else dtype
    ),
    sha256="",
  )


def _same_leaves(
  got: Mapping[str, Leaf], expected: Mapping[str, Leaf], where: Path
) -> None:
  """Raises unless names, shapes and dtypes agree."""
  faults = [f"{n} missing" for n in expected if n not in got]
  faults += [f"{n} unexpected" for n in got if n not in expected]
  for name in expected.keys() & got.keys():
    a, b = expected[name], got[name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
      faults.append(f"{name} expected {a}, got {b}")
  if faults:
    more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
    raise CheckpointError(
      "parameters do not match the model config and recipe: "
      + "; ".join(sorted(faults)[:10])
      + more,
      where=where,
    )


def _nest(flat: Mapping[str, Any]) -> Any:
  """Nested dicts from "/"-joined paths."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def _part(path: str) -> str:
  """The piece read together: one decoder layer, or one other module."""
  return "/".join(path.split("/")[:3])


def _read_parts(
  folder: Path, manifest: Manifest, verify: bool
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the leaves on the host, a decoder layer at a time."""
  stored = leaf_paths(_guarded(folder, _stored_metadata))
  _same_leaves(
    {name: _describe(name, x) for name, x in stored.items()},
    manifest.leaves,
    folder,
  )
  for _, names in itertools.groupby(manifest.leaves, _part):
    template = {
      name: np.empty(manifest.leaves[name].shape, manifest.leaves[name].dtype)
      for name in names
    }
    part = leaf_paths(_guarded(folder, _restore, template))
    if verify:
      for name, digest in zip(part, _digests(part.values())):
        if digest != manifest.leaves[name].sha256:
          raise CheckpointError(
            "values differ from what was written",
            where=f"{folder}: {name}",
            hint=_DAMAGED,
          )
    yield part
    del part


def _restore(folder: Path, template: Mapping[str, np.ndarray]) -> Any:
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    return ocp.load(str(folder), _nest(template))


def _stored_metadata(folder: Path) -> Any:
  return ocp.metadata(str(folder)).metadata


def _guarded(folder: Path, read: Callable[..., Any], *args: Any) -> Any:
  """Returns `read(folder, *args)`; what orbax raises becomes one error."""
  try:
    return _in_a_thread(read, folder, *args)
  except (MemoryError, CheckpointError):
    raise
  except Exception as error:
    reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    raise CheckpointError(
      "unreadable", where=folder, got=reason, hint=_DAMAGED
    ) from error


def _digests(arrays: Iterable[np.ndarray]) -> list[str]:
  def digest(x: np.ndarray) -> str:
    contiguous = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return hashlib.sha256(contiguous.data).hexdigest()

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    return list(pool.map(digest, arrays))


def _file_digest(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
  """As `disk_errors`, for failures that reach us through orbax too."""
  try:
    with disk_errors(where):
      yield
  except ValueError as error:
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
      raise ResourceError(os.strerror(int(number[1])), where=where) from error
    if "RESOURCE_EXHAUSTED" in str(error):
      raise ResourceError(os.strerror(errno.ENOSPC), where=where) from error
    raise
