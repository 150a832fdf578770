"""The benchmarks' shared parts, and those that run anywhere."""

import dataclasses
import importlib
import json
import threading
import time
from pathlib import Path

import bench
import jax
import numpy as np
import pytest
from benchmarks import common

from fireq_jax import pipeline, recipe
from fireq_jax.errors import ConfigError, ResourceError
from fireq_jax.loading import load_model
from fireq_jax.pallas import tunings
from fireq_jax.prepare import prepare

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def importable_by_children(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'scripts'}")


def test_quantize(tmp_path, capsys):
  report = tmp_path / "report.json"
  command = ["bench.py", "quantize", "--model=tiny", f"--json={report}"]
  assert bench.main([*command, "--num_calib=2", "--seq_len=32"]) == 0
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert last == json.loads(report.read_text())
  assert last["card"] == "cpu"
  assert last["command"] == (
    "python scripts/bench.py quantize --model=tiny --num_calib=2 --seq_len=32"
  )
  (row,) = last["rows"]
  assert row["seconds"] > 0 and row["peak_rss_bytes"] > 1e8
  assert row["bytes_out"] < row["bytes_in"]


def test_accuracy(make_hf_checkpoint, tmp_path, capsys):
  model = make_hf_checkpoint(tokenizer=True, num_hidden_layers=1)
  text = tmp_path / "text.txt"
  text.write_text("All work and no play makes Jack a dull boy. " * 8)
  plot = tmp_path / "plot.png"
  command = ["bench.py", "accuracy", f"--ckpt={model}", f"--text={text}"]
  flags = ["--seq_len=32", "--num_windows=2", "--outliers=8", "--kv_off"]
  recipes = ["--recipe=kv4-only", "--recipe=fireq", "--recipe=none"]
  more = [f"--calib={text}", "--num_written=2", f"--plot={plot}"]
  assert bench.main([*command, *flags, *recipes, *more]) == 0
  rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
  assert [(r["recipe"], r["kv"], r["outliers"]) for r in rows] == [
    ("kv4-only", "int4", 8),
    ("fireq", "int4", 8),
    ("fireq", "bf16", 8),
    ("none", "bf16", 8),
  ]
  # Outliers change no float result.
  np.testing.assert_allclose(rows[3]["ppl"], rows[3]["float_ppl"], rtol=0.02)
  assert rows[3]["kl"] < 1e-3 < rows[1]["kl"]
  assert plot.read_bytes().startswith(b"\x89PNG")


def test_unknown_name(capsys):
  assert bench.main(["bench.py", "nothing"]) == 2
  assert "accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("command", "says"),
  [
    (["gemm"], "need a GPU"),
    (["layer"], "need a GPU"),
    (["generate", "--decode=1x2x3"], "expected batch x context"),
    (["generate", "--prefill=axb"], "got 'axb'"),
    (["quantize", "--plot=x.png"], "no plot"),
    (["quantize", "--json=no/x.json"], "no such folder"),
  ],
)
def test_refused_before_work(command, says, capsys):
  assert bench.main(["bench.py", *command]) in (2, 3)
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1 and says in error[0], error


def test_names():
  assert common.names(["b"], ["a", "b"]) == ["b"]
  with pytest.raises(ConfigError, match="unknown name 'c'"):
    common.names(["a", "c"], ["a", "b"])


def test_tuning_the_matmul_writes_a_table_it_can_read(
  tmp_path, monkeypatch, capsys
):
  """With one time in place of a card's clock."""
  import tune_int4_matmul as tune

  out = tmp_path / "tunings.json"
  assert tune.main(["tune.py", f"--out={out}"]) == 3
  assert "need a GPU" in capsys.readouterr().err and not out.exists()
  monkeypatch.setattr(tune, "require_hopper", lambda: None)
  monkeypatch.setattr(tune, "_us", lambda *args: tune.CALL_US + 6.4)
  assert tune.main(["tune.py", f"--out={out}"]) == 0
  known = tunings.table()
  rows = json.loads(out.read_text())["rows"]
  assert [
    tunings.Tuning(**{k: v for k, v in row.items() if k != "ns"})
    for row in rows
  ] == [tuning for tuning, _ in known]
  for row, (tuning, ns) in zip(rows, known):
    blocks = 64 if tuning.split == 1 else 16
    each = round((6400 - tunings.cluster_ns(tuning)) / blocks)
    assert row["ns"] == dict.fromkeys(ns, each)


def test_table():
  text = common.table(
    [{"n": 1, "us": 3.14159, "baselines": {"xla": 2.0}}, {"n": 100}]
  )
  assert text.splitlines() == [
    "  n     us  baselines.xla",
    "  1  3.142              2",
    "100      -              -",
  ]


def test_isolated():
  assert common.isolated(divmod, 7, 2, timeout_s=60) == (3, 1)
  with pytest.raises(ResourceError, match="ZeroDivisionError"):
    common.isolated(divmod, 7, 0, timeout_s=60)
  with pytest.raises(ResourceError, match="longer than 1 s"):
    common.isolated(time.sleep, 1000, timeout_s=1)


def test_measurements_take_turns():
  entered = threading.Event()

  def measure():
    with common.turn():
      entered.set()

  other = threading.Thread(target=measure)
  with common.turn():
    other.start()
    assert not entered.wait(0.5)
  assert entered.wait(60)
  other.join()


