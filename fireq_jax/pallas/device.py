"""Where the kernels run."""

from collections.abc import Callable
from typing import Any

import jax


def require_hopper(multiprocessors: int = 1) -> None:
  """Raises NotImplementedError unless JAX computes on a Hopper GPU.

  Args:
    multiprocessors: how many it must have at least.
  """
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise NotImplementedError(f"the kernels need a GPU, not {device.platform}")
  if device.compute_capability != "9.0":
    raise NotImplementedError(
      "the kernels need compute capability 9.0,"
      f" not {device.compute_capability}"
    )
  if device.core_count < multiprocessors:
    raise NotImplementedError(
      f"the kernel needs {multiprocessors} multiprocessors,"
      f" not {device.core_count}"
    )


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `vmap` call `function` for one element after another.

  For kernels whose CTAs count each other's arrivals, of which no two launches
  may run at a time, and for those that change their operands.
  """
  return jax.custom_batching.sequential_vmap(function)
