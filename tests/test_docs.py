"""What the documents name exists."""

import importlib
import json
import re
from pathlib import Path

import pytest
from absl import flags
from benchmarks import common

ROOT = Path(__file__).parent.parent
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
