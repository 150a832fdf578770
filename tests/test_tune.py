"""Training of a quantised layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import CONFIG, PARAMS

from fireq_jax import pipeline, tune
from fireq_jax import recipe as recipes
from fireq_jax.config import KVFormat
from fireq_jax.qtensor import unpack_int4
from fireq_jax.recipe import PROJECTIONS, Override, Tuning, WeightFormat

INT4 = recipes.load("best").kv
FORMATS = {
  "e4m3": (WeightFormat(), INT4),
  "full codes, fireq's cache": (
    WeightFormat(group=64, codes="full"),
    recipes.load("fireq").kv,
  ),
  "bf16": (WeightFormat(scale="bf16", activation="bf16"), KVFormat()),
}


DIRECTIONS = np.random.default_rng(9).normal(size=(12, 128))


def stream(seed, tokens=16, windows=16):
  """bf16 [W, T, D] with a few directions that matter, and small, so that
  what a layer adds counts."""
  rng = np.random.default_rng(seed)
  few = rng.normal(size=(windows, tokens, 12)) @ DIRECTIONS
  x = few + 0.1 * rng.normal(size=few.shape)
  return jnp.asarray(0.05 * x, jnp.bfloat16)


def make(weight, kv, overrides=()):
  """A layer in f32, the same quantised, and the formats."""
  layer = jax.tree.map(
    lambda x: 2 * x.astype(jnp.float32), PARAMS["model"]["layers"][0]
  )
  heads = (CONFIG.num_key_value_heads, CONFIG.head_dim)
  layer["self_attn"] |= {
    "key_scale": jnp.full(heads, 1.5, jnp.float32),
    "key_shift": jnp.full(heads, 0.25, jnp.float32),
  }
  recipe = dataclasses.replace(
    recipes.load("best"), weight=weight, kv=kv, overrides=overrides
  )
  formats = pipeline._formats(recipe, 0, CONFIG)
  quantized = pipeline._quantize(layer, formats=formats, recipe=recipe)
  return layer, quantized, formats


def outputs(layer, x, kv):
  """What the model itself gives, f64 [W, T, D]."""
  y = pipeline._run(layer, x, config=CONFIG, kv=kv)
  return np.asarray(y.astype(jnp.float32), np.float64)


def exact_outputs(layer, x):
  layer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
  layer["self_attn"] |= {
    name: layer["self_attn"][name].astype(jnp.float32)
    for name in ("key_scale", "key_shift")
  }
  return outputs(layer, x, None)


def run(layer, quantized, formats, kv, **tuning):
  x = stream(0)
  targets = jnp.asarray(exact_outputs(layer, x), jnp.bfloat16)
  return tune.tune_layer(
    layer,
    quantized,
    x,
    targets,
    formats=formats,
    tuning=Tuning(**tuning),
    config=CONFIG,
    kv=kv,
  )


@pytest.mark.parametrize("name", FORMATS)
def test_the_trained_function_is_the_model_s(name):
  weight, kv = FORMATS[name]
  layer, quantized, formats = make(
    weight, kv, (Override(projections=("up_proj",)),)
  )
  rounding = {name: f for name, f in formats if f is not None}
  start = tune._start(layer, quantized, rounding)
  at = tune._rounded(quantized, start, rounding)
  x = stream(1)
  forward = jax.jit(functools.partial(tune._forward, config=CONFIG, kv=kv))
  got = forward(tune._layer(quantized, at), x)
  want = outputs(quantized, x, kv)
  miss = np.abs(np.asarray(got.astype(jnp.float32)) - want)
  # Equal but for sums in another order, which may flip a rounding.
  assert np.median(miss) < 2**-8 * want.std()
  rounded = np.abs(exact_outputs(layer, x) - want).mean()
  assert miss.mean() < 0.15 * rounded


def test_before_the_first_step_nothing_has_changed():
  layer, quantized, formats = make(*FORMATS["full codes, fireq's cache"])
  formats = dict(formats)
  start = tune._start(layer, quantized, formats)
  same = tune._stored(quantized, start, formats)
  jax.tree.map(np.testing.assert_array_equal, same, quantized)


def test_settled_weights_are_those_of_their_codes():
  layer, quantized, formats = make(*FORMATS["e4m3"])
  formats = dict(formats)
  moved = tune._start(layer, quantized, formats)
  at = tune._rounded(quantized, moved, formats)

  def off(share):
    """How far weights are from their codes' values, in scales."""
    settled = tune._settled(quantized, moved, at, share)
    again = tune._rounded(quantized, moved | {"weights": settled}, formats)
    jax.tree.map(np.testing.assert_array_equal, again, at)
    weight = quantized["mlp"]["up_proj"]["kernel"]
    value = at["weights"]["up_proj"].astype(jnp.float32)
    return settled["up_proj"] - value / tune._scales(weight).astype(jnp.float32)

  start = off(0.0)
  assert np.abs(start).max() > 0.2
  np.testing.assert_allclose(off(0.25), 0.75 * start, atol=1e-6)
  np.testing.assert_allclose(off(1.0), np.zeros_like(start), atol=1e-6)


