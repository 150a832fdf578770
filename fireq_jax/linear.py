"""The matrix product of activations with a float or quantised weight.

The only place that knows how a projection's weight is held.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fireq_jax.config import Implementation, check_implementation
from fireq_jax.pallas import act_quant, int4_matmul, reference, tunings
from fireq_jax.pallas.device import require_hopper
from fireq_jax.pallas.layouts import PackedInt4
from fireq_jax.qtensor import QTensor, quantize_e4m3, quantize_norm_e4m3

Weight = jax.Array | QTensor | PackedInt4
# Most tokens that a matmul rounds faster than a kernel of their own.
QUANTISING_TOKENS = 16


class RMSNorm(NamedTuple):
  """x / rms(x) * weight over the last axis, in f32."""

  weight: jax.Array
  eps: float

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., C] of any float dtype -> f32 [..., C]."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scaled = x * jax.lax.rsqrt(mean_square + self.eps)
    return scaled * self.weight.astype(jnp.float32)


def linear(
  x: jax.Array,
  w: Weight,
  *,
  norm: RMSNorm | None = None,
  residual: jax.Array | None = None,
  implementation: Implementation = "auto",
  out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Projects norm(x), accumulating in f32, and adds the residual.

  With a quantised weight whose activation is e4m3, norm(x) is rounded to
  e4m3 per token (FireQ, W4A8), without being rounded to x's dtype before;
  with bf16, only the weight is quantised.

  Args:
    x: bf16 or f32 [..., C].
    w: [C, N] of x's dtype, a `QTensor` [N, C], or a `PackedInt4`; one that is
      gated gives silu(gate) * up of its two projections.
    norm: applied to x first.
    residual: [..., N], added before the result is rounded.
    implementation: of a quantised projection: "mosaic_gpu" for the Hopper
      kernel, "xla" for plain JAX. A float one is always plain JAX.
    out_dtype: dtype of the result, that of x by default.

  Returns:
    [..., N].

  Raises:
    ConfigError: there is no such implementation.
    NotImplementedError: the kernel asked for by name cannot run this.
  """
  check_implementation(implementation)
  out_dtype = out_dtype or x.dtype
  if isinstance(w, QTensor) and w.is_e4m3 and w.activation == "e4m3":
    y = _e4m3(x, w, norm, implementation)
    if residual is not None:
      y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
  if implementation == "mosaic_gpu" and isinstance(w, QTensor):
    raise NotImplementedError("the kernel needs weights of prepare()")
  if isinstance(w, PackedInt4):
    return _packed(x, w, norm, residual, out_dtype, implementation)
  scale = None
  normed = lambda: (x if norm is None else norm(x)).astype(x.dtype)
  if isinstance(w, QTensor):
    # Values rounded to e4m3 are exact in bf16; unrounded products need f32.
    rounded = w.scale.dtype == jnp.float8_e4m3fn
    if w.activation == "e4m3":
      operand = jnp.bfloat16 if rounded else jnp.float32
      if norm is None:
        x, scale = quantize_e4m3(x, operand)
      else:
        x, scale = quantize_norm_e4m3(x, *norm, operand)
    else:
      operand = x.dtype if rounded else jnp.float32
      x = normed().astype(operand)
    w = w.dequantize(operand).T
  else:
    x = normed()
  y = _matmul(x, w)
  if scale is not None:
    y = y * scale[..., None]
  if residual is not None:
    y = y + residual.astype(jnp.float32)
  return y.astype(out_dtype)


def _e4m3(x, w, norm, implementation):
  """The product of e4m3 with e4m3, by cuBLAS unless plain JAX is asked for."""
  rows = x.reshape(-1, x.shape[-1])
  args, eps = (
    ((rows,), 0.0) if norm is None else ((rows, norm.weight), norm.eps)
  )
  runs = _runs(act_quant, implementation, *args)
  quantize = act_quant.act_quant if runs else reference.act_quant
  codes, scale = quantize(*args, eps=eps)
  if runs:
    y = jax.lax.dot_general(
      codes,
      w.codes,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
  else:
    y = _matmul(codes.astype(jnp.bfloat16), w.codes.astype(jnp.bfloat16).T)
  y = y * scale[:, None] * w.scale[:, 0]
  return y.reshape(*x.shape[:-1], -1)


def in_features(w: Weight) -> int:
  """Returns the size of the axis a weight contracts."""
  return w.shape[1] if isinstance(w, QTensor | PackedInt4) else w.shape[0]


def _packed(x, w, norm, residual, out_dtype, implementation):
  """Calls the kernels on rows [T, C] of activations."""
  rows = lambda a: a.reshape(-1, a.shape[-1])
  tokens = x.size // x.shape[-1]
  options: dict[str, Any] = {
    "operand": None if residual is None else rows(residual),
    "epilogue": "linear" if residual is None else "add",
    "out_dtype": out_dtype,
    "tokens": tokens,
  }
  gain = {} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}
  if _quantises(rows(x), w, implementation, **gain, **options):
    tuning = tunings.choose(tokens, w, quantises=True)
    y = int4_matmul.int4_matmul(rows(x), w, **gain, **options, tuning=tuning)
    return y.reshape(*x.shape[:-1], -1)
  scale = None
  if w.activation == "e4m3":
    norm_weight = gain.get("norm_weight")
    runs = _runs(act_quant, implementation, rows(x), norm_weight)
    quantize = act_quant.act_quant if runs else reference.act_quant
    padded = int4_matmul.rows_of(tokens)
    codes, scale = quantize(rows(x), **gain, rows=padded)
  else:
    codes = rows(x if norm is None else norm(x)).astype(x.dtype)
  args = codes, w, scale
  if _runs(int4_matmul, implementation, *args, **options):
    tuning = tunings.choose(tokens, w)
    y = int4_matmul.int4_matmul(*args, **options, tuning=tuning)
  else:
    y = reference.int4_matmul(*args, **options)
  return y.reshape(*x.shape[:-1], -1)


def _quantises(x, w, implementation, **options):
  """Whether the matmul rounds its activations itself, which spares a kernel."""
  return (
    w.activation == "e4m3"
    and x.shape[0] <= QUANTISING_TOKENS
    and implementation != "xla"
    and _runs(int4_matmul, "auto", x, w, **options)
  )


def _runs(kernel: ModuleType, implementation, *args, **options):
  """Whether the kernel runs; raises if it cannot but is asked for by name."""
  if implementation == "xla":
    return False
  try:
    require_hopper()
    kernel.supported(*args, **options)
  except NotImplementedError:
    if implementation == "mosaic_gpu":
      raise
    return False
  return True


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., C] @ w [C, N] with exact products, summed in f32."""
  rows = x.reshape(-1, x.shape[-1])
  one = rows.shape[0] == 1
  if one:  # XLA reads w up to four times faster when there are two rows.
    rows = jnp.pad(rows, ((0, 1), (0, 0)))
  y = jnp.matmul(
    rows,
    w,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return (y[:1] if one else y).reshape(*x.shape[:-1], -1)
