"""Tokens per second of generate(), by batch and context.

The model has the named shape and random INT4 codes made on the device. Every
number is taken through the public `generate()`: prefill is a call for one new
token, a decode step the difference between calls for few and many tokens. The
first call of a process is taken twice, the second time with JAX's persistent
cache of compiled programs as the first has left it.
"""

import functools
import tempfile
import time
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.common import (
  MODELS,
  define_model_flags,
  isolated,
  sizes,
  turn,
)
from fireq_jax import kv_cache
from fireq_jax import recipe as recipes
from fireq_jax.config import GenerateConfig, LlamaConfig
from fireq_jax.generate import generate
from fireq_jax.models.llama import Params, abstract_params
from fireq_jax.prepare import prepare_head, prepare_layer
from fireq_jax.qtensor import QTensor, pack_int4
from fireq_jax.recipe import Recipe

COPY_BYTES_PER_SECOND = 4.25e12  # of an H200, read plus written
FEW, MANY = 8, 72  # new tokens of the two calls whose difference is timed


def define_flags(values: flags.FlagValues) -> None:
  define_model_flags(values, recipe="best")
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
  flags.DEFINE_list(
    "first_call",
    ["1x1024"],
    "Batch x prompt of the rows for a process's first call.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "prefill_chunk",
    None,
    "Tokens of a prompt read at once; default: all.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "timeout", 300, "Seconds a row may take.", flag_values=values
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  rows = [
    (measure, *size)
    for measure, asked, meaning in (
      (_decode, values.decode, "batch x context"),
      (_prefill, values.prefill, "batch x prompt"),
      (_first_call, values.first_call, "batch x prompt"),
    )
    for size in sizes(asked, meaning)
  ]
  for measure, batch, length in rows:
    yield measure(
      values.model,
      values.recipe,
      batch,
      length,
      chunk=values.prefill_chunk,
      timeout_s=values.timeout,
    )


def _decode(*args, **options) -> dict:
  return isolated(decode_row, *args, **options)


def _prefill(*args, **options) -> dict:
  return isolated(prefill_row, *args, **options)


def _first_call(model, recipe, batch, prompt, **options) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    args = model, recipe, batch, prompt, folder
    cold, cached = (
      isolated(first_call_seconds, *args, **options) for _ in range(2)
    )
  return {
    "model": model,
    "recipe": recipe,
    "batch": batch,
    "prompt": prompt,
    "first_call_s": cold,
    "first_call_cached_s": cached,
  }


def first_call_seconds(
  model: str,
  recipe: str,
  batch: int,
  prompt: int,
  folder: str,
  chunk: int | None = None,
) -> float:
  """Seconds to the first token, with compiled programs kept in `folder`."""
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  run = _Run(model, recipe, batch, prompt, 1, chunk)
  return run.call(1)


def decode_row(
  model: str, recipe: str, batch: int, context: int, chunk: int | None = None
) -> dict:
  """One row."""
  run = _Run(model, recipe, batch, context - (FEW + MANY) // 2, MANY, chunk)
  step = run.step_seconds()
  floor = run.byte_floor_ms(context)
  return {
    "model": model,
    "recipe": recipe,
    "batch": batch,
    "context": context,
    "tokens_per_s": batch / step,
    "ms_per_token": step * 1e3,
    "byte_floor_ms": floor,
    "of_floor": floor / (step * 1e3),
    **run.bytes(),
  }


def prefill_row(
  model: str, recipe: str, batch: int, prompt: int, chunk: int | None = None
) -> dict:
  """One row."""
  run = _Run(model, recipe, batch, prompt, 1, chunk)
  seconds = run.seconds(1)
  return {
    "model": model,
    "recipe": recipe,
    "batch": batch,
    "prompt": prompt,
    "chunk": chunk or prompt,
    "prefill_tokens_per_s": batch * prompt / seconds,
    "ttft_ms": seconds * 1e3,
    **run.bytes(),
  }


class _Run:
  """A random model and prompts, and the time generate() takes on them."""

  def __init__(self, model, recipe, batch, prompt, max_new_tokens, chunk):
    self.config, self.recipe = MODELS[model], recipes.load(recipe)
    self.batch = batch
    self.params = random_params(self.config, self.recipe)
    self.capacity = -(-(prompt + max_new_tokens) // 16) * 16
    self.chunk = chunk
    rng = np.random.default_rng(0)
    self.tokens = jnp.asarray(
      rng.integers(0, self.config.vocab_size, (batch, prompt), np.int32)
    )
    self.lengths = jnp.full(batch, prompt, jnp.int32)
    jax.block_until_ready(self.params)

  def seconds(self, max_new_tokens: int, repeats: int = 3) -> float:
    """Median seconds of a call, compiled before."""
    self.call(max_new_tokens)
    with turn():
      samples = [self.call(max_new_tokens) for _ in range(repeats)]
    return float(np.median(samples))

  def step_seconds(self, repeats: int = 5) -> float:
    """Median of a step, by pairs of calls made one after the other."""
    calls = lambda: (self.call(FEW), self.call(MANY))
    calls()  # compile
    with turn():
      pairs = [calls() for _ in range(repeats)]
    return float(np.median([(b - a) / (MANY - FEW) for a, b in pairs]))

  def call(self, max_new_tokens: int) -> float:
    """Seconds of one call."""
    options = GenerateConfig(
      max_new_tokens=max_new_tokens,
      cache_capacity=self.capacity,
      prefill_chunk=self.chunk,
    )
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
    return time.perf_counter() - start

  def bytes(self) -> dict[str, int | None]:
    """Of memory: what is needed, and the most that was held at any time."""
    weights = sum(x.nbytes for x in jax.tree.leaves(self.params))
    token = kv_cache.bytes_per_token(self.config, self.recipe.kv)
    stats = jax.devices()[0].memory_stats()
    return {
      "weight_bytes": weights,
      "cache_bytes": self.batch * self.capacity * token,
      "peak_bytes": stats and stats["peak_bytes_in_use"],
    }

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
    if leaf.is_e4m3:
      values = jax.random.normal(key, leaf.shape, jnp.bfloat16)
      return QTensor(
        codes=(64 * values).astype(jnp.float8_e4m3fn),
        scale=jnp.full(leaf.scale.shape, 0.02 / 64),
        tensor_scale=jnp.float32(1.0),
        activation=leaf.activation,
      )
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


def plot(rows: Sequence[dict], axes) -> None:
  """Tokens per second of each row, and what the bytes alone would allow."""
  rows = [row for row in rows if "first_call_s" not in row][::-1]
  labels, speeds = [], []
  for i, row in enumerate(rows):
    stage, length = (
      ("decode", row["context"])
      if "context" in row
      else ("prefill", row["prompt"])
    )
    labels.append(
      f"{row['model']}, {row['recipe']}\n{stage} {row['batch']} x {length}"
    )
    speeds.append(row.get("tokens_per_s") or row["prefill_tokens_per_s"])
    if "byte_floor_ms" in row:
      floor = row["batch"] / row["byte_floor_ms"] * 1e3
      axes.plot([floor, floor], [i - 0.4, i + 0.4], color="black")
  axes.bar_label(axes.barh(labels, speeds), fmt="%.0f", padding=3)
  axes.set(xscale="log", xlabel="tokens/s (line: reading each byte once)")
  axes.margins(x=0.15)
  axes.tick_params(axis="y", labelsize=7)
