"""What quantising a model will need, before a weight is read."""

import dataclasses
import math
import os
import resource
from pathlib import Path

import jax
import numpy as np

from fireq_jax.config import LlamaConfig
from fireq_jax.errors import ResourceError
from fireq_jax.kv_cache import bytes_per_token
from fireq_jax.models.llama import abstract_params
from fireq_jax.recipe import PROJECTIONS, Recipe

# Interpreter, libraries and compiled programs.
_BASE_BYTES = 700_000_000
# Copies of a layer alive at once: read, smoothed, quantised, dequantised.
_LAYER_COPIES = 4
# And in f32 while it is trained: weights, two moments, values, slopes, fusions.
_TRAINED_COPIES = 6
_DISK_MARGIN = 1.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
  """Sizes in bytes; the peak is an estimate, the rest is exact.

  Attributes:
    layers: decoder layers.
    quantized: projections that become INT4, of all in the model.
    projections: all of them.
    bytes_in: of the weights as they are.
    bytes_out: of the weights as they will be.
    peak_bytes: host memory at the worst moment.
    disk_bytes: free space needed.
    kv_bytes: of one token in the KV cache.
  """

  layers: int
  quantized: int
  projections: int
  bytes_in: int
  bytes_out: int
  peak_bytes: int
  disk_bytes: int
  kv_bytes: int

  def __str__(self) -> str:
    return "\n".join(
      [
        f"layers        {self.layers}, {self.quantized} of"
        f" {self.projections} projections become INT4",
        f"weights in    {size(self.bytes_in)}",
        f"weights out   {size(self.bytes_out)}",
        f"KV cache      {self.kv_bytes} bytes a token",
        f"peak memory   about {size(self.peak_bytes)}",
        f"disk needed   {size(self.disk_bytes)}",
      ]
    )


def make_plan(
  config: LlamaConfig,
  recipe: Recipe,
  *,
  bytes_in: int,
  calibration_tokens: int = 0,
) -> Plan:
  """Derives the plan from shapes alone.

  Args:
    config: the model.
    recipe: what is done to it.
    bytes_in: size of the source weights.
    calibration_tokens: how many tokens flow through every layer.
  """
  params = abstract_params(config, recipe)
  bytes_out = sum(_nbytes(x) for x in jax.tree.leaves(params))
  float_layer = abstract_params(
    dataclasses.replace(config, num_hidden_layers=1), Recipe(name="float")
  )["model"]["layers"][0]
  layer_elements = sum(math.prod(x.shape) for x in jax.tree.leaves(float_layer))
  if recipe.head is not None:  # quantised as a whole, before a layer is read
    head_elements = config.vocab_size * config.hidden_size
    layer_elements = max(layer_elements, head_elements)
  activations = 2 * 2 * calibration_tokens * config.hidden_size
  moments = 0
  if calibration_tokens and (recipe.solver.weighted or recipe.solver.gptq):
    moments = 3 * 4 * config.intermediate_size**2
  copies = _LAYER_COPIES
  if recipe.tuning.steps:
    copies += _TRAINED_COPIES
  count = config.num_hidden_layers
  formats = [
    recipe.weight_format(i, name, count)
    for i in range(count)
    for name in PROJECTIONS
  ]
  return Plan(
    layers=count,
    quantized=sum(f is not None for f in formats),
    projections=len(formats),
    bytes_in=bytes_in,
    bytes_out=bytes_out,
    peak_bytes=_BASE_BYTES
    + bytes_out
    + copies * 4 * layer_elements
    + activations
    + moments,
    disk_bytes=int(bytes_out * _DISK_MARGIN) + (1 << 20),
    kv_bytes=bytes_per_token(config, recipe.kv),
  )


def check_memory(needed_bytes: int) -> None:
  """Raises `ResourceError` if the process cannot have that much memory."""
  available = available_memory()
  if available < needed_bytes:
    raise ResourceError(
      "too little memory",
      expected=size(needed_bytes),
      got=size(available),
      hint="shorten the calibration or use a larger machine",
    )


def available_memory() -> int:
  """Bytes this process can allocate at most, as far as the system tells."""
  limits = [2**63]
  soft, _ = resource.getrlimit(resource.RLIMIT_AS)
  if soft != resource.RLIM_INFINITY:
    limits.append(soft - _virtual_bytes())
  for line in _lines("/proc/meminfo"):
    if line.startswith("MemAvailable:"):
      limits.append(int(line.split()[1]) * 1024)
  for name in ("memory.max", "memory/memory.limit_in_bytes"):
    limits += [int(x) for x in _lines(f"/sys/fs/cgroup/{name}") if x.isdigit()]
  return max(0, min(limits))


def size(n: float) -> str:
  """Bytes for people, in decimal units."""
  for unit in ("B", "kB", "MB"):
    if n < 1000:
      return f"{n:.4g} {unit}"
    n /= 1000
  return f"{n:.2f} GB"


def _virtual_bytes() -> int:
  pages = _lines("/proc/self/statm")
  return int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _lines(path: str) -> list[str]:
  try:
    return Path(path).read_text().splitlines()
  except OSError:
    return []


def _nbytes(x: jax.ShapeDtypeStruct) -> int:
  return math.prod(x.shape) * np.dtype(x.dtype).itemsize
