"""What the kernels compute, in plain jnp: same signatures, any device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fireq_jax.pallas.layouts import PackedInt4, unpack_codes
from fireq_jax.qtensor import code_values, quantize_e4m3, quantize_norm_e4m3


def act_quant(
  x: jax.Array,
  norm_weight: jax.Array | None = None,
  *,
  eps: float = 0.0,
  rows: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `act_quant.act_quant`."""
  if norm_weight is None:
    codes, scale = quantize_e4m3(x)
  else:
    codes, scale = quantize_norm_e4m3(x, norm_weight, eps)
  padding = 0 if rows is None else rows - x.shape[0]
  codes = jnp.pad(codes, ((0, padding), (0, 0)))
  return codes, jnp.pad(scale, (0, padding), constant_values=1)


def int4_matmul(
  x: jax.Array,
  w: PackedInt4,
  x_scale: jax.Array | None = None,
  *,
  norm_weight: jax.Array | None = None,
  eps: float = 0.0,
  bias: jax.Array | None = None,
  operand: jax.Array | None = None,
  epilogue: str = "linear",
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tokens: int | None = None,
) -> jax.Array:
  """See `int4_matmul.int4_matmul`."""
  if w.quantises(x_scale):
    x, x_scale = act_quant(x, norm_weight, eps=eps)
  n, c = w.shape
  codes = unpack_codes(w).reshape(n, -1, w.group)
  weights = code_values(codes, w.scale.T[..., None])
  y = jax.lax.dot_general(
    x.astype(jnp.float32),
    weights.reshape(n, c),
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
  )
  y = y[:tokens] * w.row_scale
  if x_scale is not None:
    y *= x_scale[:tokens, None]
  if bias is not None:
    y += bias.astype(jnp.float32)
  if w.gated:
    gate, up = jnp.split(y, 2, axis=1)
    y = jax.nn.silu(gate) * up
  elif epilogue == "silu":
    y = jax.nn.silu(y)
  elif operand is not None:
    operand = operand.astype(jnp.float32)
    y = y * operand if epilogue == "mul" else y + operand
  return y.astype(out_dtype)


def decode_chain(
  x: jax.Array,
  a: jax.Array | None,
  stages: Sequence[tuple[PackedInt4, jax.Array | None]],
  *,
  eps: float,
) -> tuple[jax.Array, jax.Array | None]:
  """See `decode_chain.decode_chain`."""
  for w, gain in stages:
    if gain is None:
      assert a is not None
      codes, scale = act_quant(a)
      x = int4_matmul(codes, w, scale, operand=x, epilogue="add")
    else:
      codes, scale = act_quant(x, gain, eps=eps)
      a = int4_matmul(codes, w, scale)
  return x, a
