"""The scripts, called as functions and a few times as processes."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import eval_ppl
import generate
import inspect_ckpt
import numpy as np
import pytest
import quantize
import write_calibration
from command_line import arguments, digests, script, start

from fireq_jax import checkpoint, plan


def test_every_script_on_one_model(source, calib, tmp_path, capsys):
  out = tmp_path / "out"
  assert quantize.main(arguments(source, out, calib)) == 0
  printed = capsys.readouterr()
  assert printed.err == ""
  summary = dict(
    line.split(maxsplit=1) for line in printed.out.splitlines()[-5:]
  )
  assert summary["wrote"] == str(out)
  assert list(summary) == ["wrote", "size", "weight", "layers", "elapsed"]

  manifest = checkpoint.inspect(out, verify=True)
  assert manifest.recipe.name == "fireq"
  assert manifest.source == {
    name: digest
    for name, digest in digests(source).items()
    if name.endswith(".safetensors") or name in manifest.source
  }
  assert manifest.calibration["windows"] == 2
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  assert quantize.main(arguments(out, tmp_path / "again", calib)) == 2
  assert "quantised already" in capsys.readouterr().err

  prompt = ["--prompt=ab", "--max_new_tokens=5"]
  texts = []
  for ckpt in (out, out, source):
    assert generate.main(["generate.py", f"--ckpt={ckpt}", *prompt]) == 0
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1]
  flags = [*prompt, "--prefill_chunk=1", "--temperature=0"]
  assert generate.main(["generate.py", f"--ckpt={out}", *flags]) == 0
  texts.append(capsys.readouterr().out)
  assert all(text.startswith("ab") for text in texts)

  text = tmp_path / "text.txt"
  text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
  flags = [f"--text={text}", "--seq_len=32", "--num_windows=2"]
  flags += [f"--json={tmp_path / 'ppl.json'}", f"--plot={tmp_path / 'ppl.png'}"]
  assert (
    eval_ppl.main(["eval_ppl.py", f"--ckpt={source}", f"--ckpt={out}", *flags])
    == 0
  )
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert result == json.loads((tmp_path / "ppl.json").read_text())
  assert (tmp_path / "ppl.png").read_bytes().startswith(b"\x89PNG")
  assert (result["seq_len"], result["windows"]) == (32, 2)
  whole, quantized = result["rows"]
  assert whole["ppl"] == quantized["float_ppl"] > 1
  assert (whole["kl"], whole["top1"]) == (0, 1)
  assert quantized["kl"] > 0 and quantized["recipe"] == "fireq"

  assert (
    inspect_ckpt.main(["inspect_ckpt.py", f"--ckpt={out}", "--verify"]) == 0
  )
  assert "verified" in capsys.readouterr().out
  data = max((out / "state").rglob("*"), key=lambda p: p.stat().st_size)
  damaged = bytearray(data.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  data.write_bytes(damaged)
  inspect = ["inspect_ckpt.py", f"--ckpt={out}"]
  assert inspect_ckpt.main([*inspect, "--verify"]) == 2
  assert capsys.readouterr().err.startswith("error: ")


def test_a_model_writes_its_own_calibration(source, calib, tmp_path, capsys):
  written, out = tmp_path / "written.npy", tmp_path / "out"
  command = ["x.py", f"--ckpt={source}", f"--out={written}"]
  flags = ["--num_windows=3", "--seq_len=32", "--batch=2"]
  assert write_calibration.main([*command, *flags]) == 0
  assert np.load(written).shape == (3, 32)
  assert write_calibration.main([*command, *flags]) == 2
  assert "new .npy" in capsys.readouterr().err
  assert not list(tmp_path.glob(".written*"))
  more = [f"--calib={written}", "--num_calib=99"]
  assert quantize.main(arguments(source, out, calib, *more)) == 0
  manifest = checkpoint.inspect(out)
  # Both files: 200 // 32 windows, and those written.
  assert manifest.calibration["windows"] == 6 + 3
  assert manifest.calibration["file"] == "tokens.npy written.npy"


def test_dry_run_prints_the_plan_and_writes_nothing(
  source, calib, tmp_path, capsys
):
  before = sorted(tmp_path.iterdir())
  out = tmp_path / "out"
  assert quantize.main(arguments(source, out, calib, "--dry_run")) == 0
  printed = capsys.readouterr().out
  for word in ("layers", "weights in", "weights out", "peak memory", "disk"):
    assert word in printed
  assert sorted(tmp_path.iterdir()) == before


def test_default_output_and_overwrite(source, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  command = ["quantize.py", f"--ckpt={source}", "--recipe=w4a16"]
  assert quantize.main(command) == 0
  out = tmp_path / "source-w4a16"
  first = checkpoint.inspect(out)
  assert first.recipe.name == "w4a16" and not first.calibration
  assert quantize.main(command) == 2
  assert "--overwrite" in capsys.readouterr().err
  assert quantize.main([*command, "--overwrite", "--noverify"]) == 0
  assert checkpoint.inspect(out, verify=True).leaves == first.leaves


# name -> flag ({t}: a folder, {s}: the model), content of the file it names,
# words of the message. Each ends with code 2 before a weight is read.
BAD = {
  "no such flag": ("--nonsense", None, "nonsense"),
  "an argument": ("more", None, "unexpected argument"),
  "bad number": ("--num_calib=many", None, "num_calib"),
  "zero windows": ("--num_calib=0", None, "num_calib"),
  "absent model": ("--ckpt={t}/no", None, "no"),
  "no model there": ("--ckpt={t}", None, "safetensors"),
  "recipe name": ("--recipe=firq", None, "did you mean 'fireq'"),
  "recipe file": (
    "--recipe={t}/file",
    b"name: x\nwieght: {}",
    "did you mean 'weight'",
  ),
  "group": ("--recipe={t}/file", b"name: x\nweight: {group: 100}", "group"),
  "out is a file": ("--out={t}/file", b"x", "destination is a file"),
  "out has files": ("--out={t}", None, "never overwritten"),
  "out is the source": ("--out={s}", None, "never overwritten"),
  "out in the source": ("--out={s}/q", None, "overlap"),
  "out is remote": ("--out=gs://bucket/x", None, "local"),
  "no calibration": ("--calib={t}/no.txt", None, "no.txt"),
  "empty calibration": ("--calib={t}/file", b"", "no tokens"),
  "short calibration": ("--calib={t}/file", b"abc", "too little"),
  "not UTF-8": ("--calib={t}/file", b"abc\nd\xff", "line 2"),
  "bad line": (
    "--calib={t}/file.jsonl",
    b'{"text": "a"}\n{"txt": "b"}',
    "line 2",
  ),
  "token too large": ("--calib={t}/file.npy", [1, 2, 320], "position 2"),
  "token negative": ("--calib={t}/file.npy", [1, -2], "position 1"),
  "window too long": ("--seq_len=4096", None, "at most 2048"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, source, calib, tmp_path, capsys):
  flag, content, says = BAD[name]
  out = tmp_path / "out"
  flag = flag.format(t=tmp_path, s=source)
  path = Path(flag.partition("=")[2])
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content:
    np.save(path, content)
  before = digests(tmp_path)
  assert quantize.main(arguments(source, out, calib, flag)) == 2
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1 and error[0].startswith("error: "), error
  assert says in error[0]
  assert not out.exists() and digests(tmp_path) == before


def test_missing_flag(capsys):
  assert quantize.main(["quantize.py"]) == 2
  error = capsys.readouterr().err
  assert "ckpt" in error and error.count("\n") == 1


@pytest.mark.parametrize(
  "script", [quantize, generate, eval_ppl, inspect_ckpt, write_calibration]
)
def test_help(script, capsys):
  assert script.main(["x.py", "--help"]) == 0
  printed = capsys.readouterr().out
  assert "--ckpt" in printed and script.__doc__.splitlines()[0] in printed


BAD_OUTPUTS = {
  "no folder": ("{t}/no/x.npy", 2, "no such folder"),
  "is a folder": ("{t}/folder.npy", 2, "folder"),
  "not writable": ("{t}/locked/x.npy", 3, "no permission"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
@pytest.mark.parametrize("script", [eval_ppl, write_calibration])
def test_outputs_are_checked_before_work(
  name, script, tmp_path, monkeypatch, capsys
):
  path, code, says = BAD_OUTPUTS[name]
  (tmp_path / "locked").mkdir()
  (tmp_path / "folder.npy").mkdir()
  monkeypatch.setattr(
    os, "access", lambda path, mode: "locked" not in str(path)
  )
  path = path.format(t=tmp_path)
  arguments = {
    eval_ppl: ["--text=none", f"--json={path}"],
    write_calibration: [f"--out={path}"],
  }[script]
  assert script.main(["x.py", "--ckpt=none", *arguments]) == code
  assert says in capsys.readouterr().err


def test_a_plot_needs_matplotlib_before_work(tmp_path, monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name, *args: None if name == "matplotlib" else find(name, *args),
  )
  command = ["x.py", "--ckpt=none", "--text=none", f"--plot={tmp_path / 'x'}"]
  assert eval_ppl.main(command) == 3
  assert "matplotlib" in capsys.readouterr().err


def test_tokenizer_is_needed_for_text_only(
  make_hf_checkpoint, calib, tmp_path, capsys
):
  bare = make_hf_checkpoint("bare")
  out = tmp_path / "out"
  text = tmp_path / "c.txt"
  text.write_text("some text")
  assert quantize.main(arguments(bare, out, text)) == 2
  assert "tokenizer" in capsys.readouterr().err
  assert quantize.main(arguments(bare, out, calib)) == 0
  assert generate.main(["generate.py", f"--ckpt={out}", "--prompt=a"]) == 2
  assert "no tokenizer.json" in capsys.readouterr().err


def test_generate_refuses(source, capsys):
  base = ["generate.py", f"--ckpt={source}"]
  for flags, says in (
    ([], "--prompt"),
    (["--prompt=a", "--chat"], "--prompt"),
    (["--prompt=a", "--temperature=-1"], "temperature"),
    (["--prompt=a", "--top_p=0"], "top_p"),
    (["--prompt=a", "--top_k=1000"], "top_k"),
    (["--prompt=a", "--prefill_chunk=0"], "prefill_chunk"),
    (["--prompt=a", "--max_new_tokens=5000"], ""),
  ):
    assert generate.main([*base, *flags]) == 2
    printed = capsys.readouterr()
    error = printed.err.splitlines()
    assert len(error) == 1 and says in error[0], error
    assert printed.out == ""


def test_chat(make_hf_checkpoint, monkeypatch, capsys):
  folder = make_hf_checkpoint(tokenizer=True)
  base = ["generate.py", f"--ckpt={folder}", "--chat", "--max_new_tokens=4"]
  lines = iter(["hi\n", "ho\n", ""])
  monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
  assert generate.main(base) == 2
  assert "no chat template" in capsys.readouterr().err
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  settings["chat_template"] = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
  )
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  lines = iter(["hi\n", "ho\n", ""])
  assert generate.main(base) == 0
  assert capsys.readouterr().out.count("\n") >= 2


def test_debug_shows_the_traceback(tmp_path, capsys):
  command = ["inspect_ckpt.py", f"--ckpt={tmp_path}", "--debug"]
  assert inspect_ckpt.main(command) == 2
  assert "Traceback" in capsys.readouterr().err


def test_machine_too_small(source, calib, tmp_path, monkeypatch, capsys):
  command = arguments(source, tmp_path / "out", calib)
  monkeypatch.setattr(plan, "available_memory", lambda: 1000)
  assert quantize.main(command) == 3
  assert "expected" in capsys.readouterr().err
  monkeypatch.undo()
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  assert quantize.main(command) == 3
  assert "disk space" in capsys.readouterr().err


def test_an_error_is_the_exit_code_of_a_process(tmp_path):
  child = start([script("inspect_ckpt.py"), f"--ckpt={tmp_path}"])
  _, errors = child.communicate(timeout=60)
  assert child.returncode == 2 and errors.count("\n") == 1
