"""The one type of a quantised weight."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from fireq_jax.errors import ConfigError

Activation = Literal["e4m3", "bf16"]


@flax.struct.dataclass
class QTensor:
  """A weight [N, C] (out, in) in logical order: INT4 in groups along C, or
  e4m3 with a scale for each output.

  Law: value = e4m3(scale * code) / tensor_scale   if `scale` is e4m3,
       value = scale * code / tensor_scale         if `scale` is bf16 or f32,
  where e4m3() rounds to nearest even and saturates at 448, products are exact
  before it, and the group size is C / scale.shape[-1].

  Attributes:
    codes: uint8 [N, C / 2], two's complement nibbles, even input index low;
      or e4m3 [N, C], whose `scale` is f32 [N, 1] and `tensor_scale` 1.
    scale: e4m3, bf16 or f32 [N, C / group], never 0: an all-zero group has
      scale 1 and codes 0.
    tensor_scale: f32 scalar, a power of two.
    activation: the dtype activations are rounded to, per token, before they
      meet this weight (static).
  """

  codes: jax.Array
  scale: jax.Array
  tensor_scale: jax.Array
  activation: Activation = flax.struct.field(pytree_node=False, default="e4m3")

  @property
  def shape(self) -> tuple[int, int]:
    n, width = self.codes.shape[-2:]
    return n, width if self.is_e4m3 else 2 * width

  @property
  def is_e4m3(self) -> bool:
    return self.codes.dtype == jnp.float8_e4m3fn

  @property
  def group(self) -> int:
    return self.shape[1] // self.scale.shape[-1]

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Returns the value [N, C]."""
    codes = self.codes if self.is_e4m3 else unpack_int4(self.codes)
    codes = codes.reshape(*self.scale.shape, self.group)
    products = code_values(codes, self.scale[..., None])
    value = products.reshape(*products.shape[:-2], -1) / self.tensor_scale
    return value.astype(dtype)


def code_values(codes: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns what codes stand for under a broadcastable `scale`, in f32.

  The products of an e4m3 scale are rounded to e4m3, those of others are not.
  """
  products = codes.astype(jnp.float32) * scale.astype(jnp.float32)
  if scale.dtype == jnp.float8_e4m3fn:
    products = round_e4m3(products)
  return products


def pack_int4(codes: jax.Array) -> jax.Array:
  """int8 codes in [-8, 7] [..., C] -> uint8 [..., C / 2], even index low."""
  if codes.shape[-1] % 2:
    raise ConfigError(
      "an odd number of codes cannot be packed in bytes", got=codes.shape[-1]
    )
  nibbles = codes.astype(jnp.uint8) & jnp.uint8(15)
  return nibbles[..., 0::2] | (nibbles[..., 1::2] << jnp.uint8(4))


def unpack_int4(packed: jax.Array) -> jax.Array:
  """uint8 [..., C / 2] -> int8 codes in [-8, 7] [..., C]."""
  signed = packed.astype(jnp.int8)
  low = (signed << jnp.int8(4)) >> jnp.int8(4)
  pairs = jnp.stack([low, signed >> jnp.int8(4)], axis=-1)
  return pairs.reshape(*packed.shape[:-1], -1)


def round_e4m3(x: jax.Array) -> jax.Array:
  """Rounds to the values of float8_e4m3fn, saturating at 448, in x's dtype.

  Arithmetic, because XLA may drop a cast to a narrow type and back together
  with its rounding, and because a plain cast gives NaN above 464.
  """
  x = jnp.clip(x, -448.0, 448.0)
  subnormal = jnp.round(x * 512) / 512
  normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
  return jnp.where(jnp.abs(x) < 2.0**-6, subnormal, normal)


def round_bf16(x: jax.Array) -> jax.Array:
  """Rounds to the values of bf16, in x's dtype, as `round_e4m3` does."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def to_e4m3(x: jax.Array) -> jax.Array:
  """Returns `round_e4m3(x)` as float8_e4m3fn."""
  return round_e4m3(x).astype(jnp.float8_e4m3fn)


def quantize_e4m3(
  x: jax.Array, dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn
) -> tuple[jax.Array, jax.Array]:
  """Rounds each row of x [..., C] to e4m3 codes with a scale of its own.

  Law: x ~ codes * scale, with scale = amax(|x|) * f32(1 / 448) and codes =
  e4m3(x / scale), both in f32. A row whose scale would be zero (or below the
  smallest normal f32) has scale 1. (A product, because XLA makes one of a
  division by a constant, but only when it compiles them together.)

  Args:
    x: bf16 or f32 [..., C].
    dtype: that holds the codes; bf16 and f32 do so exactly.

  Returns:
    codes [..., C] and scale f32 [...].
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) * (1 / 448)
  scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
  return round_e4m3(x / scale[..., None]).astype(dtype), scale


def quantize_norm_e4m3(
  x: jax.Array,
  weight: jax.Array,
  eps: float,
  dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
) -> tuple[jax.Array, jax.Array]:
  """Rounds each row of RMSNorm(x) to e4m3 codes with a scale of its own.

  Law: codes and scale are those of `quantize_e4m3(x * weight)`, the scale then
  times 1 / rms(x), by which all channels of a row are multiplied alike.

  Args:
    x: bf16 or f32 [..., C].
    weight: gain [C].
    eps: added to the mean square.
    dtype: that holds the codes.

  Returns:
    codes [..., C] and scale f32 [...].
  """
  x = x.astype(jnp.float32)
  codes, scale = quantize_e4m3(x * weight.astype(jnp.float32), dtype)
  mean_square = jnp.mean(jnp.square(x), axis=-1)
  return codes, scale * jax.lax.rsqrt(mean_square + eps)
