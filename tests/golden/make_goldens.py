"""Computes the logits the tests compare with, by transformers and torch.

Run it where torch, transformers, safetensors and tokenizers are installed
(none of the tests needs torch):

  python tests/golden/make_goldens.py

It writes `hf_logits.npz` beside itself: of every case `NAME/logits` (float32,
some rows and columns) and `NAME/top1` (the largest logit's index at every
position); of the demo model also the tokens, which are the first of its
calibration text.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))
DEMO = TESTS.parent / "fireq_jax" / "demo"
DEMO_TOKENS = 512


def hf_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
  """Returns float32 logits [T, V] of one sequence [1, T]."""
  import torch
  from transformers import LlamaForCausalLM

  model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens.astype(np.int64))).logits
  return logits[0].numpy()


def main() -> None:
  import tiny_llama
  from golden import cases
  from tokenizers import Tokenizer

  arrays = {}
  for name, case in cases.CASES.items():
    with tempfile.TemporaryDirectory() as folder:
      tiny_llama.write_checkpoint(
        Path(folder), case.hf_config(), case.tensors()
      )
      logits = hf_logits(Path(folder), case.tokens())
    arrays[f"{name}/logits"] = logits[-case.rows :, case.columns()]
    arrays[f"{name}/top1"] = logits.argmax(-1).astype(np.uint16)

  tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
  text = (DEMO / "calibration.txt").read_text()
  tokens = np.array([tokenizer.encode(text).ids[:DEMO_TOKENS]], np.uint16)
  logits = hf_logits(DEMO, tokens)
  arrays["demo/tokens"] = tokens
  arrays["demo/logits"] = logits[::8, ::64]
  arrays["demo/top1"] = logits.argmax(-1).astype(np.uint16)
  np.savez_compressed(cases.LOGITS, **arrays)
  print(cases.LOGITS, cases.LOGITS.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