def test_layer_and_ffn_measure_what_they_say(monkeypatch):
  """With calls counted in place of a card's clock."""
  from benchmarks import ffn, generate, layer

  def call(function, sets, **_):
    for operands in sets:
      jax.block_until_ready(jax.jit(function)(*operands))
    return 1000.0 * len(sets)

  monkeypatch.setattr(common, "device_us", call)
  monkeypatch.setattr(ffn, "copies", lambda _: 2)
  row = ffn.measure("tiny", 3)
  hidden, width = 256, 512
  assert row["us"] == row["baselines"]["xla_bf16"] == 2000
  assert row["tflops"] == 3 * 2 * 3 * hidden * width / 2000 / 1e6

  # Kernels of a step, 5 us each; a layer has four.
  few_and_many = iter([12, 20])
  monkeypatch.setattr(
    common,
    "kernel_times",
    lambda loop, sets: 3 * [layer.STEPS * next(few_and_many) * [("k", 5.0)]],
  )
  row = layer.measure("tiny", "fireq", 2, 1, 32)
  assert row["us"] == 20
  config = common.MODELS["tiny"]
  assert config.num_hidden_layers == 2
  codes = (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512) // 2
  cache = 2 * 32 * 2 * (128 // 2 + 1)
  floor = (codes + cache) / generate.COPY_BYTES_PER_SECOND * 1e6
  assert floor < row["byte_floor_us"] < 1.1 * floor
  assert row["launches"] == 4


def test_generate_times_calls_and_counts_bytes(monkeypatch):
  from benchmarks import generate

  run = generate._Run("tiny", "fireq", 2, 24, 4, None)
  assert run.call(2) > 0
  seconds = {generate.FEW: 1.0, generate.MANY: 1.0 + generate.MANY}
  monkeypatch.setattr(run, "call", seconds.get)
  assert run.step_seconds() == generate.MANY / (generate.MANY - generate.FEW)
  layers = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512) // 2
  floats = 2 * 512 * 256 * 2
  needed = run.bytes()
  assert layers + floats < needed["weight_bytes"] < 1.05 * (layers + floats)
  assert needed["cache_bytes"] == 2 * 32 * 2 * 2 * (128 // 2 + 1)


def test_first_call_is_cached(tmp_path):
  from benchmarks import generate

  args = "tiny", "none", 1, 16, str(tmp_path)
  assert generate.first_call_seconds(*args) > 0
  assert any(tmp_path.iterdir())


def prepared_demo(name):
  """The demo model, quantised by a recipe and prepared."""
  model = load_model("demo")
  steps = recipe.load(name)
  calibration = np.random.default_rng(1).integers(0, 4096, (8, 128), np.int32)
  params = pipeline.quantize_model(
    pipeline.Source.from_params(model.params), model.config, steps, calibration
  )
  params = prepare(jax.device_put(params))
  return dataclasses.replace(model, params=params, recipe=steps)


def test_agreement_of_plain_jax_with_itself():
  from benchmarks import agreement

  windows = np.random.default_rng(0).integers(0, 4096, (2, 32), np.int32)
  rows = list(agreement.compare(prepared_demo("w4a16"), windows))
  assert [row["tokens"] for row in rows] == [62, 30]
  for row in rows:
    assert row["top1"] == 1 and row["ppl_change"] == 0
    assert 0 < row["kl"] == row["reference_kl"] < 0.1
    assert row["control_top1"] > 0.8


@pytest.mark.gpu
def test_kernels_agree_as_plain_jax_agrees_with_itself():
  from benchmarks import agreement

  from fireq_jax.evaluate import cut_text
  from fireq_jax.tokenizer import Tokenizer

  model = prepared_demo("fireq")
  text = (model.path / "calibration.txt").read_text()
  tokens = Tokenizer(model.path, model.config.vocab_size).encode(text)
  windows = cut_text(tokens, length=256)
  for row in agreement.compare(model, windows):
    assert 1 - row["top1"] < 1.3 * (1 - row["control_top1"]) + 0.01
    assert row["kl"] < 1.3 * row["reference_kl"]
    # Half a percent, and what noise alone does to so short a text.
    noise = abs(row["control_ppl_change"])
    assert abs(row["ppl_change"]) < 0.005 + noise


@pytest.mark.parametrize(
  ("name", "rows"),
  [
    (
      "generate",
      [
        {
          "model": "tiny",
          "recipe": "none",
          "batch": 2,
          "context": 64,
          "tokens_per_s": 100.0,
          "byte_floor_ms": 3.0,
        },
        {
          "model": "tiny",
          "recipe": "none",
          "batch": 2,
          "prompt": 64,
          "prefill_tokens_per_s": 1000.0,
        },
        {"first_call_s": 3.0},
      ],
    ),
    (
      "layer",
      [
        {
          "batch": 1,
          "tokens": 1,
          "context": 64,
          "us": 3.0,
          "byte_floor_us": 1.0,
        }
      ],
    ),
    (
      "ffn",
      [
        {
          "model": "tiny",
          "tokens": 16,
          "us": 3.0,
          "baselines": {"xla_bf16": 9.0},
        }
      ],
    ),
  ],
)
def test_plots(name, rows, tmp_path):
  module = importlib.import_module(f"benchmarks.{name}")
  draw = lambda rows, figure: module.plot(rows, figure.subplots())
  common.save_plot(draw, rows, tmp_path / "plot.png", name)
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
