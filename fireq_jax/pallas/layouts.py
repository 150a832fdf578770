"""Weights in the order the kernels read them."""

from collections.abc import Sequence
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from fireq_jax.config import check
from fireq_jax.qtensor import Activation, QTensor, unpack_int4

Encoding = Literal["sign_magnitude", "twos_complement", "subnormal", "biased"]

BLOCK = 128  # codes along C that are copied and multiplied together
ROWS = 64  # rows of a tensor core instruction


@flax.struct.dataclass
class PackedInt4:
  """INT4 weights [N, C] in kernel order; several projections stacked on N.

  Attributes:
    codes: uint8 [C / 128, N, 64], zero-padded along C. A byte holds an even and
      an odd position of its 32-code chunk; position 8t + i holds the code that
      thread t of a quad needs i-th (`_chunk_order`). `encoding` says how a
      nibble means a code.
    scale: [G, N] e4m3 or bf16.
    row_scale: f32 [N], 1 / tensor_scale of each row's projection.
    shape: logical (N, C) (static).
    encoding: see `dequant` (static).
    activation: dtype of the activations these codes are ordered for (static).
    gated: the halves along N are a gate and an up projection (static).
  """

  codes: jax.Array
  scale: jax.Array
  row_scale: jax.Array
  shape: tuple[int, int] = flax.struct.field(pytree_node=False)
  encoding: Encoding = flax.struct.field(pytree_node=False)
  activation: Activation = flax.struct.field(pytree_node=False)
  gated: bool = flax.struct.field(pytree_node=False)

  @property
  def group(self) -> int:
    return self.shape[1] // self.scale.shape[0]

  @property
  def activation_dtype(self) -> jax.typing.DTypeLike:
    bf16 = self.activation == "bf16"
    return jnp.bfloat16 if bf16 else jnp.float8_e4m3fn

  def quantises(self, x_scale: jax.Array | None) -> bool:
    """Whether activations that come with `x_scale` are still to be rounded."""
    return self.activation == "e4m3" and x_scale is None


def pack_int4_weights(
  weights: Sequence[QTensor], *, gated: bool = False, asymmetric: bool = True
) -> PackedInt4:
  """Packs projections of one input for one matmul.

  Args:
    weights: QTensors [N_i, C] with the same C, group, scale dtype and
      activation; stacked along N, or a gate and an up projection if `gated`.
    gated: the two projections are gate and up of `silu(gate) * up`.
    asymmetric: codes may be -8 (then the slower encoding is used); see
      `has_minus_8`.

  Raises:
    ConfigError: the projections do not fit together.
  """
  first = weights[0]
  for other in weights[1:]:
    check(
      (other.shape[1], other.group, other.scale.dtype, other.activation)
      == (first.shape[1], first.group, first.scale.dtype, first.activation),
      "projections of one matmul must agree in input size, group and format",
      expected=_format(first),
      got=_format(other),
    )
  check(
    not gated or (len(weights) == 2 and weights[0].shape == weights[1].shape),
    "a gated matmul has two projections of one shape",
    got=[w.shape for w in weights],
  )
  codes = jnp.concatenate([unpack_int4(w.codes) for w in weights])
  scale = jnp.concatenate([w.scale for w in weights])
  row_scale = jnp.concatenate(
    [jnp.full(w.shape[0], 1 / w.tensor_scale, jnp.float32) for w in weights]
  )
  if first.activation == "bf16":
    encoding = "biased"
  else:
    scaled = first.scale.dtype == jnp.float8_e4m3fn
    symmetric = "sign_magnitude" if scaled else "subnormal"
    encoding = "twos_complement" if asymmetric else symmetric
  return PackedInt4(
    codes=_pack_codes(codes, encoding),
    scale=scale.T,
    row_scale=row_scale,
    shape=(codes.shape[0], codes.shape[1]),
    encoding=encoding,
    activation=first.activation,
    gated=gated,
  )


def has_minus_8(weights: Sequence[QTensor]) -> bool:
  """Whether a code is -8: decides the encoding, so needs concrete values."""
  return any(bool(_has_minus_8(w.codes)) for w in weights)


