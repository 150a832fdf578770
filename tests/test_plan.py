"""The plan's sizes against arithmetic by hand."""

import dataclasses

import pytest
from test_sharding import CONFIG

from fireq_jax import plan, recipe
from fireq_jax.errors import ResourceError


def test_sizes():
  steps = recipe.from_dict(
    {
      "name": "x",
      "weight": {"group": 64, "scale": "bf16"},
      "kv": {"cache": "int4"},
      "overrides": [{"layers": [0]}],
    }
  )
  made = plan.make_plan(CONFIG, steps, bytes_in=1000)
  q, kv, d, f, v = 8 * 32, 4 * 32, 128, 256, 256
  elements = d * (2 * q + 2 * kv + 3 * f)
  floats = 2 * v * d + 5 * d + elements  # embedding, head, norms, layer 0
  int4 = elements / 2 + elements / 64 * 2 + 7 * 4
  assert made.bytes_out == 2 * floats + int4
  assert (made.quantized, made.projections, made.layers) == (7, 14, 2)
  # Two layers, keys and values, 4 heads of 16 bytes and a bf16 scale.
  assert made.kv_bytes == 2 * 2 * 4 * (16 + 2)
  assert made.disk_bytes > made.bytes_out
  calibrated = plan.make_plan(
    CONFIG, steps, bytes_in=1000, calibration_tokens=100
  )
  assert calibrated.peak_bytes == made.peak_bytes + 2 * 100 * d * 2


def test_a_quantised_head_is_counted():
  steps = recipe.from_dict({"name": "x", "head": {"group": 64}})
  plain = plan.make_plan(CONFIG, recipe.load("none"), bytes_in=1000)
  made = plan.make_plan(CONFIG, steps, bytes_in=1000)
  elements = 256 * 128
  int4 = elements / 2 + elements / 64 + 4
  assert plain.bytes_out - made.bytes_out == 2 * elements - int4
  tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
  plain = plan.make_plan(tied, recipe.load("none"), bytes_in=1000)
  made = plan.make_plan(tied, steps, bytes_in=1000)
  assert made.bytes_out - plain.bytes_out == int4
  wide = dataclasses.replace(tied, vocab_size=1 << 16)
  made = plan.make_plan(wide, steps, bytes_in=1000)
  assert made.peak_bytes - made.bytes_out > 4 * 4 * (1 << 16) * 128


def test_memory_is_checked():
  plan.check_memory(1)
  with pytest.raises(ResourceError, match="too little memory"):
    plan.check_memory(10**17)


def test_sizes_for_people():
  assert [plan.size(n) for n in (999, 1500, 2.5e6, 4.7e9, 1.2e12)] == [
    "999 B",
    "1.5 kB",
    "2.5 MB",
    "4.70 GB",
    "1200.00 GB",
  ]
