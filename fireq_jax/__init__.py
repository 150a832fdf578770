"""Low-bit Llama inference in JAX on NVIDIA Hopper GPUs.

Dimension letters, in shapes everywhere: B batch, T query length, S cached
length, D model, F feed-forward, N query heads, K kv heads, H head dim,
V vocabulary, G groups along a contracted axis, C a generic channel axis.
"""

__version__ = "0.1.0"

from fireq_jax.checkpoint import Checkpoint, save
from fireq_jax.config import GenerateConfig, KVFormat, LlamaConfig
from fireq_jax.errors import FireQError
from fireq_jax.generate import (
  GenerateOutput,
  generate,
  generate_stream,
  pad_prompts,
)
from fireq_jax.loading import load_model
from fireq_jax.models.llama import Llama, forward
from fireq_jax.pipeline import Source, quantize_model
from fireq_jax.prepare import prepare
from fireq_jax.recipe import Recipe
from fireq_jax.recipe import load as load_recipe
from fireq_jax.sharding import make_mesh
from fireq_jax.tokenizer import Tokenizer

__all__ = [
  "Checkpoint",
  "FireQError",
  "GenerateConfig",
  "GenerateOutput",
  "KVFormat",
  "Llama",
  "LlamaConfig",
  "Recipe",
  "Source",
  "Tokenizer",
  "forward",
  "generate",
  "generate_stream",
  "load_model",
  "load_recipe",
  "make_mesh",
  "pad_prompts",
  "prepare",
  "quantize_model",
  "save",
]
