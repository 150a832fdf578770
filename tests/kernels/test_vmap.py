"""Kernels that must not overlap run one after another under vmap."""

import jax
import jax.numpy as jnp
import pytest
from test_decode_chain import shapes

from fireq_jax import kv_cache
from fireq_jax.config import KVFormat, LlamaConfig, RopeConfig
from fireq_jax.pallas.decode_attention import decode_attention
from fireq_jax.pallas.decode_chain import decode_chain
from fireq_jax.pallas.rope_append import rope_append

KV = KVFormat(cache="int4", scale="bf16", query="e4m3")
CONFIG = LlamaConfig(
  vocab_size=64,
  hidden_size=512,
  intermediate_size=512,
  num_hidden_layers=1,
  num_attention_heads=8,
  num_key_value_heads=2,
  head_dim=128,
  rms_norm_eps=1e-5,
  max_position_embeddings=64,
  rope=RopeConfig(theta=10000.0),
  tie_word_embeddings=False,
)
TIMES = 3


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def layer_cache():
  return jax.eval_shape(
    lambda: kv_cache.init_cache(CONFIG, 2, 64, KV).layers[0]
  )


def chain():
  x, a, stages = shapes(2)
  counters = struct(2, dtype=jnp.int32)
  call = lambda x, a, stages, counters: decode_chain(
    x, a, stages, counters, eps=1e-5
  )
  return call, (x, a, stages, counters), (0, 0, None, None)


def append():
  qkv = struct(2, 1, 12 * 128, dtype=jnp.bfloat16)
  angle, place = struct(2, 1, 64), struct(2, dtype=jnp.int32)
  args = qkv, angle, angle, layer_cache(), place, place
  return rope_append, args, (0, None, None, 0, 0, 0)


def attend():
  cache, place = layer_cache(), struct(2, dtype=jnp.int32)
  q = struct(2, 1, 8, 128, dtype=jnp.float8_e4m3fn)
  args = q, struct(2, 1, 8), cache.k, cache.k_scale, cache.v, cache.v_scale
  return decode_attention, (*args, place, place), 0


OLD = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason="JAX 0.10 has no vmap rule for calls that hold references",
)


@pytest.mark.parametrize(
  "case", [chain, pytest.param(append, marks=OLD), attend]
)
def test_kernels_run_in_a_loop_under_vmap(case):
  call, args, axes = case()

  def lowered(function, args):
    trace = jax.jit(function).trace(*args)
    return trace.lower(lowering_platforms=("cuda",)).as_text()

  alone = lowered(call, args)
  assert "stablehlo.while" not in alone

  if axes == 0:
    axes = (0,) * len(args)
  stacked = [
    arg
    if axis is None
    else jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((TIMES, *x.shape), x.dtype), arg
    )
    for arg, axis in zip(args, axes)
  ]
  together = lowered(jax.vmap(call, axes), stacked)
  assert "stablehlo.while" in together
  assert together.count("mosaic_gpu") == alone.count("mosaic_gpu")
