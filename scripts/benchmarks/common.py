"""What all benchmarks share: timing, isolation, tables, reports, plots.

A benchmark is a module with
  define_flags(values)        its absl flags,
  run(values) -> Iterable     one flat or nested dict a row, as measured,
  plot(rows, axes)            optional: draws the rows on matplotlib axes,
  NEEDS_HOPPER = True         optional: without such a card there is no run.
"""

import contextlib
import datetime
import fcntl
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import flags

import fireq_jax
from fireq_jax import cli
from fireq_jax.config import LlamaConfig, RopeConfig
from fireq_jax.errors import ConfigError, ResourceError
from fireq_jax.pallas.device import require_hopper

Row = dict[str, Any]


def main(benchmark: ModuleType, argv: Sequence[str]) -> int:
  """Runs `benchmark`, prints its table and report; returns the exit code."""

  def define(values: flags.FlagValues) -> None:
    define_report_flags(values)
    benchmark.define_flags(values)

  def body(values: flags.FlagValues) -> None:
    if values.plot and not hasattr(benchmark, "plot"):
      raise ConfigError("this benchmark has no plot")
    check_report_flags(values)
    card, unfit = isolated(_card, timeout_s=300)
    if unfit and getattr(benchmark, "NEEDS_HOPPER", False):
      raise ResourceError(unfit)
    rows = []
    for row in benchmark.run(values):
      rows.append(row)
      print(json.dumps(row), file=sys.stderr)
    result = {
      "card": card,
      "date": datetime.date.today().isoformat(),
      "versions": {"fireq_jax": fireq_jax.__version__, "jax": jax.__version__},
      "command": " ".join(["python scripts/bench.py", *_measured(argv)]),
      "rows": rows,
    }
    print(table(rows))
    if values.json:
      Path(values.json).write_text(json.dumps(result, indent=1) + "\n")
    if values.plot:
      name = benchmark.__name__.rsplit(".", 1)[-1]
      save_plot(
        lambda rows, figure: benchmark.plot(rows, figure.subplots()),
        rows,
        Path(values.plot),
        f"{name}, {card}",
      )
    print(json.dumps(result))

  body.__module__ = benchmark.__name__  # whose docstring --help prints
  return cli.run(argv, define, body)


def define_report_flags(values: flags.FlagValues) -> None:
  """Where else results go than to the standard output."""
  flags.DEFINE_string(
    "json", None, "Write the report here too.", flag_values=values
  )
  flags.DEFINE_string(
    "plot", None, "Write a PNG of the results here.", flag_values=values
  )


def check_report_flags(values: flags.FlagValues) -> None:
  """Raises now what would keep results from being written in the end."""
  for path in (values.json, values.plot):
    if path:
      cli.check_output_file(path)
  if values.plot and importlib.util.find_spec("matplotlib") is None:
    raise ResourceError(
      "plots need matplotlib", hint="pip install -e '.[plot]'"
    )


def _measured(argv: Sequence[str]) -> Iterable[str]:
  """The arguments without those that only say where results go."""
  rest = iter(argv)
  for argument in rest:
    if argument in ("--json", "--plot"):
      next(rest, None)
    elif not argument.startswith(("--json=", "--plot=")):
      yield argument


def _card() -> tuple[str, str | None]:
  """The name of the device, and why the kernels cannot run on it."""
  try:
    require_hopper()
    unfit = None
  except NotImplementedError as error:
    unfit = str(error)
  return jax.devices()[0].device_kind, unfit


def table(rows: Sequence[Row]) -> str:
  """Rows as aligned text; nested dicts become columns `outer.inner`."""
  flat = [dict(_flatten(row)) for row in rows]
  names = list(dict.fromkeys(name for row in flat for name in row))
  lines = [names] + [[_cell(row.get(name)) for name in names] for row in flat]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(line, widths))
    for line in lines
  )


