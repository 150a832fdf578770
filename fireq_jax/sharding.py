"""Tensor parallelism: how parameters and the KV cache split over devices.

As in Megatron: q, k, v, gate and up split their outputs, o and down their
inputs (whose partial sums are then added), keys and values their heads. The
embedding and norms are replicated; lm_head splits the vocabulary where it
divides. The codes and scales of a QTensor split along the same logical axis,
so a contracted axis must split between groups.

Shardings carry Auto mesh axes: under `jit`, XLA derives every intermediate
and inserts the sums.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fireq_jax.config import LlamaConfig
from fireq_jax.errors import ConfigError
from fireq_jax.kv_cache import KVCache
from fireq_jax.qtensor import QTensor

AXIS = "tp"

# Logical axis of each projection that is split.
_SPLIT = {
  "q_proj": "out",
  "k_proj": "out",
  "v_proj": "out",
  "o_proj": "in",
  "gate_proj": "out",
  "up_proj": "out",
  "down_proj": "in",
}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-axis mesh over `devices` (None = all) for tensor parallelism."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def param_shardings(params: Any, config: LlamaConfig, mesh: Mesh) -> Any:
  """Returns `params` (arrays or shapes) with a NamedSharding at every leaf.

  Args:
    params: a parameter tree, float or quantised.
    config: its model.
    mesh: has an axis `tp`; its other axes replicate. Explicit and Manual axes
      are treated as Auto.

  Raises:
    ConfigError: no axis `tp`, or it does not divide the model; lists the sizes
      that do.
  """
  if AXIS not in mesh.axis_names:
    raise ConfigError(
      f"the mesh has no axis {AXIS!r}", got=f"axes {mesh.axis_names}"
    )
  _check_divides(params, config, mesh.shape[AXIS])
  auto = _auto(mesh)
  vocab_divides = config.vocab_size % mesh.shape[AXIS] == 0

  def place(path, leaf) -> NamedSharding:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return NamedSharding(auto, _spec(names, leaf.ndim, vocab_divides))

  return jax.tree_util.tree_map_with_path(place, params)


def _spec(names: list[str], ndim: int, vocab_divides: bool) -> PartitionSpec:
  """The split of one leaf, from its path."""
  last = names[-1]
  if last in ("key_scale", "key_shift"):
    return PartitionSpec(AXIS, None)
  split = next((_SPLIT[n] for n in names if n in _SPLIT), None)
  if names[0] == "lm_head" and vocab_divides:
    split = "out"
  if split is None or ndim < 2:
    return PartitionSpec()
  quantised = last in ("codes", "scale")  # stored [out, in], kernels [in, out]
  rows = (split == "out") == quantised
  return PartitionSpec(AXIS, None) if rows else PartitionSpec(None, AXIS)


def _check_divides(params: Any, config: LlamaConfig, tp: int) -> None:
  units = _units(params, config)
  bad = [(name, n, unit) for name, n, unit in units if (n // unit) % tp]
  if not bad:
    return
  valid = [
    t
    for t in range(1, config.num_key_value_heads + 1)
    if all((n // unit) % t == 0 for _, n, unit in units)
  ]
  name, size, unit = bad[0]
  raise ConfigError(
    f"{size} channels in pieces of {unit} do not split over {tp} devices",
    where=name,
    expected=f"tensor parallelism of {' or '.join(map(str, valid))}",
  )


def _units(params: Any, config: LlamaConfig) -> list[tuple[str, int, int]]:
  """(name, size, indivisible piece) of every axis that is split."""
  head = config.head_dim
  queries = head * config.num_attention_heads // config.num_key_value_heads
  units = []
  for i, layer in enumerate(params["model"]["layers"]):
    attention, mlp = layer["self_attn"], layer["mlp"]
    units.append((f"layer {i} k_proj", config.num_key_value_heads * head, head))
    for name, block, unit in (
      ("o_proj", attention, queries),
      ("down_proj", mlp, 1),
    ):
      kernel = block[name]["kernel"]
      if isinstance(kernel, QTensor):
        size = kernel.shape[1]
        unit = math.lcm(unit, kernel.group)
      else:
        size = kernel.shape[0]
      units.append((f"layer {i} {name}", size, unit))
  return units


def cache_shardings(cache: KVCache, mesh: Mesh) -> KVCache:
  """Returns `cache` with a NamedSharding at every leaf: split on kv heads."""
  auto = _auto(mesh)
  return jax.tree.map(
    lambda leaf: NamedSharding(
      auto, PartitionSpec(None, AXIS) if leaf.ndim > 1 else PartitionSpec()
    ),
    cache,
  )


def _auto(mesh: Mesh) -> Mesh:
  axis_types = (AxisType.Auto,) * len(mesh.axis_names)
  return Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
