"""Float weights to `QTensor`: pure functions, equal under jit and vmap."""

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.codebook import nearest_codes, search_scales
from fireq_jax.errors import ConfigError, QuantizationError
from fireq_jax.gptq import gptq
from fireq_jax.qtensor import QTensor, pack_int4, quantize_e4m3, to_e4m3
from fireq_jax.recipe import Solver, WeightFormat

_NEAREST = Solver()
_CODE_PEAK = 7.0
_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-9
_LEAST_PEAK = 1e-5
_POWERS_OF_TWO = np.exp2(np.arange(-120.0, 121.0)).astype(np.float32)
_LARGEST_PUBLISHED_TENSOR_SCALE = 2.0**14


def quantize_weight(
  kernel: jax.Array,
  weight_format: WeightFormat,
  *,
  solver: Solver = _NEAREST,
  moment: jax.Array | None = None,
) -> QTensor:
  """Quantises a float kernel [C, N] (in, out) to a `QTensor` [N, C].

  The default solver is the published arithmetic: per group, the scale is
  max|w| / 7 in its stored dtype, and codes are weights over that scale,
  rounded to nearest even; bf16 kernels round every step to bf16, others
  compute in f32. To e4m3 a row of weights is rounded as a row of activations
  is (`quantize_e4m3`), by every solver.

  Args:
    kernel: bf16, f16 or f32 [C, N], finite.
    weight_format: what to store.
    solver: how to choose scales and codes.
    moment: f32 [C, C], the sum or mean of x x^T over inputs x of this layer,
      for solvers that are weighted or use GPTQ.

  Raises:
    ConfigError: the group does not divide C, or the solver lacks `moment`.
    QuantizationError: `kernel` is not a float matrix.
  """
  if isinstance(kernel, QTensor):
    raise QuantizationError("the weight is quantised already")
  if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
    raise QuantizationError(
      "not a float matrix", got=f"{kernel.dtype}{list(kernel.shape)}"
    )
  if weight_format.codes == "e4m3":
    codes, scale = quantize_e4m3(kernel.T)
    return QTensor(
      codes=codes,
      scale=scale[:, None],
      tensor_scale=jnp.float32(1.0),
      activation=weight_format.activation,
    )
  channels, group = kernel.shape[0], weight_format.group
  if channels % group:
    raise ConfigError(f"group {group} does not divide {channels} inputs")
  if moment is None and (solver.weighted or solver.gptq):
    raise ConfigError("this solver needs calibration data")
  weight = kernel.T.astype(jnp.float32)
  peak = jnp.abs(weight).reshape(kernel.shape[1], -1, group).max(axis=-1)
  tensor_scale = _tensor_scale(peak, weight_format, solver)
  weight, peak = weight * tensor_scale, peak * tensor_scale
  if solver.scale == "search":
    scale, codes = _solve(weight, weight_format, solver, moment)
  else:
    scale, codes = _published(weight, peak, weight_format, kernel.dtype)
  return QTensor(
    codes=pack_int4(codes.astype(jnp.int8)),
    scale=jnp.where(peak == 0, jnp.ones_like(scale), scale),
    tensor_scale=tensor_scale,
    activation=weight_format.activation,
  )


def _published(
  weight: jax.Array,
  peak: jax.Array,
  weight_format: WeightFormat,
  dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Returns scales [N, G] and f32 codes [N, C] by the paper's arithmetic."""

  def rounded(x: jax.Array) -> jax.Array:
    # A cast to bf16 and back would do, but compilers may drop it.
    return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x

  scale = rounded(
    jnp.maximum(peak, rounded(jnp.float32(_LEAST_PEAK))) / _CODE_PEAK
  )
  if weight_format.scale == "e4m3":
    scale = to_e4m3(jnp.maximum(scale, _E4M3_TINY))
  else:
    scale = jax.lax.reduce_precision(scale, 8, 7).astype(jnp.bfloat16)
  wide = jnp.repeat(scale.astype(jnp.float32), weight_format.group, axis=-1)
  codes = jnp.round(rounded(weight / wide))
  return scale, jnp.clip(codes, weight_format.lowest_code, _CODE_PEAK)


def _solve(
  weight: jax.Array,
  weight_format: WeightFormat,
  solver: Solver,
  moment: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns scales [N, G] and int8 codes [N, C] by search."""
  group, lowest = weight_format.group, weight_format.lowest_code
  importance = None
  if solver.weighted and moment is not None:
    blocks = moment.reshape(-1, group, moment.shape[0] // group, group)
    importance = jnp.einsum("gigj->gij", blocks)
  scale = search_scales(
    weight,
    importance,
    group=group,
    scale_dtype=(
      jnp.float8_e4m3fn if weight_format.scale == "e4m3" else jnp.bfloat16
    ),
    lowest=lowest,
  )
  if solver.gptq:
    return scale, gptq(weight, scale, moment, group=group, lowest=lowest)
  grouped = weight.reshape(*scale.shape, group)
  codes = nearest_codes(grouped, scale[..., None], lowest=lowest)
  return scale, codes.reshape(weight.shape)


def _tensor_scale(
  peak: jax.Array, weight_format: WeightFormat, solver: Solver
) -> jax.Array:
  """Returns the power of two weights are multiplied by, so scales fit e4m3.

  Published rule: the smallest one of at least 1 that leaves no scale below
  the least e4m3 number, or else the largest whose groups stay within 448.
  (The paper compares sums of underflow; those decrease with every power, so
  this is the same choice.) A scale search takes the largest: its scales are
  normal numbers then, with all their mantissa bits.
  """
  if weight_format.scale != "e4m3":
    return jnp.float32(1.0)
  largest = peak.max()
  least = jnp.where(peak > 0, jnp.maximum(peak, _LEAST_PEAK), jnp.inf).min()
  powers = jnp.asarray(_POWERS_OF_TWO)
  fits = jnp.where(powers * largest <= _E4M3_MAX, powers, 0.0).max()
  if solver.scale == "search":
    return jnp.where(largest > 0, fits, 1.0)
  enough = jnp.where(
    powers * least >= _CODE_PEAK * _E4M3_TINY, powers, jnp.inf
  ).min()
  wanted = jnp.clip(enough, 1.0, _LARGEST_PUBLISHED_TENSOR_SCALE)
  return jnp.where(largest > 0, jnp.minimum(wanted, fits), 1.0)
