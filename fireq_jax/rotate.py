"""Rotations absorbed into weights: they spread outliers over all channels.

The residual stream x becomes x R for an orthogonal R. RMSNorm without a gain
commutes with R, so each norm's gain first moves into the weights that follow.
The rotated model computes the same function in the same form; only a model
with tied embeddings gets an `lm_head` of its own, because the last gain can
be folded there but not into the embedding (Ashkboos et al. 2024, arXiv
2404.00456).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


def orthogonal(size: int) -> np.ndarray:
  """Returns an orthogonal f32 [size, size] whose entries are all small.

  For a power of two it is the Sylvester Hadamard matrix over sqrt(size). For
  2^k m with m odd, it is the Kronecker product with the Hartley matrix
  (cos + sin)(2 pi i j / m) / sqrt(m): no entry exceeds sqrt(2 / size).
  """
  odd = size // (size & -size)
  index = np.arange(odd)
  angle = 2 * np.pi * (np.outer(index, index) % odd) / odd
  matrix = (np.cos(angle) + np.sin(angle)) / np.sqrt(odd)
  step = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0)
  while len(matrix) < size:
    matrix = np.kron(step, matrix)
  return matrix.astype(np.float32)


def rotate_embedding(embedding: Params, rotation: jax.Array) -> Params:
  """Rotates `{"embed_tokens": {"embedding": [V, D]}}`."""
  table = embedding["embed_tokens"]["embedding"]
  return {"embed_tokens": {"embedding": _outputs(table, rotation)}}


def rotate_layer(layer: Params, rotation: jax.Array) -> Params:
  """Rotates what a decoder layer reads from and writes to the stream."""
  attn, mlp = layer["self_attn"], layer["mlp"]
  before = layer["input_layernorm"]["weight"]
  after = layer["post_attention_layernorm"]["weight"]
  reads = lambda p, gain: {"kernel": _inputs(p["kernel"], gain, rotation)}
  writes = lambda p: {"kernel": _outputs(p["kernel"], rotation)}
  return {
    "input_layernorm": {"weight": jnp.ones_like(before)},
    "self_attn": {
      "q_proj": reads(attn["q_proj"], before),
      "k_proj": reads(attn["k_proj"], before),
      "v_proj": reads(attn["v_proj"], before),
      "o_proj": writes(attn["o_proj"]),
    },
    "post_attention_layernorm": {"weight": jnp.ones_like(after)},
    "mlp": {
      "gate_proj": reads(mlp["gate_proj"], after),
      "up_proj": reads(mlp["up_proj"], after),
      "down_proj": writes(mlp["down_proj"]),
    },
  }


def rotate_head(head: Params, tied: jax.Array, rotation: jax.Array) -> Params:
  """Rotates `{"norm": ..., ["lm_head": ...]}`.

  Args:
    head: the last norm, and the head unless tied.
    tied: the unrotated embedding [V, D], used where there is no head.
    rotation: f32 [D, D].

  Returns:
    the same with an `lm_head` in any case.
  """
  gain = head["norm"]["weight"]
  kernel = head["lm_head"]["kernel"] if "lm_head" in head else tied.T
  return {
    "norm": {"weight": jnp.ones_like(gain)},
    "lm_head": {"kernel": _inputs(kernel, gain, rotation)},
  }


def _inputs(kernel: jax.Array, gain: jax.Array, rotation: jax.Array):
  """R^T diag(gain) W, in f32, rounded once."""
  scaled = kernel.astype(jnp.float32) * gain.astype(jnp.float32)[:, None]
  rotated = jnp.matmul(rotation.T, scaled, precision="highest")
  return rotated.astype(kernel.dtype)


def _outputs(kernel: jax.Array, rotation: jax.Array):
  """W R, in f32, rounded once."""
  rotated = jnp.matmul(
    kernel.astype(jnp.float32), rotation, precision="highest"
  )
  return rotated.astype(kernel.dtype)


def value_basis(
  moment: jax.Array, readers: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The basis in which rounding the values of a kv head costs least.

  Values v in the basis A are v A, read by A^-1 W. Rounded in steps of their
  largest channel, they cost tr(A^T S A) tr(A^-1 M A^-T) if all channels are
  equally large, where S = mean v v^T and M = W W^T. The minimum has A A^T =
  the geometric mean of S^-1 and M, and a rotation equalises the channels.

  Args:
    moment: f32 [..., H, H], S up to a factor.
    readers: f32 [..., H, H], M up to a factor.

  Returns:
    A and its inverse, f32 [..., H, H].
  """
  size = moment.shape[-1]

  def damped(x):
    mean = jnp.trace(x, axis1=-2, axis2=-1)[..., None, None] / size
    return x + jnp.eye(size) * jnp.where(mean > 0, 1e-4 * mean, 1.0)

  def roots(x):
    """Symmetric x -> its square root and the inverse of that."""
    values, vectors = jnp.linalg.eigh(x)
    top = values.max(axis=-1, keepdims=True)
    root = jnp.sqrt(jnp.maximum(values, 1e-7 * top))[..., None, :]
    back = jnp.swapaxes(vectors, -1, -2)
    return (
      _matmul(vectors * root, back),
      _matmul(vectors / root, back),
    )

  s, s_inverse = roots(damped(moment))
  middle, _ = roots(_matmul(_matmul(s, damped(readers)), s))
  basis, inverse = roots(_matmul(_matmul(s_inverse, middle), s_inverse))
  # The eigenvectors of what v A has left, then a Hadamard matrix.
  _, vectors = jnp.linalg.eigh(_matmul(_matmul(basis, damped(moment)), basis))
  turn = _matmul(vectors, jnp.asarray(orthogonal(size)))
  return _matmul(basis, turn), _matmul(jnp.swapaxes(turn, -1, -2), inverse)


def change_value_basis(layer: Params, moment: jax.Array, head_dim: int):
  """Returns the layer with the values of each kv head in `value_basis`.

  Args:
    layer: float.
    moment: f32 [D, D], the sum or mean of x x^T over attention inputs.
    head_dim: H.
  """
  attn = layer["self_attn"]
  v, o = attn["v_proj"]["kernel"], attn["o_proj"]["kernel"]
  values = v.astype(jnp.float32).reshape(v.shape[0], -1, head_dim)
  values = jnp.moveaxis(values, 1, 0)  # [K, D, H]
  readers = o.astype(jnp.float32)
  readers = readers.reshape(values.shape[0], -1, head_dim, o.shape[1])
  basis, inverse = value_basis(
    _matmul(jnp.swapaxes(values, 1, 2), _matmul(moment, values)),
    jnp.einsum("kghd,kgid->khi", readers, readers, precision="highest"),
  )
  values = jnp.moveaxis(_matmul(values, basis), 0, 1).reshape(v.shape)
  readers = _matmul(inverse[:, None], readers).reshape(o.shape)
  changed = {
    "v_proj": {"kernel": values.astype(v.dtype)},
    "o_proj": {"kernel": readers.astype(o.dtype)},
  }
  return layer | {"self_attn": attn | changed}


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision="highest")
