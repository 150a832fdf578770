"""Perplexity of every recipe.

Each model is quantised in memory with each recipe and scored against its float
self on each text, in the same process and on the same windows. Outliers are
injected into the float model first where asked for, which changes no float
result (`fireq_jax/outliers.py`).
"""

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import flags

from fireq_jax import calibrate, outliers, pipeline, recipe
from fireq_jax.checkpoint import Checkpoint
from fireq_jax.config import KVFormat
from fireq_jax.evaluate import cut_text, evaluate
from fireq_jax.loading import load_model
from fireq_jax.selftext import write_windows
from fireq_jax.tokenizer import Tokenizer


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_multi_string(
    "ckpt", None, "Hugging Face folders.", required=True, **define
  )
  flags.DEFINE_multi_string("text", None, "Texts.", required=True, **define)
  flags.DEFINE_multi_string(
    "calib", [], "Calibration data besides what the model writes.", **define
  )
  flags.DEFINE_multi_string(
    "recipe", recipe.presets(), "Recipes; default: all presets.", **define
  )
  flags.DEFINE_multi_float(
    "outliers", [1.0], "Factors of injected outliers; 1: none.", **define
  )
  flags.DEFINE_bool(
    "kv_off", False, "Score each with its KV format off as well.", **define
  )
  flags.DEFINE_integer("num_windows", 200, "Of each text.", **define)
  flags.DEFINE_integer("seq_len", 512, "Tokens of a window.", **define)
  flags.DEFINE_integer("num_calib", 128, "Calibration windows.", **define)
  flags.DEFINE_integer(
    "num_written", 0, "More of them, written by the model itself.", **define
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  for ckpt in values.ckpt:
    model = load_model(ckpt)
    tokenizer = Tokenizer(model.path, model.config.vocab_size)
    calibration = _calibration(model, tokenizer, values)
    texts = {
      Path(text).name: cut_text(
        tokenizer.encode(Path(text).read_text()),
        length=values.seq_len,
        count=values.num_windows,
      )
      for text in values.text
    }
    for factor in values.outliers:
      made = list(_variants(model, values, calibration, factor))
      variants = [variant for variant, _ in made]
      for text, windows in texts.items():
        exact, *scores = evaluate([model, *variants], windows)
        for (variant, took), score in zip(made, scores):
          yield {
            "model": Path(ckpt).name,
            "text": text,
            "recipe": variant.recipe.name,
            "kv": variant.recipe.kv.cache,
            "outliers": factor,
            "ppl": round(score.ppl, 3),
            "float_ppl": round(exact.ppl, 3),
            "kl": round(score.kl, 5),
            "top1": round(score.top1, 4),
            "seconds": round(score.seconds, 1),
            "quantize_seconds": round(took, 1),
            "windows": len(windows),
            "seq_len": values.seq_len,
          }


def _calibration(
  model: Checkpoint, tokenizer: Tokenizer, values: flags.FlagValues
) -> np.ndarray | None:
  """Windows of the given files and of what the model writes, or None."""
  parts = []
  if values.calib:
    texts = [
      calibrate.read_tokens(
        path, vocab_size=model.config.vocab_size, encode=tokenizer.encode
      )
      for path in values.calib
    ]
    parts.append(
      calibrate.cut_windows(
        *texts, count=values.num_calib, length=values.seq_len
      )
    )
  if values.num_written:
    parts.append(
      write_windows(model, count=values.num_written, length=values.seq_len)
    )
  return np.concatenate(parts) if parts else None


def _variants(
  model: Checkpoint,
  values: flags.FlagValues,
  tokens: np.ndarray | None,
  factor: float,
) -> Iterable[tuple[Checkpoint, float]]:
  """Each recipe with its KV format, and without where that is asked for; and
  the seconds that quantising took."""
  params = model.params
  if factor != 1:
    params = outliers.inject(params, model.config, factor=factor)
  for name in values.recipe:
    steps = recipe.load(name)
    start = time.perf_counter()
    quantized = pipeline.quantize_model(
      pipeline.Source.from_params(params), model.config, steps, tokens
    )
    took = time.perf_counter() - start
    changed = dataclasses.replace(model, params=quantized, recipe=steps)
    yield changed, took
    has_both = steps.kv.cache != "bf16" and steps.weight is not None
    if values.kv_off and has_both:
      plain = dataclasses.replace(steps, kv=KVFormat())
      yield dataclasses.replace(changed, recipe=plain), took


def plot(rows: list[dict], axes) -> None:
  """Perplexity lost against float, a bar for each recipe and KV format."""
  labels = list(dict.fromkeys(f"{r['recipe']}, kv {r['kv']}" for r in rows))
  series = list(
    dict.fromkeys((r["model"], r["text"], r["outliers"]) for r in rows)
  )
  width = 0.8 / len(series)
  for i, (model, text, factor) in enumerate(series):
    lost = {
      f"{r['recipe']}, kv {r['kv']}": r["ppl"] - r["float_ppl"]
      for r in rows
      if (r["model"], r["text"], r["outliers"]) == (model, text, factor)
    }
    axes.barh(
      np.arange(len(lost)) + i * width,
      [lost[label] for label in labels],
      width,
      label=f"{model}, {text}"
      + (f", outliers x{factor:g}" if factor != 1 else ""),
    )
  axes.set_yticks(np.arange(len(labels)) + 0.4 - width / 2, labels)
  axes.set_xlabel("perplexity above float")
  axes.legend()