@pytest.mark.parametrize("name", ["e4m3", "full codes, fireq's cache"])
def test_the_error_falls_and_formats_stay(name):
  weight, kv = FORMATS[name]
  layer, quantized, formats = make(weight, kv)
  tuned, errors = run(
    layer,
    quantized,
    formats,
    kv,
    steps=100,
    batch=8,
    weight_rate=0.02,
    settling=0.01,
  )
  assert errors.shape == (100,) and (errors > 0).all()
  x = stream(0)
  want = exact_outputs(layer, x)
  size = np.square(want).mean(axis=-1)
  miss = lambda found: np.mean(
    np.square(outputs(found, x, kv) - want).mean(axis=-1) / size
  )
  assert miss(tuned) < 0.8 * miss(quantized)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(tuned) == shapes(quantized)
  for projection, block in PROJECTIONS.items():
    old, new = (x[block][projection]["kernel"] for x in (quantized, tuned))
    np.testing.assert_array_equal(old.scale, new.scale)
    codes = np.asarray(unpack_int4(new.codes))
    assert codes.min() >= weight.lowest_code
    assert 0 < (codes != unpack_int4(old.codes)).mean() < 0.5


@pytest.mark.parametrize(
  "spec", ["btc,nc->btn", "btc,cn->btn", "bkrh,bksh->bkrs", "bkrs,bksh->bkrh"]
)
def test_products_have_the_gradients_of_einsum(spec):
  rng = np.random.default_rng(0)
  sizes = dict(zip("btcnkrsh", (2, 3, 4, 5, 2, 6, 7, 4)))
  first, second, out = (
    jnp.asarray(rng.normal(size=[sizes[i] for i in part]), jnp.float32)
    for part in spec.replace("->", ",").split(",")
  )
  total = lambda einsum: lambda a, b: (einsum(spec, a, b) * out).sum()
  got, want = (
    jax.grad(total(einsum), argnums=(0, 1))(first, second)
    for einsum in (tune._einsum, jnp.einsum)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


@pytest.mark.parametrize(
  "codes, reach", [("symmetric", (7, 7)), ("full", (7.47, 8.46))]
)
def test_the_cache_s_scale_passes_gradients(codes, reach):
  """codes x scale, scale = max|x| / 7 or so: the channel that reaches farthest
  carries the rounding errors of all others."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 3, 1, 8)).astype(np.float32)
  weights = rng.normal(size=x.shape).astype(np.float32)
  kv = KVFormat(cache="int4", scale="f32", codes=codes)

  def total(x):
    held = tune.kv_cache.encode(x, x, kv)
    codes, scale = tune._cached(x, held.k, held.k_scale, kv)
    return (codes * scale[..., None] * weights).sum()

  got = np.asarray(jax.grad(total)(jnp.asarray(x)))
  step = np.where(x > 0, 1 / reach[0], -1 / reach[1])
  scale = (x * step).max(axis=-1, keepdims=True)
  lowest = -8 if codes == "full" else -7
  residue = np.round(x / scale).clip(lowest, 7) - x / scale
  through = (weights * residue).sum(axis=-1, keepdims=True) * step
  want = weights + np.where(x * step == scale, through, 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
