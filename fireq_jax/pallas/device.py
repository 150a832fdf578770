"""Where the kernels run."""

import jax


def require_hopper() -> None:
  """Raises NotImplementedError unless JAX computes on a Hopper GPU."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise NotImplementedError(f"the kernels need a GPU, not {device.platform}")
  if device.compute_capability != "9.0":
    raise NotImplementedError(
      f"the kernels need compute capability 9.0, not {device.compute_capability}"
    )
