"""Seeded random damage: refused with our error, or harmless.

Every mutation hits one file of a two-shard model: bytes of a header, the
index or a configuration, or a value somewhere inside the JSON. Whatever loads
must have the very tensors of the undamaged model. Two tensors of the same
shape with their names swapped cannot be told apart; no mutation here does it.
"""

import copy
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from flax import traverse_util
from harness import INDEX, join, load, split

from fireq_jax.errors import FireQError

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
JSON_FILES = ["config.json", "generation_config.json", INDEX]
NASTY = [
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  7,
  255,
  2**31,
  2**63,
  10**30,
  0.5,
  1e300,
  "",
  "a",
  "BF16",
  "F16",
  "F8_E4M3",
  "../x",
  SHARDS[0],
  SHARDS[1],
  "\u0000",
  "\n",
  [],
  [0],
  [0, 0],
  [1, 2, 3],
  {},
  {"a": 1},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mutations") / "hf"
  config = tiny_llama.hf_config(
    rope="llama3",
    hidden_size=32,
    intermediate_size=48,
    head_dim=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    bos_token_id=1,
    eos_token_id=[2, 3],
  )
  tensors = {
    name: values.astype(ml_dtypes.bfloat16)
    for name, values in tiny_llama.hf_tensors(config).items()
  }
  tiny_llama.write_checkpoint(folder, config, tensors, shards=2)
  (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
  return folder


def leaves(folder):
  params, _ = load(folder)
  params["model"]["layers"] = dict(enumerate(params["model"]["layers"]))
  return traverse_util.flatten_dict(params)


def damage_bytes(random, text):
  """Changes, removes, inserts or repeats a few bytes of `text`."""
  data = bytearray(text)
  at = random.randint(len(data))
  match random.randint(6):
    case 0:
      data[at] ^= 1 << random.randint(8)
    case 1:
      data[at] = random.randint(256)
    case 2:
      del data[at : at + random.randint(1, 9)]
    case 3:
      data[at:at] = random.bytes(random.randint(1, 9))
    case 4:
      del data[at:]
    case 5:
      data[at:at] = data[at : at + random.randint(1, 200)]
  return bytes(data)


def damage_value(random, values):
  """Replaces, removes or adds one value anywhere in a JSON tree."""
  places = []

  def walk(node):
    for key in list(node) if isinstance(node, dict) else range(len(node)):
      places.append((node, key))
      if isinstance(node[key], dict | list):
        walk(node[key])

  values = copy.deepcopy(values)
  walk(values)
  node, key = places[random.randint(len(places))]
  nasty = NASTY[random.randint(len(NASTY))]
  match random.randint(4):
    case 0 | 1:
      node[key] = nasty
    case 2:
      del node[key]
    case 3 if isinstance(node, dict):
      node[f"{key}x"] = node.pop(key)
    case _:
      node.insert(key, nasty)
  return values


def damage(random, file, original):
  """Returns another content of `file`."""
  if file in JSON_FILES:
    if random.randint(2):
      return damage_bytes(random, original)
    return json.dumps(damage_value(random, json.loads(original))).encode()
  if random.randint(2):
    end = 8 + int.from_bytes(original[:8], "little")
    return damage_bytes(random, original[:end]) + original[end:]
  header, data = split(original)
  if random.randint(2):
    return join(json.dumps(damage_value(random, header)).encode(), data)
  return join(damage_bytes(random, json.dumps(header).encode()), data)


@pytest.mark.parametrize("file", [*SHARDS, *JSON_FILES])
def test_damage_is_refused_or_harmless(file, model):
  expected = leaves(model)
  path = model / file
  original = path.read_bytes()
  refused = 0
  try:
    for seed in range(200):
      path.write_bytes(damage(np.random.RandomState(seed), file, original))
      try:
        with warnings.catch_warnings(action="ignore"):
          got = leaves(model)
      except FireQError as error:
        refused += 1
        assert "\n" not in str(error), seed
        continue
      lacking = expected.keys() - got.keys()
      assert lacking <= {("lm_head", "kernel")}, f"{seed}: {lacking}"
      for name, values in got.items():
        assert values.dtype == expected[name].dtype, f"{seed}: {name}"
        np.testing.assert_array_equal(values, expected[name], f"{seed}: {name}")
  finally:
    path.write_bytes(original)
  print(f"{file}: {refused} of 200 refused, the others harmless")
  assert refused > 20
