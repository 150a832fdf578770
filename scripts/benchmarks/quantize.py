"""Seconds and peak memory of quantising a random Llama, end to end.

Writes a randomly initialised Hugging Face folder of the named shape, then
runs scripts/quantize.py on it in a process of its own.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from benchmarks import common
from fireq_jax.config import LlamaConfig
from fireq_jax.errors import ResourceError


def define_flags(values: flags.FlagValues) -> None:
  common.define_model_flags(values, recipe="fireq")
  flags.DEFINE_integer(
    "layers",
    None,
    "This many; default: those of the model.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "dir",
    None,
    "Work here (needs 1.5 times the model's size); None = a temporary folder.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_calib", 16, "Calibration sequences.", flag_values=values
  )
  flags.DEFINE_integer(
    "seq_len", 512, "Tokens of a calibration sequence.", flag_values=values
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  config = hf_config(common.MODELS[values.model])
  if values.layers:
    config["num_hidden_layers"] = values.layers
  with tempfile.TemporaryDirectory(dir=values.dir) as work:
    source, out = Path(work, "source"), Path(work, "out")
    # The peak memory of a process counts that of the one which started it.
    common.isolated(write_random_model, source, config, timeout_s=600)
    tokens = np.random.default_rng(1).integers(
      0, config["vocab_size"], (values.num_calib, values.seq_len), np.int32
    )
    np.save(Path(work, "tokens.npy"), tokens)
    start = time.perf_counter()
    command = [
      sys.executable,
      Path(__file__).parents[1] / "quantize.py",
      f"--ckpt={source}",
      f"--out={out}",
      f"--recipe={values.recipe}",
      f"--calib={Path(work, 'tokens.npy')}",
      f"--num_calib={values.num_calib}",
      f"--seq_len={values.seq_len}",
    ]
    code, printed, peak = _run(command)
    seconds = time.perf_counter() - start
    print(printed, file=sys.stderr)
    if code:
      raise ResourceError("scripts/quantize.py failed", got=printed[-500:])
    yield {
      "model": values.model,
      "layers": config["num_hidden_layers"],
      "recipe": values.recipe,
      "seconds": round(seconds, 1),
      "peak_rss_bytes": peak,
      "bytes_in": _folder_bytes(source),
      "bytes_out": _folder_bytes(out),
      "num_calib": values.num_calib,
      "seq_len": values.seq_len,
    }


def _run(command: Sequence[str | Path]) -> tuple[int, str, int]:
  """Exit code, standard output and peak memory in bytes of a process."""
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout is not None
      printed = process.stdout.read()
      _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
      process.kill()
      raise
    process.returncode = os.waitstatus_to_exitcode(status)
  return process.returncode, printed, usage.ru_maxrss * 1024


def hf_config(config: LlamaConfig) -> dict:
  """The `config.json` of a model."""
  values = dataclasses.asdict(config)
  other = ("rope", "bos_token_id", "eos_token_ids")
  return {name: x for name, x in values.items() if name not in other} | {
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": config.rope.theta,
    "torch_dtype": "bfloat16",
  }


def _folder_bytes(folder: Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def write_random_model(folder: Path, config: dict, seed: int = 0) -> None:
  """Writes a sharded bf16 checkpoint with weights ~ N(0, 0.02)."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  parts = list(_parts(config))

  def write(i: int) -> tuple[dict[str, str], int]:
    rng = np.random.default_rng((seed, i))
    tensors = {
      name: _random(rng, shape).astype(ml_dtypes.bfloat16)
      for name, shape in parts[i].items()
    }
    file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
    save_file(tensors, folder / file)
    size = sum(t.nbytes for t in tensors.values())
    return dict.fromkeys(tensors, file), size

  weight_map, total = {}, 0
  with ThreadPoolExecutor() as pool:
    for names, size in pool.map(write, range(len(parts))):
      weight_map |= names
      total += size
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
  )


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  if len(shape) == 1:  # norms
    return np.ones(shape, np.float32)
  return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def _parts(c: dict) -> Iterable[dict[str, tuple[int, ...]]]:
  """Tensor shapes of each shard: the embedding, every layer, the head."""
  d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
  h = c["head_dim"]
  q, k = c["num_attention_heads"] * h, c["num_key_value_heads"] * h
  yield {"model.embed_tokens.weight": (v, d)}
  for i in range(c["num_hidden_layers"]):
    p = f"model.layers.{i}."
    yield {
      p + "input_layernorm.weight": (d,),
      p + "self_attn.q_proj.weight": (q, d),
      p + "self_attn.k_proj.weight": (k, d),
      p + "self_attn.v_proj.weight": (k, d),
      p + "self_attn.o_proj.weight": (d, q),
      p + "post_attention_layernorm.weight": (d,),
      p + "mlp.gate_proj.weight": (f, d),
      p + "mlp.up_proj.weight": (f, d),
      p + "mlp.down_proj.weight": (d, f),
    }
  last: dict[str, tuple[int, ...]] = {"model.norm.weight": (d,)}
  if not c["tie_word_embeddings"]:
    last["lm_head.weight"] = (v, d)
  yield last
