"""Compiles jitted functions to Hopper machine code on a CPU, by JAX's AOT path.

Needs the jax-cuda13-plugin and jax-cuda13-pjrt wheels, no driver and no GPU.
The environment variable MOSAIC_GPU_DUMP_TO must name the folder of the reports.
"""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

_TARGET = Path(__file__).with_name("h200.txtpb")

needs_plugin = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs jax-cuda13-plugin to compile for a GPU (no GPU)",
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What ptxas says of one kernel."""

  spilled_bytes: int
  serialised_wgmma: bool


def compile_for_hopper(function, args, **options):
  """The executable of jit(function, **options) for arguments of such shapes."""
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=_TARGET.read_text(), topology="1x1x1"
  )
  mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args
  )
  return jax.jit(function, **options).lower(*args).compile()


def kernels(executable) -> list[str]:
  """Instructions of a program that start something on the device."""
  entry = executable.as_text().split("ENTRY", 1)[1]
  views = "parameter", "bitcast", "get-tuple-element", "tuple"
  return [
    line.strip()
    for line in entry.splitlines()
    if " = " in line and not any(f" {view}(" in line for view in views)
  ]


def compile_all(functions, folder: Path) -> list[Report]:
  """Reports of the kernels in [(function, argument shapes)], in order."""
  reports = []
  for function, args in functions:
    before = set(folder.glob("*.ptxas"))
    compile_for_hopper(function, args)
    for path in sorted(set(folder.glob("*.ptxas")) - before):
      text = path.read_text()
      spills = re.findall(r"(\d+) bytes spill", text)
      reports.append(
        Report(
          spilled_bytes=sum(map(int, spills)),
          serialised_wgmma="serialized" in text,
        )
      )
  return reports
