"""The benchmarks' shared parts, and those that run anywhere."""

import json
import time
from pathlib import Path

import bench
import numpy as np
import pytest
from benchmarks import common

from fireq_jax.errors import ResourceError

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
  flags = ["--seq_len=32", "--num_windows=2", "--outliers=8"]
  recipes = ["--recipe=kv4-only", "--recipe=fireq", "--recipe=none"]
  more = [f"--calib={text}", f"--plot={plot}"]
  assert bench.main([*command, *flags, *recipes, *more]) == 0
  rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
  assert [(r["recipe"], r["kv"], r["outliers"]) for r in rows] == [
    ("none", "bf16", 8),
    ("kv4-only", "int4", 8),
    ("fireq", "int4", 8),
    ("fireq", "bf16", 8),
  ]
  # Outliers change no float result.
  np.testing.assert_allclose(rows[0]["ppl"], rows[0]["float_ppl"], rtol=0.02)
  assert rows[0]["kl"] < 1e-3 < rows[2]["kl"]
  assert plot.read_bytes().startswith(b"\x89PNG")


def test_unknown_name(capsys):
  assert bench.main(["bench.py", "nothing"]) == 2
  assert "accuracy" in capsys.readouterr().err


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
