"""GPTQ: codes that correct each other's error on real inputs.

Frantar et al. 2023 (arXiv 2210.17323): columns are rounded one at a time and
the error of each is spread over those not yet rounded, along the inverse of
the input covariance. Here with the true codebook of a group (rounded e4m3
products included) and scales fixed beforehand, which lets columns go in
order of falling covariance without regrouping: nothing changes at run time.
"""

import functools

import jax
import jax.numpy as jnp

from fireq_jax.codebook import nearest_codes
from fireq_jax.qtensor import code_values

BLOCK = 128


@functools.partial(jax.jit, static_argnames=("group", "lowest", "damping"))
def gptq(
  weight: jax.Array,
  scale: jax.Array,
  covariance: jax.Array,
  *,
  group: int,
  lowest: int = -7,
  damping: float = 0.01,
) -> jax.Array:
  """Returns int8 codes [N, C] that minimise the output error greedily.

  Args:
    weight: f32 [N, C], the tensor scale already applied.
    scale: e4m3, bf16 or f32 [N, C / group].
    covariance: f32 [C, C], sum or mean of x^T x over inputs x.
    group: input channels that share a scale.
    lowest: -7 or -8, the lowest code in use.
    damping: added to the diagonal, as a fraction of its mean. Inputs that
      never occur get a unit diagonal.
  """
  rows, columns = weight.shape
  dead = jnp.diagonal(covariance) <= 0
  order = jnp.argsort(-jnp.diagonal(covariance), stable=True)
  diagonal = jnp.mean(jnp.diagonal(covariance))
  damped = (
    covariance
    + jnp.eye(columns) * damping * diagonal
    + jnp.diag(jnp.where(dead, jnp.where(diagonal > 0, diagonal, 1.0), 0.0))
  )
  factor = _inverse_factor(damped[order][:, order])
  scales = jnp.repeat(scale.astype(jnp.float32), group, axis=1)[:, order]
  scales = scales.astype(scale.dtype)
  padding = -columns % BLOCK
  factor = jnp.pad(factor, ((0, padding), (0, padding)))
  factor = factor + jnp.diag(
    jnp.where(jnp.arange(columns + padding) < columns, 0.0, 1.0)
  )
  remaining = jnp.pad(weight[:, order], ((0, 0), (0, padding)))
  scales = jnp.pad(scales, ((0, 0), (0, padding)), constant_values=1)
  later = jnp.arange(columns + padding)

  def block(b, state):
    remaining, codes = state
    start = b * BLOCK
    local = jax.lax.dynamic_slice_in_dim(remaining, start, BLOCK, axis=1)
    steps = jax.lax.dynamic_slice_in_dim(scales, start, BLOCK, axis=1)
    square = jax.lax.dynamic_slice(factor, (start, start), (BLOCK, BLOCK))

    def column(j, state):
      local, errors, chosen = state
      value, step = local[:, j], steps[:, j]
      code = nearest_codes(value, step, lowest=lowest)
      error = (value - code_values(code, step)) / square[j, j]
      spread = jnp.where(jnp.arange(BLOCK) > j, square[j], 0.0)
      local = local - error[:, None] * spread
      return local, errors.at[:, j].set(error), chosen.at[:, j].set(code)

    _, errors, chosen = jax.lax.fori_loop(
      0,
      BLOCK,
      column,
      (
        local,
        jnp.zeros((rows, BLOCK), jnp.float32),
        jnp.zeros((rows, BLOCK), jnp.int8),
      ),
    )
    beyond = jax.lax.dynamic_slice_in_dim(factor, start, BLOCK, axis=0)
    beyond = jnp.where(later >= start + BLOCK, beyond, 0.0)
    remaining = remaining - jnp.matmul(errors, beyond, precision="highest")
    codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, axis=1)
    return remaining, codes

  _, codes = jax.lax.fori_loop(
    0,
    (columns + padding) // BLOCK,
    block,
    (remaining, jnp.zeros((rows, columns + padding), jnp.int8)),
  )
  return codes[:, jnp.argsort(order)]


def _inverse_factor(matrix: jax.Array) -> jax.Array:
  """Returns the upper U with matrix^-1 = U^T U, from one Cholesky.

  Reversing rows and columns turns the lower factor of `matrix` into an upper
  one, whose inverse is the wanted factor.
  """
  lower = jnp.linalg.cholesky(matrix[::-1, ::-1])
  identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
  inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
  return inverse[::-1, ::-1]
