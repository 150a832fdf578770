"""Configurations no Llama can have (CF) are refused, the key named."""

import re

import pytest
from harness import edit_json, expect_refusal, load, set_keys, write

from fireq_jax.errors import CheckpointError, ConfigError, UnsupportedError

CONFIG = "config.json"
GENERATION = "generation_config.json"


def without(key):
  return edit_json(CONFIG, lambda config: config.pop(key) and None)


def rope(**values):
  return set_keys(CONFIG, rope_parameters={"rope_theta": 1e4} | values)


LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "max_position_embeddings",
)
NO_SIZE = (0, -1, 10**12, 10**400, 1e12, 128.0, True, "32", [32], {})
NO_NUMBER = (0, 0.0, -1.0, 1e13, True, "1e-5", [1.0], {})

BAD = [
  ("CF01 missing", lambda f: (f / CONFIG).unlink(), CheckpointError, "no such"),
  ("CF01 empty", write(CONFIG, b""), CheckpointError, "not valid JSON"),
  ("CF01 not JSON", write(CONFIG, b"{x"), CheckpointError, "not valid JSON"),
  ("CF01 a list", write(CONFIG, b"[]"), CheckpointError, "not a JSON object"),
  ("CF01 NaN", write(CONFIG, b'{"a": NaN}'), CheckpointError, "NaN is not"),
  ("CF01 1e400", write(CONFIG, b'{"vocab_size": 1e400}'), ConfigError, "no 'm"),
  ("CF01 twice", write(CONFIG, b'{"a":1,"a":2}'), CheckpointError, "'a' is gi"),
  ("CF01 {}", write(CONFIG, b"{}"), ConfigError, "no 'model_type'"),
  (
    "CF01 generation_config not JSON",
    write(GENERATION, b"eos"),
    CheckpointError,
    "generation_config.json: not valid JSON",
  ),
  *(
    (f"CF01 without {key}", without(key), ConfigError, f"no '{key}'")
    for key in (
      "model_type",
      "hidden_act",
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
      "num_attention_heads",
      "rms_norm_eps",
      "max_position_embeddings",
    )
  ),
  *(
    (f"CF04 {key} {x!r:.9}", set_keys(CONFIG, **{key: x}), ConfigError, key)
    for key in SIZES
    for x in NO_SIZE
  ),
  *(
    (
      f"CF04 head_dim {size}",
      set_keys(CONFIG, head_dim=size),
      ConfigError,
      f"invalid head_dim, expected one of 16, 32, 64, 128, 256, got {size}",
    )
    for size in (8, 63, 96, 512)
  ),
  (
    "CF04 kv heads do not divide heads",
    set_keys(CONFIG, num_key_value_heads=3),
    ConfigError,
    "multiple of num_key_value_heads, got 4 and 3",
  ),
  (
    "CF04 heads do not divide hidden",
    set_keys(CONFIG, head_dim=None, num_attention_heads=5),
    ConfigError,
    "multiple of num_attention_heads, got 128 and 5",
  ),
  (
    "CF04 too many layers to list",
    set_keys(CONFIG, num_hidden_layers=10**6),
    ConfigError,
    "num_hidden_layers",
  ),
  *(
    (f"CF01 eps {x!r}", set_keys(CONFIG, rms_norm_eps=x), ConfigError, "_eps")
    for x in NO_NUMBER
  ),
  *(
    (f"CF03 theta {x!r}", rope(rope_theta=x), ConfigError, "rope theta")
    for x in NO_NUMBER
  ),
  *(
    (f"CF03 {kind!r}", rope(rope_type=kind, factor=2.0), UnsupportedError, "pe")
    for kind in ("yarn", "longrope", "dynamic", "bogus", "", 3, None, ["yarn"])
  ),
  *(
    (
      f"CF03 llama3 without {key}",
      rope(**{k: v for k, v in LLAMA3.items() if k != key}),
      ConfigError,
      f"no '{key}'",
    )
    for key in LLAMA3
    if key != "rope_type"
  ),
  *(
    (
      f"CF03 llama3 {key} {x!r}",
      rope(**LLAMA3 | {key: x}),
      ConfigError,
      f"rope {key}",
    )
    for key in LLAMA3
    if key != "rope_type"
    for x in (0, -1, "8", True, [])
  ),
  (
    "CF03 llama3 low above high",
    rope(**LLAMA3 | {"low_freq_factor": 5.0}),
    ConfigError,
    "low_freq_factor must be below",
  ),
  ("CF03 linear without factor", rope(rope_type="linear"), ConfigError, "'fac"),
  (
    "CF03 rope a list",
    set_keys(CONFIG, rope_parameters=[1]),
    ConfigError,
    "ob",
  ),
  (
    "CF03 both styles, not the same",
    set_keys(CONFIG, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ConfigError,
    "disagree",
  ),
  (
    "CF03 two thetas",
    set_keys(CONFIG, rope_theta=5e5),
    ConfigError,
    "two values of rope_theta, got 10000.0 and 500000.0",
  ),
  (
    "CF03 partial rotation",
    rope(partial_rotary_factor=0.5),
    UnsupportedError,
    "partial_rotary_factor",
  ),
  *(
    (
      f"CF06 {key} {x!r}",
      set_keys(CONFIG, **{key: x}),
      UnsupportedError,
      f"unsupported {key}, expected .*, got {re.escape(repr(x))}",
    )
    for key, x in (
      ("attention_bias", True),
      ("mlp_bias", True),
      ("hidden_act", "gelu"),
      ("hidden_act", 1),
      ("model_type", "mistral"),
      ("model_type", "qwen2"),
      ("model_type", ["llama"]),
    )
  ),
  (
    "CF06 a classifier",
    set_keys(CONFIG, architectures=["LlamaForSequenceClassification"]),
    UnsupportedError,
    "unsupported architectures",
  ),
  (
    "CF06 quantised",
    set_keys(CONFIG, quantization_config={"quant_method": "awq"}),
    UnsupportedError,
    "quantised already",
  ),
  *(
    (f"CF01 {key} {x!r}", set_keys(CONFIG, **{key: x}), ConfigError, key)
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings")
    for x in ("false", 0, 1, [])
  ),
  *(
    (
      f"CF01 {file} eos {x!r}",
      lambda folder, file=file, x=x: (folder / file).write_text(
        (folder / CONFIG)
        .read_text()
        .replace('"eos_token_id": 257', f'"eos_token_id": {x}')
      ),
      ConfigError,
      "eos_token_id",
    )
    for file in (CONFIG, GENERATION)
    for x in ("-1", "320", '"2"', "true", "[1, null]", "[[1]]", "{}", "2.0")
  ),
  (
    "CF07 untied without head",
    set_keys(CONFIG, tie_word_embeddings=False),
    CheckpointError,
    "1 tensor missing: lm_head.weight .is tie_word_embeddings wrong",
  ),
  (
    "CF08 vocabulary of another size",
    set_keys(CONFIG, vocab_size=328),
    CheckpointError,
    r"embed_tokens.weight expected \[328, 128\] got \[320, 128\]",
  ),
]


@pytest.mark.parametrize(
  "mutate, error, pattern", [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_bad_config_is_refused(mutate, error, pattern, make_hf_checkpoint):
  folder = make_hf_checkpoint(
    tie_word_embeddings=True, num_hidden_layers=1, intermediate_size=32
  )
  mutate(folder)
  expect_refusal(folder, error, pattern)


def test_code_in_the_folder_never_runs(make_hf_checkpoint, tmp_path):
  """CF09"""
  folder = make_hf_checkpoint(
    auto_map={"AutoModelForCausalLM": "modeling_x.Model"},
    trust_remote_code=True,
  )
  ran = tmp_path / "ran"
  source = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
  for name in ("modeling_x.py", "__init__.py", "conftest.py"):
    (folder / name).write_text(source)
  load(folder)
  assert not ran.exists()
