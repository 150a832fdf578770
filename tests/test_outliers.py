import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from fireq_jax import outliers
from fireq_jax.errors import ConfigError
from fireq_jax.models import llama

CONFIG = small_llama.config(
  hidden_size=96,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=32,
  tie_word_embeddings=True,
)
PARAMS = llama.init_params(CONFIG, jax.random.key(0))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), "int32")


def logits(params):
  return np.asarray(llama.forward(params, TOKENS, config=CONFIG)[0])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_power_of_two_changes_no_bit_of_the_logits(factor):
  changed = outliers.inject(PARAMS, CONFIG, factor=factor)
  np.testing.assert_array_equal(logits(changed), logits(PARAMS))


def test_other_factors_change_the_logits_by_rounding_alone():
  want = logits(PARAMS)
  got = logits(outliers.inject(PARAMS, CONFIG, factor=100.0))
  assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_the_outliers_are_where_they_should_be():
  changed = outliers.inject(PARAMS, CONFIG, factor=32.0, fraction=0.1)
  old, new = PARAMS["model"]["layers"][1], changed["model"]["layers"][1]

  def ratio(*path):
    x, y = old, new
    for key in path:
      x, y = x[key], y[key]
    return np.asarray(y, np.float32) / np.asarray(x, np.float32)

  for norm in ("input_layernorm", "post_attention_layernorm"):
    gain = ratio(norm, "weight")
    assert sorted(set(gain)) == [1, 32] and (gain == 32).sum() == 10
  columns = lambda name: np.median(ratio("self_attn", name, "kernel"), axis=0)
  value = columns("v_proj").reshape(2, 32)
  assert ((value == 32).sum(axis=1) == 3).all()
  key = columns("k_proj").reshape(2, 2, 16)
  assert ((key == 32).sum(axis=2) == 2).all()
  np.testing.assert_array_equal(key[:, 0], key[:, 1])
  up = np.median(ratio("mlp", "up_proj", "kernel"), axis=0)
  assert (up == 32).sum() == 13


def test_other_seeds_choose_other_channels():
  gain = lambda seed: np.asarray(
    outliers.inject(PARAMS, CONFIG, factor=8.0, seed=seed)["model"]["layers"][
      0
    ]["input_layernorm"]["weight"]
  )
  np.testing.assert_array_equal(gain(1), gain(1))
  assert (gain(1) != gain(2)).any()


def test_numbers_out_of_range_are_refused():
  with pytest.raises(ConfigError, match="factor"):
    outliers.inject(PARAMS, CONFIG, factor=0.0)
  with pytest.raises(ConfigError, match="fraction"):
    outliers.inject(PARAMS, CONFIG, factor=8.0, fraction=0.0)
