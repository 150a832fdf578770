"""From the parameters of a checkpoint to those that run fast.

Projections of one input become one, `self_attn/qkv_proj` and
`mlp/gate_up_proj`, and INT4 weights, an INT4 `lm_head` among them, go to the
order the kernels read. Float projections and an e4m3 `lm_head` stay as they
are. Execution parameters are never stored.
"""

from typing import Any

import jax

from fireq_jax.errors import ConfigError, UnsupportedError
from fireq_jax.pallas.layouts import has_minus_8, pack_int4_weights
from fireq_jax.qtensor import QTensor

Params = dict[str, Any]


def prepare(params: Params, *, donate: bool = False) -> Params:
  """Returns execution parameters, made one layer at a time.

  Args:
    params: float or quantised parameters.
    donate: deletes each layer's arrays once they are packed, so that a model
      never takes twice its memory; `params` cannot be used afterwards.

  Raises:
    ConfigError: the parameters are prepared already.
    UnsupportedError: they lie on several devices.
  """
  for leaf in jax.tree.leaves(params):
    if isinstance(leaf, jax.Array) and len(leaf.devices()) > 1:
      raise UnsupportedError(
        "the kernels run on one device",
        got=f"parameters on {len(leaf.devices())}",
        hint='generate(..., implementation="xla") takes them as they are',
      )
  layers = []
  for layer in params["model"]["layers"]:
    layers.append(prepare_layer(layer))
    if donate:
      _delete_replaced(layer, layers[-1])
  head = prepare_head({k: v for k, v in params.items() if k != "model"})
  if donate:
    _delete_replaced(params | {"model": {}}, head)
  return head | {"model": params["model"] | {"layers": layers}}


def prepare_head(params: Params) -> Params:
  """Returns `params` with a quantised `lm_head` packed, if there is one."""
  params = dict(params)
  if "lm_head" in params:
    _pack(params, ("lm_head",), "lm_head")
  return params


def prepare_layer(layer: Params) -> Params:
  """Returns one decoder layer with its quantised projections packed."""
  if "qkv_proj" in layer["self_attn"]:
    raise ConfigError("the parameters are prepared already")
  attn, mlp = dict(layer["self_attn"]), dict(layer["mlp"])
  _pack(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
  _pack(attn, ("o_proj",), "o_proj")
  _pack(mlp, ("gate_proj", "up_proj"), "gate_up_proj", gated=True)
  _pack(mlp, ("down_proj",), "down_proj")
  return layer | {"self_attn": attn, "mlp": mlp}


def _delete_replaced(old: Params, new: Params) -> None:
  """Deletes the arrays of `old` that are not in `new`, once that is made."""
  jax.block_until_ready(new)
  kept = {id(leaf) for leaf in jax.tree.leaves(new)}
  for leaf in jax.tree.leaves(old):
    if isinstance(leaf, jax.Array) and id(leaf) not in kept:
      leaf.delete()


def _pack(
  block: Params, parts: tuple[str, ...], name: str, *, gated: bool = False
) -> None:
  """Replaces `parts` of a block by `name`; those that differ stay apart."""
  weights = [block[part]["kernel"] for part in parts]
  if not _fit_together(weights):
    if len(parts) > 1:
      for part in parts:
        _pack(block, (part,), part)
    return
  for part in parts:
    del block[part]
  packed = _pack_weights(weights, gated=gated, asymmetric=has_minus_8(weights))
  block[name] = {"kernel": packed}


def _fit_together(weights: list[Any]) -> bool:
  """Whether one matmul can hold the projections."""
  if not all(isinstance(w, QTensor) and not w.is_e4m3 for w in weights):
    return False
  formats = {
    (w.shape[1], w.group, w.scale.dtype, w.activation) for w in weights
  }
  return len(formats) == 1


_pack_weights = jax.jit(
  pack_int4_weights, static_argnames=("gated", "asymmetric")
)
