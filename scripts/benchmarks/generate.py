"""Tokens per second of generate(), by batch and context.

The model has the named shape and random INT4 codes made on the device. Every
number is taken through the public `generate()`: prefill is a call for one new
token, a decode step the difference between calls for few and many tokens.
"""

import functools
import time
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.common import isolated
from fireq_jax import kv_cache
from fireq_jax import recipe as recipes
from fireq_jax.config import GenerateConfig, LlamaConfig, RopeConfig
from fireq_jax.generate import generate
from fireq_jax.models.llama import Params, abstract_params
from fireq_jax.prepare import prepare_head, prepare_layer
from fireq_jax.qtensor import QTensor, pack_int4
from fireq_jax.recipe import Recipe

COPY_BYTES_PER_SECOND = 4.25e12  # of an H200, read plus written
FEW, MANY = 8, 72  # new tokens of the two calls whose difference is timed


def _llama(
  hidden: int,
  ffn: int,
  layers: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  *,
  vocab_size: int = 128256,
  theta: float = 500000.0,
  tied: bool = False,
) -> LlamaConfig:
  return LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=hidden,
    intermediate_size=ffn,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope=RopeConfig(theta=theta),
    tie_word_embeddings=tied,
  )


MODELS = {
  "tiny": _llama(256, 512, 2, 2, 1, 128, vocab_size=512),
  "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 64, tied=True),
  "llama-2-7b": _llama(
    4096, 11008, 32, 32, 32, 128, vocab_size=32000, theta=10000.0
  ),
  "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128),
}


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_enum(
    "model", "llama-3-8b", list(MODELS), "Which shape.", flag_values=values
  )
  flags.DEFINE_string(
    "recipe", "best", "Recipe name or file.", flag_values=values
  )
  flags.DEFINE_list(
    "decode",
    ["1x1024", "16x1024", "128x1024"],
    "Batch x context of the decode rows.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "prefill",
    ["1x1024", "16x1024", "16x4096"],
    "Batch x prompt of the prefill rows.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "timeout", 300, "Seconds a row may take.", flag_values=values
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  for measure, sizes in ((_decode, values.decode), (_prefill, values.prefill)):
    for size in sizes:
      batch, length = map(int, size.split("x"))
      yield isolated(
        measure,
        values.model,
        values.recipe,
        batch,
        length,
        timeout_s=values.timeout,
      )


def _decode(model: str, recipe: str, batch: int, context: int) -> dict:
  run = _Run(model, recipe, batch, context - (FEW + MANY) // 2, MANY)
  few, many = run.seconds(FEW), run.seconds(MANY)
  step = (many - few) / (MANY - FEW)
  return {
    "model": model,
    "batch": batch,
    "context": context,
    "tokens_per_s": batch / step,
    "ms_per_token": step * 1e3,
    "byte_floor_ms": run.byte_floor_ms(context),
    "peak_bytes": _peak_bytes(),
  }


def _prefill(model: str, recipe: str, batch: int, prompt: int) -> dict:
  run = _Run(model, recipe, batch, prompt, 1)
  seconds = run.seconds(1)
  return {
    "model": model,
    "batch": batch,
    "prompt": prompt,
    "prefill_tokens_per_s": batch * prompt / seconds,
    "ttft_ms": seconds * 1e3,
    "cold_s": run.cold_seconds,
    "peak_bytes": _peak_bytes(),
  }


def _peak_bytes() -> int | None:
  stats = jax.devices()[0].memory_stats()
  return stats and stats["peak_bytes_in_use"]


class _Run:
  """A random model and prompts, and the time generate() takes on them."""

  def __init__(self, model, recipe, batch, prompt, max_new_tokens):
    self.config, self.recipe = MODELS[model], recipes.load(recipe)
    self.batch = batch
    self.params = random_params(self.config, self.recipe)
    self.capacity = -(-(prompt + max_new_tokens) // 16) * 16
    rng = np.random.default_rng(0)
    self.tokens = jnp.asarray(
      rng.integers(0, self.config.vocab_size, (batch, prompt), np.int32)
    )
    self.lengths = jnp.full(batch, prompt, jnp.int32)
    self.cold_seconds = None

  def seconds(self, max_new_tokens: int, repeats: int = 3) -> float:
    """Median seconds of a call, compiled before."""
    options = GenerateConfig(
      max_new_tokens=max_new_tokens, cache_capacity=self.capacity
    )
    samples = []
    for _ in range(repeats + 1):
      start = time.perf_counter()
      out = generate(
        self.params,
        self.tokens,
        self.lengths,
        config=self.config,
        kv=self.recipe.kv,
        options=options,
      )
      jax.block_until_ready(out)
      samples.append(time.perf_counter() - start)
    self.cold_seconds = samples[0]
    return float(np.median(samples[1:]))

  def byte_floor_ms(self, context: int) -> float:
    """Time to read what a decode step must, at the copy bandwidth."""
    read = sum(x.nbytes for x in jax.tree.leaves(self.params))
    embedding = self.params["model"]["embed_tokens"]["embedding"]
    if "lm_head" in self.params:  # else the embedding is the head
      read -= embedding.nbytes
    token = kv_cache.bytes_per_token(self.config, self.recipe.kv)
    read += self.batch * context * token
    return read / COPY_BYTES_PER_SECOND * 1e3


def random_params(config: LlamaConfig, recipe: Recipe) -> Params:
  """Execution parameters with random codes, made on the device by layers."""
  tree = abstract_params(config, recipe)
  keys = iter(jax.random.split(jax.random.key(0), config.num_hidden_layers + 1))
  layers = tree["model"].pop("layers")
  params = prepare_head(_filled(tree, next(keys)))
  params["model"]["layers"] = [
    prepare_layer(_filled(layer, key)) for layer, key in zip(layers, keys)
  ]
  return params


def _filled(tree: Params, key: jax.Array) -> Params:
  """Random values for `tree`, of a size that keeps activations near 1."""
  leaves, structure = jax.tree.flatten(tree)
  return _fill(tuple(leaves), structure, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(leaves, structure, key):
  tree = jax.tree.unflatten(structure, leaves)
  leaves, structure = jax.tree.flatten(
    tree, is_leaf=lambda x: isinstance(x, QTensor)
  )
  keys: Sequence[jax.Array] = list(jax.random.split(key, len(leaves)))
  return jax.tree.unflatten(structure, map(_random_leaf, leaves, keys))


def _random_leaf(leaf, key):
  if isinstance(leaf, QTensor):
    outputs, channels = leaf.shape
    codes = jax.random.randint(key, (outputs, channels), -7, 8, jnp.int8)
    scale = jax.random.uniform(key, leaf.scale.shape, minval=0.5, maxval=2.0)
    return QTensor(
      codes=pack_int4(codes),
      scale=scale.astype(leaf.scale.dtype),
      tensor_scale=jnp.float32(2 ** round(np.log2(5.4 * channels**0.5))),
      activation=leaf.activation,
    )
  if len(leaf.shape) == 1:
    return jnp.ones(leaf.shape, leaf.dtype)
  if leaf.dtype == jnp.float32:  # key_scale, key_shift
    return jax.random.uniform(key, leaf.shape, minval=0.5, maxval=2.0)
  values = jax.random.normal(key, leaf.shape, jnp.float32)
  return (0.02 * values).astype(leaf.dtype)
