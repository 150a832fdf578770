"""What the documents name exists."""

import importlib
import json
import re

import pytest
from absl import flags
from benchmarks import common
from command_line import ROOT, script, start

from fireq_jax import checkpoint

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
  links = re.findall(r"\]\(([^)#]+)", document.read_text())
  for link in links:
    if not link.startswith("https://"):
      assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_have_the_flags_they_name(document):
  text = document.read_text().replace("\\\n", " ")
  for name, rest in re.findall(r"scripts/(\w+)\.py([^`\n]*)", text):
    known = flags.FlagValues()
    if name == "bench":
      common.define_report_flags(known)
      words = rest.split()
      name = f"benchmarks.{words[0]}" if words else None
    if name in (None, "lm_eval_adapter"):  # an optional extra
      continue
    importlib.import_module(name).define_flags(known)
    for flag in re.findall(r"--(\w+)", rest.split("&&")[0]):
      assert flag in known, f"{name} --{flag}"


@pytest.mark.parametrize(
  "file", sorted(ROOT.glob("docs/results/*.json")), ids=lambda path: path.name
)
def test_results_say_how_they_were_measured(file):
  found = json.loads(file.read_text())
  for report in found if isinstance(found, list) else [found]:
    assert {"card", "date", "versions", "command", "rows"} <= report.keys()
    assert report["rows"] and report["versions"]["jax"]


def test_readme(tmp_path):
  """Its first command, and what it shows in Python, as processes."""
  child = start(
    [script("quantize.py"), "--ckpt=demo", "--seq_len=64"], cwd=tmp_path
  )
  _, errors = child.communicate(timeout=300)
  assert child.returncode == 0 and errors == ""
  manifest = checkpoint.inspect(tmp_path / "demo-fireq")
  assert manifest.config.vocab_size == 4096
  examples = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
  )
  assert len(examples) == 4
  child = start(["-c", "\n".join(examples)], cwd=tmp_path)
  printed, errors = child.communicate(timeout=300)
  assert child.returncode == 0, errors
  assert len(printed.split()) > 50
  made = checkpoint.inspect(tmp_path / "demo-w4a16", verify=True)
  assert made.recipe.name == "w4a16"
