"""Any model folder as a `Checkpoint`: ours, or Hugging Face's on the fly."""

import importlib.resources
import os
from pathlib import Path

import jax

from fireq_jax import checkpoint, hf, recipe, sharding
from fireq_jax.checkpoint import Checkpoint
from fireq_jax.config import LlamaConfig
from fireq_jax.manifest import MANIFEST
from fireq_jax.models import llama_hf

DEMO = "demo"


def resolve(ckpt: str | os.PathLike) -> Path:
  """Returns the folder `ckpt` names; "demo" is the model in the package."""
  if os.fspath(ckpt) == DEMO:
    return Path(str(importlib.resources.files("fireq_jax"))) / "demo"
  return Path(ckpt).expanduser()


def load_model(
  ckpt: str | os.PathLike,
  mesh: jax.sharding.Mesh | None = None,
  verify: bool = True,
) -> Checkpoint:
  """Loads a quantised checkpoint, or a Hugging Face folder as it is.

  A Hugging Face model gets the recipe `none`, and no manifest.

  Raises:
    CheckpointError: neither, or damaged.
    ConfigError: the mesh does not divide the model.
  """
  folder = resolve(ckpt)
  if (folder / MANIFEST).exists() or not (folder / "config.json").is_file():
    return checkpoint.load(folder, mesh, verify)
  source = hf.open_checkpoint(folder)
  config = LlamaConfig.from_hf(source.config, source.generation_config)
  llama_hf.check_complete(source, config)
  params = llama_hf.load_params(source, config)
  if mesh is None:
    params = jax.device_put(params)
  else:
    params = jax.device_put(
      params, sharding.param_shardings(params, config, mesh)
    )
  return Checkpoint(
    params=params,
    config=config,
    recipe=recipe.load("none"),
    path=folder,
    manifest=None,
  )