_has_minus_8 = jax.jit(lambda codes: jnp.any(unpack_int4(codes) == -8))


def unpack_codes(w: PackedInt4) -> jax.Array:
  """int8 codes [N, C] in logical order."""
  low, high = w.codes & jnp.uint8(15), w.codes >> jnp.uint8(4)
  nibbles = jnp.stack([low, high], axis=-1).reshape(*w.codes.shape[:2], 4, 4, 8)
  if w.encoding in ("sign_magnitude", "subnormal"):
    sign = nibbles >> jnp.uint8(3)
    sign = jnp.concatenate([sign[..., 1::2], sign[..., 0::2]], axis=-1)
    size = (nibbles & jnp.uint8(7)).astype(jnp.int8)
    if w.encoding == "subnormal":
      odd = jnp.roll(size[..., 1::2], 1, axis=-1)
      size = jnp.concatenate([size[..., 0::2], odd], axis=-1)
    codes = jnp.where(sign == 1, -size, size)
  elif w.encoding == "twos_complement":
    codes = (nibbles << jnp.uint8(4)).astype(jnp.int8) >> jnp.int8(4)
  else:
    codes = nibbles.astype(jnp.int8) - jnp.int8(8)
  codes = jnp.moveaxis(codes, 0, 1).reshape(w.codes.shape[1], -1, 4, 8)
  codes = _to_logical(codes, w.activation)
  return codes.reshape(codes.shape[0], -1)[:, : w.shape[1]]


def _pack_codes(codes, encoding):
  n, c = codes.shape
  codes = jnp.pad(codes, ((0, 0), (0, -c % BLOCK)))
  activation = "bf16" if encoding == "biased" else "e4m3"
  codes = _to_threads(codes.reshape(n, -1, 32), activation)
  if encoding in ("sign_magnitude", "subnormal"):
    sign = (codes < 0).astype(jnp.uint8)
    sign = jnp.stack([sign[..., 4:], sign[..., :4]], axis=-1).reshape(
      sign.shape
    )
    size = jnp.abs(codes).astype(jnp.uint8)
    if encoding == "subnormal":
      odd = jnp.roll(size[..., 4:], -1, axis=-1)
      size = jnp.stack([size[..., :4], odd], axis=-1).reshape(size.shape)
    nibbles = size | (sign << jnp.uint8(3))
  elif encoding == "twos_complement":
    nibbles = codes.astype(jnp.uint8) & jnp.uint8(15)
  else:
    nibbles = (codes + jnp.int8(8)).astype(jnp.uint8)
  packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << jnp.uint8(4))
  return jnp.moveaxis(packed.reshape(n, -1, BLOCK // 2), 1, 0)


# A chunk of 32 codes is [4, 8]: quad thread t, then its i-th code.
# e4m3 operand: code 16 * (i // 4) + 4 * t + i % 4.
# bf16 operand: code 8 * (i % 4) + 2 * t + i // 4.


def _to_threads(codes, activation):
  """[N, chunks, 32] logical -> [N, chunks, 4, 8] (t, i)."""
  n = codes.shape[0]
  if activation == "bf16":
    codes = codes.reshape(n, -1, 4, 4, 2).transpose(0, 1, 3, 4, 2)
  else:
    codes = codes.reshape(n, -1, 2, 4, 4).transpose(0, 1, 3, 2, 4)
  return codes.reshape(n, -1, 4, 8)


def _to_logical(codes, activation):
  """The inverse of `_to_threads`."""
  n = codes.shape[0]
  if activation == "bf16":
    codes = codes.reshape(n, -1, 4, 2, 4).transpose(0, 1, 4, 2, 3)
  else:
    codes = codes.reshape(n, -1, 4, 2, 4).transpose(0, 1, 3, 2, 4)
  return codes.reshape(n, -1, 32)


def _format(w):
  return f"C {w.shape[1]}, group {w.group}, {w.scale.dtype}, {w.activation}"
