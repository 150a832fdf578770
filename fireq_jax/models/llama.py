"""The Llama forward pass: pure functions over a parameter tree.

Head counts come from array shapes, so the functions also run on one shard of
a tensor-parallel model.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from fireq_jax import kv_cache
from fireq_jax.attention import attention
from fireq_jax.config import Implementation, KVFormat, LlamaConfig
from fireq_jax.errors import ConfigError
from fireq_jax.kv_cache import KeyValues, KVCache, LayerCache
from fireq_jax.linear import RMSNorm, in_features, linear
from fireq_jax.pallas.device import require_hopper
from fireq_jax.pallas.rope_append import rope_append
from fireq_jax.qtensor import QTensor, quantize_e4m3
from fireq_jax.recipe import PROJECTIONS, Recipe
from fireq_jax.rope import apply_rope, cos_sin, scale_keys

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
    if recipe.rotation.residual and config.tie_word_embeddings:
      params["lm_head"] = {
        "kernel": params["model"]["embed_tokens"]["embedding"].T
      }
    return params

  return jax.eval_shape(build)


@flax.struct.dataclass
class Span:
  """Where the T tokens of each row lie in their sequence.

  Attributes:
    starts: i32 [B], position of the first token.
    counts: i32 [B], how many of the T tokens are real, from the first on.
    cos: f32 [B, T, H / 2], of the rotation at each position.
    sin: f32 [B, T, H / 2].
  """

  starts: jax.Array
  counts: jax.Array
  cos: jax.Array
  sin: jax.Array


def make_span(
  config: LlamaConfig, starts: jax.Array, counts: jax.Array, length: int
) -> Span:
  """Returns the `Span` of `length` tokens a row."""
  positions = starts[:, None] + jnp.arange(length, dtype=jnp.int32)
  cos, sin = cos_sin(positions, config.rope, config.head_dim)
  return Span(starts=starts, counts=counts, cos=cos, sin=sin)


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
    implementation: of the projections and attention.

  Returns:
    logits f32 [B, T, V], undefined at padding, or [B, V]; and the
    `KVCache`, or None if none was given.
  """
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
  # One trace and one lowering serve all layers of one structure.
  run_layer = jax.jit(
    decoder_layer, static_argnames=("config", "kv", "implementation")
  )
  layer_caches: list[Any] = []
  for i, layer in enumerate(model["layers"]):
    with jax.named_scope(f"layer_{i}"):
      x, layer_cache, _ = run_layer(
        layer,
        x,
        None if cache is None else cache.layers[i],
        span=span,
        config=config,
        kv=kv,
        implementation=implementation,
      )
    layer_caches.append(layer_cache)
  if cache is not None:
    cache = KVCache(layers=layer_caches, lengths=cache.lengths + counts)

  with jax.named_scope("lm_head"):
    if last_only:
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


