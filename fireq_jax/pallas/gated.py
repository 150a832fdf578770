"""Rows of gated weights: a gate and its up row in the registers of one thread.

Of each 16 rows of a tensor core operand, and of its sums, a thread has rows r
and r + 8. Of 32 rows of a gate and the same of an up projection, those are

  operand  0..7  8..15  16..23  24..31  32..39  40..47  48..55  56..63
  gate     0..7          8..15          16..23          24..31
  up             0..7            8..15          16..23          24..31

so that silu(gate) * up needs nothing of another thread. Which rows a thread
loads does not depend on where they go; so both are loaded as they lie in
memory, [2, 32], and their registers are then those of 64 rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas.inline import array, elements, inline, load, vector
from fireq_jax.pallas.layouts import ROWS

_HALF = ROWS // 2
_WGMMA_8BIT = plgpu.Layout.WGMMA_8BIT
_WGMMA = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
# The same of 32 rows, of each of two projections.
_HALF_8BIT = plgpu.Layout.TILED(
  plgpu.Tiling(((_HALF, 16), (8, 16), (4,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)
_HALF_BY_ROW = plgpu.Layout.TILED(
  plgpu.Tiling(((_HALF,), (8,), (1,))),
  warp_dims=(-3,),
  lane_dims=(-2, plgpu.Replicated(4)),
  vector_dim=-1,
)
# Of [tokens, 32], what a thread has of [32, tokens] in WGMMA.
_TOKENS_FIRST = plgpu.Layout.TILED(
  plgpu.Tiling(((8, _HALF), (8, 8), (2, 1))),
  warp_dims=(-5,),
  lane_dims=(-3, -4),
  vector_dim=-1,
)


def load_codes(ref: Any) -> jax.Array:
  """Codes [2, 32, C] in shared memory as the operand's [64, C]."""
  x = load(ref, _HALF_8BIT, optimized=True)
  return _together(x, _HALF_8BIT, _WGMMA_8BIT)


def load_by_row(ref: Any) -> jax.Array:
  """[2, 32] in shared memory as [64], one value a row; or [1, 64] as it is."""
  if ref.shape[0] == 1:
    return load(ref.at[0], _BY_ROW)
  return _together(load(ref, _HALF_BY_ROW), _HALF_BY_ROW, _BY_ROW)


def apart(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[64, tokens] f32 -> gate and up, [tokens, 32] each."""
  tokens = sums.shape[1]
  shape = tokens, _HALF
  struct = plgpu.ShapeDtypeStruct(shape, sums.dtype, _TOKENS_FIRST)

  def emit(sums):
    layout = _TOKENS_FIRST.to_mgpu()
    registers = sums.registers.reshape(tokens // 8, 2)
    return [
      array(
        np.array(
          [vector([x]) for register in half for x in elements(register)], object
        ).reshape(layout.registers_shape(shape)),
        layout,
      )
      for half in registers.T
    ]

  def model(sums):
    pieces = sums.reshape(-1, 2, 8, tokens)
    return tuple(pieces[:, i].reshape(_HALF, tokens).T for i in range(2))

  return inline(emit, model, arg_types=(_WGMMA,), return_type=(struct, struct))(
    sums
  )


def _together(x, of, to):
  """[2, 32, ...] in layout `of` -> [64, ...] in layout `to`."""
  shape = ROWS, *x.shape[2:]

  def emit(x):
    layout = to.to_mgpu()
    registers = np.moveaxis(x.registers, 0, -1)
    registers = registers.reshape(layout.registers_shape(shape))
    return array(registers, layout, x.is_signed)

  def model(x):
    pieces = x.reshape(2, -1, 8, *x.shape[2:])
    return jnp.swapaxes(pieces, 0, 1).reshape(shape)

  return inline(
    emit,
    model,
    arg_types=(of,),
    return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, to),
  )(x)
