"""Training of a quantised layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import CONFIG, PARAMS

from fireq_jax import pipeline, solve, tune
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
  """A layer in f32, what `solve` makes of it, and the formats."""
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
  quantized = solve.quantize_in_order(
    layer,
    dict(formats),
    [x[None] for x in stream(0)],
    solver=recipe.solver,
    config=CONFIG,
    kv=kv,
  )
  return layer, quantized, formats


def outputs(layer, x, kv):
  """What the model itself gives, f64 [W, T, D]."""
  y, _ = solve.run_layer(layer, x, config=CONFIG, kv=kv)
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
  x = stream(1, windows=8)
  got = tune._forward(
    tune._layer(quantized, at),
    x,
    config=CONFIG,
    kv=kv,
  )
  want = outputs(quantized, x, kv)
  miss = np.abs(np.asarray(got.astype(jnp.float32)) - want)
  # Equal but for sums in another order, which may flip a rounding.
  assert np.median(miss) < 2**-8 * want.std()
  rounded = np.abs(exact_outputs(layer, x) - want).mean()
  assert miss.mean() < 0.15 * rounded


def test_at_rate_zero_nothing_changes():
  layer, quantized, formats = make(*FORMATS["full codes, fireq's cache"])
  same, errors = run(
    layer,
    quantized,
    formats,
    FORMATS["full codes, fireq's cache"][1],
    steps=2,
    weight_rate=0.0,
    factor_rate=0.0,
  )
  jax.tree.map(np.testing.assert_array_equal, same, quantized)
  assert errors.shape == (2,) and (errors > 0).all()


@pytest.mark.parametrize("name", ["e4m3", "full codes, fireq's cache"])
def test_the_error_falls_and_formats_stay(name):
  weight, kv = FORMATS[name]
  layer, quantized, formats = make(weight, kv)
  tuned, _ = run(
    layer, quantized, formats, kv, steps=100, batch=8, weight_rate=0.02
  )
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


def test_the_cache_s_scale_passes_gradients():
  """codes x scale, scale = max|x| / 7: the largest channel carries the
  rounding errors of all others."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 3, 1, 8)).astype(np.float32)
  weights = rng.normal(size=x.shape).astype(np.float32)
  kv = KVFormat(cache="int4", scale="f32")

  def total(x):
    held = tune.kv_cache.encode(x, x, kv)
    codes, scale = tune._cached(x, held.k, held.k_scale)
    return (codes * scale[..., None] * weights).sum()

  got = np.asarray(jax.grad(total)(jnp.asarray(x)))
  scale = np.abs(x).max(axis=-1, keepdims=True) / 7
  residue = np.round(x / scale) - x / scale
  largest = np.abs(x) == np.abs(x).max(axis=-1, keepdims=True)
  through = (weights * residue).sum(axis=-1, keepdims=True) * np.sign(x) / 7
  want = weights + np.where(largest, through, 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