def decoder_layer(
  layer: Params,
  x: jax.Array,
  cache: LayerCache | None = None,
  *,
  span: Span,
  config: LlamaConfig,
  kv: KVFormat | None = None,
  implementation: Implementation = "auto",
  capture: bool = False,
) -> tuple[jax.Array, Any, dict[str, jax.Array] | None]:
  """Runs one decoder layer.

  Args:
    layer: the layer's parameters.
    x: residual stream [B, T, D].
    cache: extended and returned, or None.
    span: where the tokens lie.
    config: the model (head_dim and rms_norm_eps only).
    kv: without a cache, as in `forward`.
    implementation: as in `forward`.
    capture: also returns what calibration looks at: the inputs of the
      projections `qkv_in`, `o_in`, `gate_up_in`, `down_in`, each [B, T, C],
      and the keys before and after RoPE (and before `key_scale`)
      `k_pre_rope`, `k_post_rope`, [B, T, K, H].

  Returns:
    x; the `LayerCache`, or None if none was given; and the captured
    activations, or None.
  """
  attn, mlp = layer["self_attn"], layer["mlp"]
  project = functools.partial(_project, implementation=implementation)
  input_norm, mlp_norm = (
    RMSNorm(layer[name]["weight"], config.rms_norm_eps)
    for name in ("input_layernorm", "post_attention_layernorm")
  )
  heads = lambda x: x.reshape(*x.shape[:-1], -1, config.head_dim)

  appended = None
  k_post_rope: Any = None
  with jax.named_scope("qkv"):
    if "qkv_proj" in attn:
      qkv = project(x, attn["qkv_proj"], norm=input_norm)
      if cache is not None and not capture:
        appended = _rope_append(qkv, cache, attn, span, implementation)
      qkv = heads(qkv)
      query_heads = in_features(attn["o_proj"]["kernel"]) // config.head_dim
      kv_heads = (qkv.shape[2] - query_heads) // 2
      q, k_pre_rope, v = jnp.split(
        qkv, [query_heads, query_heads + kv_heads], axis=2
      )
    else:
      q, k_pre_rope, v = (
        heads(project(x, attn[name], norm=input_norm))
        for name in ("q_proj", "k_proj", "v_proj")
      )
  if appended is not None:
    q, q_scale, cache = appended
    keys_values = cache
  else:
    with jax.named_scope("rope"):
      q = apply_rope(q, span.cos, span.sin)
      k_post_rope = apply_rope(k_pre_rope, span.cos, span.sin)
      q, k = scale_keys(
        q, k_post_rope, attn.get("key_scale"), attn.get("key_shift")
      )
    with jax.named_scope("append"):
      if cache is not None:
        kv = cache.format
        cache = kv_cache.append(cache, k, v, span.starts, span.counts)
        keys_values = cache
      elif kv is not None:
        keys_values = kv_cache.encode(k, v, kv)
      else:
        keys_values = KeyValues(k=k.astype(x.dtype), v=v)
      if kv is not None and kv.query == "e4m3":
        q, q_scale = quantize_e4m3(q)
      else:
        q, q_scale = q.astype(x.dtype), None
  with jax.named_scope("attention"):
    o_in = attention(
      q,
      q_scale,
      keys_values,
      starts=span.starts,
      counts=span.counts,
      out_dtype=x.dtype,
      implementation=implementation,
    )
    o_in = o_in.reshape(*x.shape[:-1], -1)
  with jax.named_scope("o_proj"):
    attn_in, x = x, project(o_in, attn["o_proj"], residual=x)
  with jax.named_scope("mlp"):
    if "gate_up_proj" in mlp:
      down_in = project(x, mlp["gate_up_proj"], norm=mlp_norm)
    else:
      gate, up = (
        project(x, mlp[name], norm=mlp_norm).astype(jnp.float32)
        for name in ("gate_proj", "up_proj")
      )
      down_in = (jax.nn.silu(gate) * up).astype(x.dtype)
    mlp_in, x = x, project(down_in, mlp["down_proj"], residual=x)

  captured = None
  if capture:
    captured = {
      "qkv_in": input_norm(attn_in).astype(x.dtype),
      "k_pre_rope": k_pre_rope,
      "k_post_rope": k_post_rope,
      "o_in": o_in,
      "gate_up_in": mlp_norm(mlp_in).astype(x.dtype),
      "down_in": down_in,
    }
  return x, cache, captured


def _rope_append(qkv, cache, attn, span, implementation):
  """Runs the kernel, or returns None where plain JAX must do its work."""
  if implementation == "xla":
    return None
  try:
    require_hopper()
    with jax.named_scope("rope_append"):
      return rope_append(
        qkv,
        span.cos,
        span.sin,
        cache,
        span.starts,
        span.counts,
        key_scale=attn.get("key_scale"),
        key_shift=attn.get("key_shift"),
      )
  except NotImplementedError:
    if implementation == "mosaic_gpu":
      raise
    return None


def _project(x: jax.Array, w: Params, **options: Any) -> jax.Array:
  return linear(x, w["kernel"], **options)


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
