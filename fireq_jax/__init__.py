"""Low-bit Llama inference in JAX on NVIDIA Hopper GPUs.

Dimension letters, in shapes everywhere: B batch, T query length, S cached
length, D model, F feed-forward, N query heads, K kv heads, H head dim,
V vocabulary, G groups along a contracted axis, C a generic channel axis.
"""

__version__ = "0.1.0"