def _flatten(row: Row, prefix: str = "") -> Iterable[tuple[str, Any]]:
  for name, value in row.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _cell(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def save_plot(
  draw: Callable[[Sequence[Row], Any], None],
  rows: Sequence[Row],
  path: Path,
  title: str,
) -> None:
  """Writes what `draw(rows, figure)` draws as a PNG."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure = pyplot.figure(figsize=(8, 5), layout="constrained")
  draw(rows, figure)
  figure.suptitle(title)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def isolated(
  function: Callable[..., Any], /, *args: Any, timeout_s: float, **kwargs: Any
) -> Any:
  """Calls a module-level `function` in a process of its own.

  A kernel that hangs or corrupts the device then spoils one row, not the run.
  The caller must not have touched the device: JAX claims most of its memory.

  Raises:
    ResourceError: the process died or ran past `timeout_s`.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  child = context.Process(
    target=_send_result, args=(sender, function, args, kwargs)
  )
  child.start()
  sender.close()
  try:
    if not receiver.poll(timeout_s):
      raise ResourceError(
        f"{function.__name__} took longer than {timeout_s} s", got=kwargs
      )
    ok, value = receiver.recv()
  except EOFError as error:
    child.join()
    raise ResourceError(
      f"{function.__name__} died with status {child.exitcode}", got=kwargs
    ) from error
  finally:
    child.kill()
    child.join()
  if not ok:
    raise ResourceError(f"{function.__name__} failed", got=value)
  return value


def _send_result(sender, function, args, kwargs) -> None:
  try:
    result = True, function(*args, **kwargs)
  except Exception as error:
    result = False, repr(error)
  sender.send(result)


@contextlib.contextmanager
def turn() -> Iterator[None]:
  """Waits until no other process of the user's measures, and then keeps others.

  So benchmarks can compile side by side, which takes longer than measuring.
  """
  name = f"fireq_jax_bench_{os.getuid()}.lock"
  with open(Path(tempfile.gettempdir(), name), "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def device_us(
  function: Callable[..., Any],
  operand_sets: Sequence[tuple],
  *,
  repeats: int = 24,
  sync: Callable[[], None] | None = None,
) -> float:
  """Median time of the kernels of one `function(*operands)`, in microseconds.

  Arguments are those of `kernel_times`.
  """
  calls = kernel_times(function, operand_sets, repeats=repeats, sync=sync)
  return statistics.median(sum(us for _, us in call) for call in calls)


def kernel_times(
  function: Callable[..., Any],
  operand_sets: Sequence[tuple],
  *,
  repeats: int = 24,
  sync: Callable[[], None] | None = None,
) -> list[list[tuple[str, float]]]:
  """Name and microseconds of each kernel of each call, in order.

  Read by CUPTI, so without the gaps between kernels. The sets are used in turn:
  pass such that together exceed the L2 (200 MB is ample) to measure from
  memory. `jax.experimental.mosaic.gpu.profiler` measures like this, but with
  the same operands again and again.

  Args:
    function: of JAX arrays, or of anything if there is a `sync`.
    operand_sets: operands of calls.
    repeats: calls, at least; each set has two or more.
    sync: waits for the device, if `function` is not of JAX.
  """
  from jax._src.lib import mosaic_gpu

  cupti = mosaic_gpu._mosaic_gpu_ext
  call = function if sync else jax.jit(function)
  out = [call(*operand_sets[0])]
  wait = lambda: sync() if sync else jax.block_until_ready(out)
  wait()
  calls = max(repeats, 2 * len(operand_sets))
  with turn():
    cupti._cupti_init()
    for i in range(calls):
      out[0] = call(*operand_sets[i % len(operand_sets)])
    wait()
    kernels = [(name, 1e3 * ms) for name, ms in cupti._cupti_get_timings(True)]
  if not kernels:
    raise ResourceError("the profiler saw no kernel")
  each = len(kernels) // calls
  return [kernels[i * each : (i + 1) * each] for i in range(calls)]


def sizes(texts: Sequence[str], meaning: str) -> list[tuple[int, ...]]:
  """Numbers from texts such as "16x1024", as many as `meaning` names.

  Raises:
    ConfigError: not such a text.
  """
  result = []
  for text in texts:
    parts = text.split("x")
    if len(parts) != len(meaning.split(" x ")) or not all(
      part.isdecimal() for part in parts
    ):
      raise ConfigError("not a size", expected=meaning, got=repr(text))
    result.append(tuple(map(int, parts)))
  return result


def names(asked: Sequence[str], known: Iterable[str]) -> list[str]:
  """Returns `asked`.

  Raises:
    ConfigError: one of them is not known.
  """
  known = list(known)
  for name in asked:
    if name not in known:
      raise ConfigError(
        f"unknown name {name!r}", expected="one of " + ", ".join(known)
      )
  return list(asked)


def _llama(
  hidden: int,
  ffn: int,
  layers: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  *,
  vocab_size: int = 128256,
  theta: float = 500000.0,
  tied: bool = False,
) -> LlamaConfig:
  return LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=hidden,
    intermediate_size=ffn,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope=RopeConfig(theta=theta),
    tie_word_embeddings=tied,
  )


MODELS = {
  "tiny": _llama(256, 512, 2, 2, 1, 128, vocab_size=512),
  "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 64, tied=True),
  "llama-2-7b": _llama(
    4096, 11008, 32, 32, 32, 128, vocab_size=32000, theta=10000.0
  ),
  "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128),
}


def define_model_flags(values: flags.FlagValues, recipe: str) -> None:
  """The flags of the benchmarks of random models."""
  flags.DEFINE_enum(
    "model", "llama-3-8b", list(MODELS), "Which shape.", flag_values=values
  )
  flags.DEFINE_string(
    "recipe", recipe, "Recipe name or file.", flag_values=values
  )


def define_attention_flags(
  values: flags.FlagValues, sizes: Sequence[str], meaning: str
) -> None:
  """The flags of the benchmarks of attention and its cache."""
  flags.DEFINE_list("sizes", list(sizes), meaning, flag_values=values)
  flags.DEFINE_integer("q_heads", 32, "Query heads.", flag_values=values)
  flags.DEFINE_integer("kv_heads", 8, "Kv heads.", flag_values=values)
  flags.DEFINE_integer("head_dim", 128, "Head dim.", flag_values=values)
  flags.DEFINE_integer(
    "timeout", 120, "Seconds a measurement may take.", flag_values=values
  )


def attention_shapes(
  values: flags.FlagValues,
) -> list[tuple[int, int, int, int, int]]:
  """Batch, tokens, query heads, kv heads and head_dim of the rows asked for."""
  heads = (values.q_heads, values.kv_heads, values.head_dim)
  return [
    (batch, tokens, *heads)
    for batch, tokens in sizes(values.sizes, "batch x tokens")
  ]


def cache_config(
  q_heads: int, kv_heads: int, head_dim: int, tokens: int
) -> LlamaConfig:
  """A model of which only the cache matters."""
  return LlamaConfig(
    vocab_size=1,
    hidden_size=q_heads * head_dim,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=q_heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    rms_norm_eps=1e-5,
    max_position_embeddings=tokens,
    rope=RopeConfig(theta=1e4),
    tie_word_embeddings=True,
  )
