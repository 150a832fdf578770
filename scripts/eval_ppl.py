"""Perplexity on a text; several models stand beside the first.

  python scripts/eval_ppl.py --ckpt DIR --ckpt QUANTISED --text wiki.test.txt

The first --ckpt (say, the Hugging Face folder) is the reference for the KL
divergence and the agreement of the likeliest token. Last line: JSON, which
--json writes to a file as well.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from benchmarks import common
from tqdm import tqdm

import fireq_jax
from fireq_jax import cli
from fireq_jax.checkpoint import Checkpoint
from fireq_jax.errors import DataError
from fireq_jax.evaluate import PROTOCOL, cut_text, evaluate
from fireq_jax.loading import load_model
from fireq_jax.prepare import prepare
from fireq_jax.tokenizer import Tokenizer


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_multi_string(
    "ckpt", None, "Model folder; repeatable.", required=True, **define
  )
  flags.DEFINE_string("text", None, "UTF-8 text.", required=True, **define)
  flags.DEFINE_integer(
    "seq_len", 2048, "Tokens of a window.", lower_bound=2, **define
  )
  flags.DEFINE_integer(
    "num_windows", None, "At most; default: all.", lower_bound=1, **define
  )
  common.define_report_flags(values)


def run(values: flags.FlagValues) -> None:
  common.check_report_flags(values)
  text = read_text(Path(values.text))
  models = [load_prepared(ckpt) for ckpt in values.ckpt]
  vocab_sizes = {model.config.vocab_size for model in models}
  if len(vocab_sizes) > 1:
    raise DataError(
      "the models have different vocabularies", got=sorted(vocab_sizes)
    )
  limit = min(model.config.max_position_embeddings for model in models)
  if values.seq_len > limit:
    raise DataError(
      "seq_len is beyond the model's positions",
      expected=f"at most {limit}",
      got=values.seq_len,
    )
  tokenizer = Tokenizer(models[0].path, *vocab_sizes)
  windows = cut_text(
    tokenizer.encode(text), length=values.seq_len, count=values.num_windows
  )
  print(f"{PROTOCOL}; {len(windows)} windows of {values.seq_len} tokens")
  with tqdm(total=len(windows), unit="window", disable=None) as bar:
    scores = evaluate(models, windows, on_window=bar.update)
  rows = [
    {
      "model": Path(ckpt).name,
      "text": Path(values.text).name,
      "recipe": model.recipe.name,
      "kv": model.recipe.kv.cache,
      "ppl": round(score.ppl, 4),
      "float_ppl": round(scores[0].ppl, 4),
      "kl": round(score.kl, 6),
      "top1": round(score.top1, 5),
      "seconds": round(score.seconds, 1),
    }
    for ckpt, model, score in zip(values.ckpt, models, scores)
  ]
  print(f"{'ppl':>10} {'kl':>8} {'top-1':>7} {'kv':>5}  model (recipe)")
  for row in rows:
    print(
      f"{row['ppl']:10.4f} {row['kl']:8.4f} {row['top1']:7.2%} {row['kv']:>5}"
      f"  {row['model']} ({row['recipe']})"
    )
  report = {
    "card": jax.devices()[0].device_kind,
    "date": datetime.date.today().isoformat(),
    "versions": {"fireq_jax": fireq_jax.__version__, "jax": jax.__version__},
    "protocol": PROTOCOL,
    "seq_len": values.seq_len,
    "windows": len(windows),
    "rows": rows,
  }
  if values.json:
    Path(values.json).write_text(json.dumps(report, indent=1) + "\n")
  if values.plot:
    common.save_plot(plot, rows, Path(values.plot), Path(values.text).name)
  print(json.dumps(report))


def plot(rows: Sequence[dict], figure) -> None:
  """Perplexity and KL divergence, a bar for each model."""
  labels = [f"{row['model']}\n{row['recipe']}, kv {row['kv']}" for row in rows]
  names = {"ppl": "perplexity", "kl": "KL divergence from the first, nats"}
  for axes, (name, label) in zip(
    figure.subplots(1, 2, sharey=True), names.items()
  ):
    bars = axes.barh(labels, [row[name] for row in rows])
    axes.bar_label(bars, fmt="%.4g", padding=2)
    axes.margins(x=0.2)
    axes.set_xlabel(label)
  figure.axes[0].invert_yaxis()


def load_prepared(ckpt: str) -> Checkpoint:
  """A model with the execution parameters that generation uses."""
  model = load_model(ckpt)
  return dataclasses.replace(model, params=prepare(model.params, donate=True))


def read_text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except FileNotFoundError as error:
    raise DataError("no such text", where=path) from error
  except UnicodeDecodeError as error:
    raise DataError("not UTF-8", where=path) from error


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
