"""Every tensor lands where the model looks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from fireq_jax import hf
from fireq_jax.config import LlamaConfig
from fireq_jax.errors import CheckpointError
from fireq_jax.models import llama, llama_hf

SHARD = "model.safetensors"


def opened(folder):
  ckpt = hf.open_checkpoint(folder)
  return ckpt, LlamaConfig.from_hf(ckpt.config, ckpt.generation_config)


def flat(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def hf_name(path):
  """Our leaf path as the Hugging Face name, by the rule it was made from."""
  name = path.replace("/", ".")
  for ours in (".kernel", ".embedding"):
    name = name.replace(ours, ".weight")
  return name


def edit(folder, change):
  tensors = load_file(folder / SHARD)
  change(tensors)
  save_file(tensors, folder / SHARD)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
  "heads", [{}, {"num_key_value_heads": 4}, {"head_dim": 64}]
)
def test_tree_has_the_models_shapes_and_the_files_values(
  tied, heads, make_hf_checkpoint
):
  folder = make_hf_checkpoint(tie_word_embeddings=tied, shards=2, **heads)
  ckpt, config = opened(folder)
  params = llama_hf.load_params(ckpt, config)
  expected = jax.eval_shape(
    lambda: llama.init_params(config, jax.random.key(0))
  )
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
  leaves = flat(params)
  assert sorted(map(hf_name, leaves)) == sorted(ckpt.names())
  for path, values in leaves.items():
    stored = ckpt.read(hf_name(path))
    if path.endswith("/kernel"):
      stored = np.swapaxes(stored, 0, 1)
    np.testing.assert_array_equal(values, stored, path)


def test_parts_are_the_whole(make_hf_checkpoint):
  ckpt, config = opened(make_hf_checkpoint())
  head = llama_hf.load_head(ckpt, config)
  parts = {
    "model": {
      **llama_hf.load_embedding(ckpt, config),
      "layers": [llama_hf.load_layer(ckpt, config, i) for i in range(2)],
      "norm": head["norm"],
    },
    "lm_head": head["lm_head"],
  }
  jax.tree.map(
    np.testing.assert_array_equal, parts, llama_hf.load_params(ckpt, config)
  )


def test_tied_head_in_the_file_is_not_used(make_hf_checkpoint):
  """CF07: equal to the embedding it is dropped in silence, else warned of."""
  folder = make_hf_checkpoint(tie_word_embeddings=True)
  embedding = "model.embed_tokens.weight"
  edit(folder, lambda t: t.update({"lm_head.weight": t[embedding].copy()}))
  params = llama_hf.load_params(*opened(folder))
  assert "lm_head" not in params

  def change(tensors):
    tensors["lm_head.weight"][-1, -1] += 1

  edit(folder, change)
  with pytest.warns(UserWarning, match="lm_head.weight differs"):
    again = llama_hf.load_params(*opened(folder))
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_rotary_buffers_of_old_files_are_ignored(make_hf_checkpoint):
  folder = make_hf_checkpoint()
  params = llama_hf.load_params(*opened(folder))
  buffer = np.ones(16, np.float32)
  names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)]
  edit(folder, lambda t: t.update({name: buffer.copy() for name in names}))
  again = llama_hf.load_params(*opened(folder))
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_one_message_has_all_that_is_wrong(make_hf_checkpoint):
  folder = make_hf_checkpoint(num_hidden_layers=3)

  def change(tensors):
    for i in range(3):
      tensors[f"extra.{i}"] = tensors.pop(
        f"model.layers.{i}.mlp.up_proj.weight"
      )
    for name in list(tensors):
      if "layernorm" in name:
        tensors[name] = tensors[name][None]

  edit(folder, change)
  ckpt, config = opened(folder)
  for call in (
    llama_hf.check_complete,
    lambda ckpt, config: llama_hf.load_layer(ckpt, config, 0),
  ):
    with pytest.raises(CheckpointError) as caught:
      call(ckpt, config)
    message = str(caught.value)
    assert "3 tensors missing: model.layers.0.mlp.up_proj.weight" in message
    assert "3 tensors unexpected: 'extra.0', 'extra.1', 'extra.2'" in message
    assert "6 tensors of another shape" in message
    assert "input_layernorm.weight expected [128] got [1, 128]" in message


def test_no_more_than_ten_names_of_a_kind(make_hf_checkpoint):
  folder = make_hf_checkpoint(num_hidden_layers=2)
  edit(
    folder,
    lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.")],
  )
  with pytest.raises(CheckpointError) as caught:
    llama_hf.load_params(*opened(folder))
  message = str(caught.value)
  assert "18 tensors missing: " in message
  assert message.count("model.layers.") == 10


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_float_dtypes_run(dtype, make_hf_checkpoint):
  """Rounded or not, weights give nearly the same logits; without jit too."""
  tokens = jnp.arange(12, dtype=jnp.int32)[None]

  def logits(name):
    ckpt, config = opened(make_hf_checkpoint(name, dtype=name))
    params = llama_hf.load_params(ckpt, config)
    got, _ = llama.forward(params, tokens, config=config)
    return np.asarray(got)

  expected = logits("bfloat16")
  got = logits(dtype)
  assert got.dtype == np.float32
  assert np.abs(got - expected).max() < 0.1 * expected.std()


def test_trained_models_load(shared):
  for name in ("llama-demo-6m", "llama-eval-20m"):
    ckpt, config = opened(shared / "models" / name)
    params = llama_hf.load_params(ckpt, config)
    leaves = traverse_util.flatten_dict(params["model"]["layers"][0])
    assert len(leaves) == 9
    assert config.tie_word_embeddings and "lm_head" not in params
