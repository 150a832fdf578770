"""The matrix product of activations with a float or quantised weight.

The only place that knows how a projection's weight is held.
"""

import jax
import jax.numpy as jnp

from fireq_jax.config import Implementation
from fireq_jax.qtensor import QTensor, quantize_e4m3


def linear(
  x: jax.Array,
  w: jax.Array | QTensor,
  *,
  implementation: Implementation = "auto",
  out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Projects x, accumulating in f32.

  With a `QTensor` whose activation is e4m3, x is first rounded to e4m3 per
  token (FireQ, W4A8); with bf16, only the weight is quantised.

  Args:
    x: bf16 or f32 [..., C].
    w: [C, N] of x's dtype, or a `QTensor` [N, C].
    implementation: "mosaic_gpu" for the Hopper kernel, "xla" for plain JAX.
    out_dtype: dtype of the result, that of x by default.

  Returns:
    [..., N].

  Raises:
    NotImplementedError: the kernel asked for by name cannot run this.
  """
  if implementation == "mosaic_gpu":
    raise NotImplementedError("no Mosaic GPU kernel for this projection")
  out_dtype = out_dtype or x.dtype
  if not isinstance(w, QTensor):
    return _matmul(x, w).astype(out_dtype)
  scale = None
  if w.activation == "e4m3":
    x, scale = quantize_e4m3(x)
  # Values rounded to e4m3 are exact in bf16; unrounded products need f32.
  bf16_exact = w.scale.dtype == jnp.float8_e4m3fn and x.dtype != jnp.float32
  operand = jnp.bfloat16 if bf16_exact else jnp.float32
  y = _matmul(x.astype(operand), w.dequantize(operand).T)
  if scale is not None:
    y = y * scale[..., None]
  return y.astype(out_dtype)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., C] @ w [C, N] with exact products, summed in f32."""
  return jnp.matmul(
    x,
    w,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
