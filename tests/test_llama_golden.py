"""From Hugging Face files to logits, against transformers on torch.

`golden/make_goldens.py` made the stored logits; weights come from their seed.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from golden import cases

import fireq_jax
from fireq_jax import hf
from fireq_jax.config import LlamaConfig, RopeConfig
from fireq_jax.models import llama, llama_hf

DEMO = Path(fireq_jax.__file__).parent / "demo"


@pytest.fixture(scope="module")
def golden():
  with np.load(cases.LOGITS) as arrays:
    return dict(arrays)


def load(folder):
  ckpt = hf.open_checkpoint(folder)
  config = LlamaConfig.from_hf(ckpt.config, ckpt.generation_config)
  return llama_hf.load_params(ckpt, config), config


def logits_of(params, config, tokens):
  logits, _ = jax.jit(llama.forward, static_argnames="config")(
    params, jnp.asarray(tokens), config=config
  )
  return np.asarray(logits[0])


def random_model(name, folder):
  case = cases.CASES[name]
  tiny_llama.write_checkpoint(folder, case.hf_config(), case.tensors())
  return case, *load(folder)


def worst(logits, case, expected):
  """Largest error, in standard deviations of the expected logits."""
  got = logits[-case.rows :, case.columns()]
  return np.abs(got - expected).max() / expected.std()


@pytest.mark.parametrize("name", cases.CASES)
def test_random_models_equal_transformers(name, golden, tmp_path):
  case, params, config = random_model(name, tmp_path)
  logits = logits_of(params, config, case.tokens())
  error = worst(logits, case, golden[f"{name}/logits"])
  same = (logits.argmax(-1) == golden[f"{name}/top1"]).mean()
  print(f"{name}: max error {error:.1e} std, top-1 {same:.2%}")
  assert logits.dtype == np.float32
  # Angles are float32 there and here: position * 2**-24 rad of rounding.
  assert error < 1e-4 + 5e-7 * case.length
  assert same == 1


@pytest.mark.parametrize(
  "name, change",
  [
    ("gqa", {"rope": RopeConfig(theta=9000.0)}),
    ("eps", {"rms_norm_eps": 1e-6}),
    ("linear", {"rope": RopeConfig(theta=10000.0)}),
    (
      "llama3",
      {"rope": RopeConfig(theta=500000.0, type="llama3", factor=32.0)},
    ),
  ],
)
def test_the_stored_logits_tell_constants_apart(name, change, golden, tmp_path):
  case, params, config = random_model(name, tmp_path)
  wrong = dataclasses.replace(config, **change)
  logits = logits_of(params, wrong, case.tokens())
  assert worst(logits, case, golden[f"{name}/logits"]) > 0.03


def demo_figures(golden, dtype):
  params, config = load(DEMO)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  logits = logits_of(params, config, golden["demo/tokens"].astype(np.int32))
  expected = golden["demo/logits"]
  error = np.abs(logits[::8, ::64] - expected).max() / expected.std()
  same = (logits.argmax(-1) == golden["demo/top1"]).mean()
  print(
    f"demo in {np.dtype(dtype)}: max error {error:.1e} std, top-1 {same:.2%}"
  )
  return error, same


def test_demo_in_f32_equals_transformers(golden):
  error, same = demo_figures(golden, np.float32)
  assert error < 1e-4
  assert same == 1


def test_demo_in_bf16_is_close_to_transformers_in_f32(golden):
  error, same = demo_figures(golden, jnp.bfloat16)
  assert error < 0.1
  assert same >= 0.98
