"""Device time and launched kernels of one decoder layer.

Taken as half the difference between models of four and of two layers, so that
what is not a layer, the head above all, drops out. Steps run in a loop that
carries the cache, as in generate(). Codes are random, made on the device.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import common, generate
from fireq_jax import kv_cache
from fireq_jax import recipe as recipes
from fireq_jax.models.llama import forward

FEW, MANY = 2, 4  # layers of the two models
STEPS = 16
NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  common.define_model_flags(values, recipe="fireq")
  flags.DEFINE_list(
    "sizes",
    ["1x1x1024", "4x1x1024", "16x1x1024", "128x1x1024", "16x1024x0"],
    "Batch x new tokens x tokens in the cache before.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "timeout", 200, "Seconds a row may take.", flag_values=values
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  for size in common.sizes(values.sizes, "batch x tokens x held"):
    yield common.isolated(
      measure,
      values.model,
      values.recipe,
      *size,
      timeout_s=values.timeout,
    )


def measure(
  model: str, recipe: str, batch: int, tokens: int, context: int
) -> dict:
  """One row."""
  few, many = (
    _model(model, recipe, layers, batch, tokens, context)
    for layers in (FEW, MANY)
  )
  per_layer = lambda name: (many[name] - few[name]) / (MANY - FEW)
  us, floor_us = per_layer("us"), per_layer("floor_us")
  return {
    "model": model,
    "batch": batch,
    "tokens": tokens,
    "context": context,
    "us": us,
    "launches": per_layer("launches"),
    "byte_floor_us": floor_us,
    "of_floor": floor_us / us,
  }


def _model(model, recipe, layers, batch, tokens, context):
  """Microseconds, launches and bytes of a step of a model of some layers."""
  config = dataclasses.replace(common.MODELS[model], num_hidden_layers=layers)
  kv = recipes.load(recipe).kv
  params = generate.random_params(config, recipes.load(recipe))
  steps = STEPS if tokens == 1 else 1
  capacity = -(-(context + steps * tokens) // 16) * 16
  cache = dataclasses.replace(
    kv_cache.init_cache(config, batch, capacity, kv),
    lengths=jnp.full(batch, context, jnp.int32),
  )
  ids = jax.random.randint(
    jax.random.key(1), (batch, tokens), 0, config.vocab_size, jnp.int32
  )

  def step(params, cache):
    logits, cache = forward(params, ids, cache, config=config, last_only=True)
    return cache, logits

  @jax.jit
  def loop(params, cache):
    logits = jnp.zeros((batch, config.vocab_size), jnp.float32)
    return jax.lax.fori_loop(
      0, steps, lambda _, carry: step(params, carry[0]), (cache, logits)
    )

  read = sum(x.nbytes for x in jax.tree.leaves(params["model"]["layers"]))
  read += batch * context * kv_cache.bytes_per_token(config, kv)
  calls = common.kernel_times(loop, [(params, cache)])
  us = statistics.median(sum(us for _, us in call) for call in calls)
  return {
    "us": us / steps,
    "launches": len(calls[0]) / steps,
    "floor_us": read / generate.COPY_BYTES_PER_SECOND * 1e6,
  }


def plot(rows: Sequence[dict], axes) -> None:
  """Microseconds of each row, and those its bytes need."""
  labels = [
    f"{r['batch']} x {r['tokens']} new, {r['context']} held" for r in rows
  ]
  for name, offset in (("us", 0.2), ("byte_floor_us", -0.2)):
    places = [i + offset for i in range(len(rows))]
    bars = axes.barh(places, [r[name] for r in rows], 0.4, label=name)
    axes.bar_label(bars, fmt="%.1f", padding=3)
  axes.set_yticks(range(len(rows)), labels)
  axes.set(xscale="log", xlabel="microseconds a layer")
  axes.margins(x=0.15)
  axes.legend()
