"""The Llama forward pass: pure functions over a parameter tree.

Head counts come from array shapes, so the functions also run on one shard of
a tensor-parallel model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fireq_jax.config import (
  Implementation,
  KVFormat,
  LlamaConfig,
  check_implementation,
)
from fireq_jax.errors import ConfigError
from fireq_jax.kv_cache import KVCache
from fireq_jax.linear import RMSNorm, linear
from fireq_jax.models.llama_layers import (
  chained_layers,
  chains,
  decoder_layer,
  make_span,
)
from fireq_jax.qtensor import QTensor
from fireq_jax.recipe import PROJECTIONS, Recipe

Params = dict[str, Any]


def init_params(
  config: LlamaConfig,
  key: jax.Array,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Params:
  """Returns random float parameters: normal of 0.02, norms of one."""
  keys = iter(jax.random.split(key, 7 * config.num_hidden_layers + 2))
  hidden, ffn = config.hidden_size, config.intermediate_size
  q = config.num_attention_heads * config.head_dim
  kv = config.num_key_value_heads * config.head_dim

  def normal(rows, columns):
    values = 0.02 * jax.random.normal(next(keys), (rows, columns))
    return values.astype(dtype)

  kernel = lambda rows, columns: {"kernel": normal(rows, columns)}
  norm = lambda: {"weight": jnp.ones(hidden, dtype)}
  layers = [
    {
      "input_layernorm": norm(),
      "self_attn": {
        "q_proj": kernel(hidden, q),
        "k_proj": kernel(hidden, kv),
        "v_proj": kernel(hidden, kv),
        "o_proj": kernel(q, hidden),
      },
      "post_attention_layernorm": norm(),
      "mlp": {
        "gate_proj": kernel(hidden, ffn),
        "up_proj": kernel(hidden, ffn),
        "down_proj": kernel(ffn, hidden),
      },
    }
    for _ in range(config.num_hidden_layers)
  ]
  params: Params = {
    "model": {
      "embed_tokens": {"embedding": normal(config.vocab_size, hidden)},
      "layers": layers,
      "norm": norm(),
    }
  }
  if not config.tie_word_embeddings:
    params["lm_head"] = kernel(hidden, config.vocab_size)
  return params


def cast_floats(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
  """Casts embeddings, kernels and gains; leaves quantised kernels as they are.

  Factors of keys stay f32 as well.
  """

  def cast(path, leaf):
    name = getattr(path[-1], "key", None)
    return (
      leaf.astype(dtype) if name in ("embedding", "kernel", "weight") else leaf
    )

  return jax.tree_util.tree_map_with_path(cast, tree)


def abstract_params(config: LlamaConfig, recipe: Recipe) -> Params:
  """Shapes and dtypes of the model `recipe` makes: `ShapeDtypeStruct` leaves.

  The one description of a quantised tree: completeness checks, shardings and
  memory plans come from it.
  """

  def quantized(kernel, weight):
    channels, outputs = kernel.shape
    if weight.codes == "e4m3":
      return QTensor(
        codes=jnp.zeros((outputs, channels), jnp.float8_e4m3fn),
        scale=jnp.zeros((outputs, 1), jnp.float32),
        tensor_scale=jnp.zeros((), jnp.float32),
        activation=weight.activation,
      )
    scale = jnp.float8_e4m3fn if weight.scale == "e4m3" else jnp.bfloat16
    return QTensor(
      codes=jnp.zeros((outputs, channels // 2), jnp.uint8),
      scale=jnp.zeros((outputs, channels // weight.group), scale),
      tensor_scale=jnp.zeros((), jnp.float32),
      activation=weight.activation,
    )

  def build():
    params = init_params(config, jax.random.key(0))
    count = config.num_hidden_layers
    for i, layer in enumerate(params["model"]["layers"]):
      for name, block in PROJECTIONS.items():
        weight = recipe.weight_format(i, name, count)
        if weight is not None:
          projection = layer[block][name]
          projection["kernel"] = quantized(projection["kernel"], weight)
      per_channel = jnp.zeros(
        (config.num_key_value_heads, config.head_dim), jnp.float32
      )
      if recipe.keys.top_k or recipe.keys.fit:
        layer["self_attn"]["key_scale"] = per_channel
      if recipe.keys.fit:
        layer["self_attn"]["key_shift"] = per_channel
    if "lm_head" not in params and (recipe.rotation.residual or recipe.head):
      params["lm_head"] = {
        "kernel": params["model"]["embed_tokens"]["embedding"].T
      }
    if recipe.head is not None:
      head = params["lm_head"]
      head["kernel"] = quantized(head["kernel"], recipe.head)
    return params

  return jax.eval_shape(build)


def forward(
  params: Params,
  tokens: jax.Array,
  cache: KVCache | None = None,
  *,
  config: LlamaConfig,
  counts: jax.Array | None = None,
  last_only: bool = False,
  kv: KVFormat | None = None,
  implementation: Implementation = "auto",
) -> tuple[jax.Array, Any]:
  """Runs the model: prefill, a chunk of a prefill, or a decode step (T = 1).

  Row b's tokens follow the `cache.lengths[b]` tokens it already has.
  Activations have the dtype of the embedding. A token id outside the
  vocabulary gives NaN.

  Args:
    params: the parameter tree, float or quantised.
    tokens: i32 [B, T], right-padded.
    cache: extended and returned; tokens beyond its capacity are dropped.
      None attends within `tokens` alone.
    config: the model; static under `jit`, like all that follow but `counts`.
    counts: i32 [B] in [0, T], real tokens per row; None means all.
    last_only: returns logits of each row's last real token only.
    kv: without a cache, the format keys, values and queries are rounded to;
      None keeps them in the dtype of the activations.
    implementation: of the projections and attention: "mosaic_gpu" for the
      Hopper kernels, "xla" for plain JAX, "auto" for a kernel where it can run.

  Returns:
    logits f32 [B, T, V], undefined at padding, or [B, V]; and the
    `KVCache`, or None if none was given.

  Raises:
    ConfigError: both `cache` and `kv` are given, or there is no such
      implementation.
    NotImplementedError: a kernel asked for by name cannot run this.
  """
  check_implementation(implementation)
  if cache is not None and kv is not None:
    raise ConfigError("kv is the cache's to say", got=repr(kv))
  batch, length = tokens.shape
  if counts is None:
    counts = jnp.full(batch, length, jnp.int32)
  starts = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
  span = make_span(config, starts, counts, length)

  model = params["model"]
  embedding = jnp.asarray(model["embed_tokens"]["embedding"])
  with jax.named_scope("embed"):
    x = embedding.at[tokens].get(mode="fill", wrap_negative_indices=False)
  layers, caches = model["layers"], None if cache is None else cache.layers
  shared = {"span": span, "config": config, "implementation": implementation}
  if caches is not None and chains(layers, x, implementation):
    x, layer_caches = chained_layers(layers, x, caches, **shared)
  else:
    # One trace and one lowering serve all layers of one structure.
    run_layer = jax.jit(
      decoder_layer, static_argnames=("config", "kv", "implementation")
    )
    layer_caches: list[Any] = []
    for i, layer in enumerate(layers):
      with jax.named_scope(f"layer_{i}"):
        x, layer_cache, _ = run_layer(
          layer, x, None if caches is None else caches[i], kv=kv, **shared
        )
      layer_caches.append(layer_cache)
  if cache is not None:
    cache = KVCache(layers=layer_caches, lengths=cache.lengths + counts)

  with jax.named_scope("lm_head"):
    if last_only and x.shape[1] == 1:
      x = x[:, 0]
    elif last_only:
      last = jnp.maximum(counts - 1, 0)
      x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    tied = "lm_head" not in params
    head = embedding.T if tied else params["lm_head"]["kernel"]
    logits = linear(
      x,
      head,
      norm=RMSNorm(model["norm"]["weight"], config.rms_norm_eps),
      out_dtype=jnp.float32,
      implementation=implementation,
    )
  return logits, cache


class Llama(nnx.Module):
  """The functions above as a Flax module, for those who want one.

  `nnx.split` and `nnx.merge` it around `jax.jit`: `nnx.jit` walks every leaf
  in Python at each call.
  """

  def __init__(self, config: LlamaConfig, params: Params):
    self.config = config
    self.params = nnx.data(params)

  def __call__(
    self, tokens: jax.Array, cache: KVCache | None = None, **options: Any
  ) -> tuple[jax.Array, Any]:
    """Calls `forward` with this module's parameters and configuration."""
    return forward(self.params, tokens, cache, config=self.config, **options)
