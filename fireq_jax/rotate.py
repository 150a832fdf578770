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
