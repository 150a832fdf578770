"""The decoder layers of a Llama, one by one or chained."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fireq_jax import kv_cache
from fireq_jax.attention import attention
from fireq_jax.config import Implementation, KVFormat, LlamaConfig
from fireq_jax.kv_cache import KeyValues, LayerCache
from fireq_jax.linear import RMSNorm, in_features, linear
from fireq_jax.pallas import decode_chain
from fireq_jax.pallas.device import require_hopper
from fireq_jax.pallas.layouts import PackedInt4
from fireq_jax.pallas.rope_append import rope_append
from fireq_jax.qtensor import quantize_e4m3
from fireq_jax.rope import apply_rope, cos_sin, scale_keys

Params = dict[str, Any]


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

  with jax.named_scope("qkv"):
    fused = "qkv_proj" in attn
    qkv = [
      project(x, attn[name], norm=input_norm)
      for name in (("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj"))
    ]
  o_in, cache, keys = _attend(
    attn,
    qkv,
    cache,
    span=span,
    config=config,
    kv=kv,
    implementation=implementation,
    capture=capture,
  )
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
      **keys,
      "o_in": o_in,
      "gate_up_in": mlp_norm(mlp_in).astype(x.dtype),
      "down_in": down_in,
    }
  return x, cache, captured


def chains(layers: list, x: jax.Array, implementation: str) -> bool:
  """Whether the matmuls between two attentions can be one kernel."""
  if implementation == "xla" or x.shape[0] * x.shape[1] > decode_chain.FASTER:
    return False
  try:
    require_hopper(multiprocessors=decode_chain.CTAS)
    rows = x.reshape(-1, x.shape[-1])
    for i in range(len(layers) + 1):
      decode_chain.supported(rows, rows, _stages(layers, i))
  except NotImplementedError:
    return False
  return True


def chained_layers(
  layers: list,
  x: jax.Array,
  caches: list[LayerCache],
  *,
  span: Span,
  config: LlamaConfig,
  implementation: Implementation,
) -> tuple[jax.Array, list[LayerCache]]:
  """The layers one after another, cut at the attentions instead."""
  chain: Any = functools.partial(
    decode_chain.decode_chain,
    counters=jnp.zeros(2, jnp.int32),
    eps=config.rms_norm_eps,
  )
  attend: Any = jax.jit(_attend, static_argnames=("config", "implementation"))
  shape = x.shape
  x, a = chain(x.reshape(-1, shape[-1]), None, _stages(layers, 0))
  extended: list[LayerCache] = []
  for i, (layer, cache) in enumerate(zip(layers, caches)):
    with jax.named_scope(f"layer_{i}"):
      o_in, cache, _ = attend(
        layer["self_attn"],
        [a.reshape(*shape[:2], -1)],
        cache,
        span=span,
        config=config,
        implementation=implementation,
      )
      o_in = o_in.reshape(x.shape[0], -1)
      x, a = chain(x, o_in, _stages(layers, i + 1))
    extended.append(cache)
  return x.reshape(shape), extended


def _stages(layers: list, i: int) -> list[decode_chain.Stage]:
  """The projections between the attentions of layers i - 1 and i."""

  def stage(block, name, norm=None):
    kernel = block.get(name, {}).get("kernel")
    if not isinstance(kernel, PackedInt4):
      raise NotImplementedError(f"{name} is not packed for the kernels")
    return kernel, None if norm is None else norm["weight"]

  stages = []
  if i > 0:
    layer = layers[i - 1]
    norm = layer["post_attention_layernorm"]
    stages += [
      stage(layer["self_attn"], "o_proj"),
      stage(layer["mlp"], "gate_up_proj", norm),
      stage(layer["mlp"], "down_proj"),
    ]
  if i < len(layers):
    norm = layers[i]["input_layernorm"]
    stages.append(stage(layers[i]["self_attn"], "qkv_proj", norm))
  return stages


def _attend(
  attn: Params,
  qkv: list[jax.Array],
  cache: LayerCache | None,
  *,
  span: Span,
  config: LlamaConfig,
  kv: KVFormat | None = None,
  implementation: Implementation = "auto",
  capture: bool = False,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
  """From the projections of a layer's input to the input of `o_proj`.

  Args:
    attn: the layer's parameters of the attention.
    qkv: queries, keys and values [B, T, .] of all heads, in one array or each
      in its own.
    cache: extended and returned, or None.
    span: where the tokens lie.
    config: the model.
    kv: without a cache, as in `forward`.
    implementation: as in `forward`.
    capture: whether the keys are wanted.

  Returns:
    [B, T, N * H]; the cache; and if captured, keys before and after RoPE.
  """
  dtype, keys = qkv[0].dtype, {}
  appended = None
  if len(qkv) == 1 and cache is not None and not capture:
    appended = _rope_append(qkv[0], cache, attn, span, implementation)
  if appended is not None:
    q, q_scale, cache = appended
    keys_values = cache
  else:
    if len(qkv) == 1:
      width = in_features(attn["o_proj"]["kernel"])
      kv_width = (qkv[0].shape[-1] - width) // 2
      qkv = jnp.split(qkv[0], [width, width + kv_width], axis=-1)
    q, k, v = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in qkv)
    with jax.named_scope("rope"):
      keys["k_pre_rope"] = k
      q = apply_rope(q, span.cos, span.sin)
      keys["k_post_rope"] = k = apply_rope(k, span.cos, span.sin)
      q, k = scale_keys(q, k, attn.get("key_scale"), attn.get("key_shift"))
    with jax.named_scope("append"):
      if cache is not None:
        kv = cache.format
        cache = kv_cache.append(cache, k, v, span.starts, span.counts)
        keys_values = cache
      elif kv is not None:
        keys_values = kv_cache.encode(k, v, kv)
      else:
        keys_values = KeyValues(k=k.astype(dtype), v=v)
      if kv is not None and kv.query == "e4m3":
        q, q_scale = quantize_e4m3(q)
      else:
        q, q_scale = q.astype(dtype), None
  with jax.named_scope("attention"):
    out = attention(
      q,
      q_scale,
      keys_values,
      starts=span.starts,
      counts=span.counts,
      out_dtype=dtype,
      implementation=implementation,
    )
  return out.reshape(*out.shape[:2], -1), cache, keys if capture else {}


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
