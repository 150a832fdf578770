"""Hugging Face Llama weights as the parameter tree of `models.llama`."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from fireq_jax.config import LlamaConfig
from fireq_jax.errors import CheckpointError
from fireq_jax.hf import HFCheckpoint

Params = dict[str, Any]


class Entry(NamedTuple):
  """One parameter under its two names.

  Attributes:
    name: in Hugging Face files; of a layer, after "model.layers.N.".
    path: in our tree, below the part that holds it.
    shape: in the files, as dimension letters; NH is N times H.
    transpose: whether ours is the transpose.
  """

  name: str
  path: str
  shape: str
  transpose: bool = False


EMBEDDING = Entry("model.embed_tokens.weight", "embed_tokens/embedding", "V D")
LAYER = (
  Entry("input_layernorm.weight", "input_layernorm/weight", "D"),
  Entry("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "NH D", True),
  Entry("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "KH D", True),
  Entry("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "KH D", True),
  Entry("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "D NH", True),
  Entry(
    "post_attention_layernorm.weight", "post_attention_layernorm/weight", "D"
  ),
  Entry("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "F D", True),
  Entry("mlp.up_proj.weight", "mlp/up_proj/kernel", "F D", True),
  Entry("mlp.down_proj.weight", "mlp/down_proj/kernel", "D F", True),
)
NORM = Entry("model.norm.weight", "norm/weight", "D")
LM_HEAD = Entry("lm_head.weight", "lm_head/kernel", "V D", True)

# A buffer that old versions of transformers saved; computed from the config.
_IGNORED = ".rotary_emb.inv_freq"


def check_complete(ckpt: HFCheckpoint, config: LlamaConfig) -> None:
  """Raises `CheckpointError` unless every tensor is there, and no other.

  Reads no values. The one message lists missing, unexpected and misshaped
  tensors: how many, and the first ten of each.
  """
  entries = [(EMBEDDING.name, EMBEDDING)]
  for index in range(config.num_hidden_layers):
    entries += _layer_entries(index)
  entries += [(entry.name, entry) for entry in (NORM, LM_HEAD)]
  expected = {name: _shape(entry, config) for name, entry in entries}
  stored = {n for n in ckpt.names() if not n.endswith(_IGNORED)}
  if config.tie_word_embeddings and LM_HEAD.name not in stored:
    del expected[LM_HEAD.name]
  missing = [n for n in expected if n not in stored]
  unexpected = sorted(stored - expected.keys())
  misshaped = [
    f"{name} expected {list(shape)} got {list(ckpt.shape(name))}"
    for name, shape in expected.items()
    if name in stored and ckpt.shape(name) != shape
  ]
  faults = [
    _list_of("missing", missing),
    _list_of("unexpected", [repr(n)[:100] for n in unexpected]),
    _list_of("of another shape than config.json says", misshaped),
  ]
  if any(faults):
    hint = None
    if missing == [LM_HEAD.name]:
      hint = "is tie_word_embeddings wrong in config.json?"
    raise CheckpointError(
      "; ".join(filter(None, faults)), where=ckpt.path, hint=hint
    )


def load_embedding(ckpt: HFCheckpoint, config: LlamaConfig) -> Params:
  """Returns `{"embed_tokens": {"embedding": [V, D]}}`."""
  return _load(ckpt, config, [(EMBEDDING.name, EMBEDDING)])


def load_layer(ckpt: HFCheckpoint, config: LlamaConfig, index: int) -> Params:
  """Returns decoder layer `index`, as `models.llama` describes it."""
  return _load(ckpt, config, _layer_entries(index))


def load_head(ckpt: HFCheckpoint, config: LlamaConfig) -> Params:
  """Returns `{"norm": ...}`, and `"lm_head"` unless it is tied.

  Warns if a tied model's file has an `lm_head` that differs from the
  embedding, which is used in its place.
  """
  entries = [(NORM.name, NORM)]
  if not config.tie_word_embeddings:
    entries.append((LM_HEAD.name, LM_HEAD))
  elif LM_HEAD.name in ckpt.names() and not _same(ckpt, EMBEDDING, LM_HEAD):
    warnings.warn(
      f"{ckpt.path}: lm_head.weight differs from the embedding, but the model"
      " ties them: the embedding is used",
      stacklevel=2,
    )
  return _load(ckpt, config, entries)


def load_params(ckpt: HFCheckpoint, config: LlamaConfig) -> Params:
  """Returns the whole tree as NumPy arrays in their stored dtypes.

  Raises:
    CheckpointError: incomplete, or values that are not finite.
  """
  check_complete(ckpt, config)
  head = load_head(ckpt, config)
  model = load_embedding(ckpt, config) | {
    "layers": [
      load_layer(ckpt, config, i) for i in range(config.num_hidden_layers)
    ],
    "norm": head.pop("norm"),
  }
  return {"model": model} | head


def _layer_entries(index: int) -> list[tuple[str, Entry]]:
  return [(f"model.layers.{index}.{entry.name}", entry) for entry in LAYER]


def _shape(entry: Entry, config: LlamaConfig) -> tuple[int, ...]:
  sizes = {
    "V": config.vocab_size,
    "D": config.hidden_size,
    "F": config.intermediate_size,
    "NH": config.num_attention_heads * config.head_dim,
    "KH": config.num_key_value_heads * config.head_dim,
  }
  return tuple(sizes[letter] for letter in entry.shape.split())


def _load(
  ckpt: HFCheckpoint, config: LlamaConfig, entries: list[tuple[str, Entry]]
) -> Params:
  flat = {}
  for name, entry in entries:
    if ckpt.shape(name) != _shape(entry, config):
      check_complete(ckpt, config)  # raises, naming all that is wrong
    values = ckpt.read(name)
    flat[entry.path] = values.T if entry.transpose else values
  return traverse_util.unflatten_dict(flat, sep="/")


def _same(ckpt: HFCheckpoint, a: Entry, b: Entry) -> bool:
  """Whether two matrices hold equal values; reads some rows at a time."""
  rows = 4096
  return all(
    np.array_equal(
      ckpt.read(a.name, slice(i, i + rows)),
      ckpt.read(b.name, slice(i, i + rows)),
    )
    for i in range(0, ckpt.shape(a.name)[0], rows)
  )


def _list_of(what: str, items: list[str]) -> str:
  """Returns "2 tensors WHAT: a, b", at most ten, or nothing."""
  if not items:
    return ""
  shown = ", ".join(items[:10])
  more = ", ..." if len(items) > 10 else ""
  plural = "tensor" if len(items) == 1 else "tensors"
  return f"{len(items)} {plural} {what}: {shown}{more}"
