"""Zero-shot tasks of the lm-evaluation-harness on any model folder.

  pip install -e ".[lm-eval]"
  python scripts/lm_eval_adapter.py --ckpt DIR --tasks piqa,hellaswag

--ckpt is one of our checkpoints, a Hugging Face folder, or `demo`. The harness
fetches the data of its tasks itself; --include_path names a folder with tasks
of your own. Last line: JSON.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fireq_jax import cli
from fireq_jax.config import GenerateConfig, KVFormat, LlamaConfig
from fireq_jax.errors import DataError
from fireq_jax.generate import generate, pad_prompts
from fireq_jax.loading import load_model
from fireq_jax.models.llama import forward
from fireq_jax.prepare import prepare
from fireq_jax.tokenizer import Tokenizer

try:
  from lm_eval import simple_evaluate
  from lm_eval.api.model import TemplateLM
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    make_table,
  )
except ImportError:
  print(
    "error: the lm-evaluation-harness is missing; pip install -e '.[lm-eval]'",
    file=sys.stderr,
  )
  sys.exit(3)

_DEFAULT_NEW_TOKENS = 256


class FireQLM(TemplateLM):
  """A model as the harness calls it.

  Keys, values and queries go through the recipe's `kv` format and weights
  through the same products as in generation.
  """

  def __init__(self, ckpt: str, batch_size: int = 8):
    """Loads `ckpt`, which is all that `scripts/generate.py` takes."""
    super().__init__()
    model = load_model(ckpt)
    self.model = dataclasses.replace(
      model, params=prepare(model.params, donate=True)
    )
    self.text = Tokenizer(model.path, model.config.vocab_size)
    self.batch_size = batch_size
    self.max_length = model.config.max_position_embeddings
    ends = (*self.text.eos_token_ids, *model.config.eos_token_ids)
    if not ends:
      raise DataError("the model has no end-of-sequence token", where=ckpt)
    self.ends = tuple(sorted(set(ends)))
    self._end = ends[0]

  @property
  def eot_token_id(self) -> int:
    return self._end

  @property
  def prefix_token_id(self) -> int:
    """What a text without context follows: BOS, if texts begin with it."""
    first = self.text.encode("")[:1]
    return first[0] if first else self._end

  @property
  def tokenizer_name(self) -> str:
    return self.model.path.name

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    return self.text.encode(
      string, special_tokens=add_special_tokens is not False
    )

  def _loglikelihood_tokens(
    self, requests: Sequence[Any], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Log-probability of each continuation, and whether greedy gives it."""
    texts = [
      (context + continuation)[-self.max_length - 1 :]
      for _, context, continuation in requests
    ]
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch in self._batches([len(text) for text in texts]):
      tokens, lengths = pad_prompts([texts[i][:-1] for i in batch])
      following, _ = pad_prompts([texts[i][1:] for i in batch])
      log_p, greedy = _next_tokens(
        self.model.params,
        *map(jnp.asarray, (tokens, following, lengths)),
        config=self.model.config,
        kv=self.model.recipe.kv,
      )
      log_p, greedy = np.asarray(log_p), np.asarray(greedy)
      for row, i in enumerate(batch):
        end = lengths[row]
        scored = slice(max(0, end - len(requests[i][2])), end)
        results[i] = (
          float(log_p[row, scored].sum(dtype=np.float64)),
          bool(greedy[row, scored].all()),
        )
        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
    return results

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probability of whole texts, in windows of the model's length."""
    windows: list[tuple[Any, list[int], list[int]]] = []
    owner = []
    for i, request in enumerate(requests):
      for pair in get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0], add_special_tokens=False),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      ):
        windows.append((None, *make_disjoint_window(pair)))
        owner.append(i)
    sums = [0.0] * len(requests)
    for i, (log_p, _) in zip(owner, self._loglikelihood_tokens(windows)):
      sums[i] += log_p
    return sums

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Continues each context greedily up to one of its stop strings."""
    results = [""] * len(requests)
    kinds: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
      options = request.args[1]
      if options.get("do_sample") or options.get("temperature"):
        raise DataError("only greedy tasks are supported", got=options)
      limit = int(options.get("max_gen_toks", _DEFAULT_NEW_TOKENS))
      kinds.setdefault(limit, []).append(i)
    for limit, members in kinds.items():
      room = self.max_length - limit
      if room < 1:
        raise DataError(
          "max_gen_toks leaves no room for the context",
          expected=f"below {self.max_length}",
          got=limit,
        )
      prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
      for batch in self._batches([len(prompt) for prompt in prompts]):
        texts = self._continue([prompts[j] for j in batch], limit)
        for j, text in zip(batch, texts):
          until = requests[members[j]].args[1].get("until") or []
          for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
          results[members[j]] = text
    return results

  def _continue(self, prompts: list[list[int]], limit: int) -> list[str]:
    tokens, lengths = pad_prompts(prompts)
    output = generate(
      self.model.params,
      jnp.asarray(tokens),
      jnp.asarray(lengths),
      config=self.model.config,
      kv=self.model.recipe.kv,
      options=GenerateConfig(max_new_tokens=limit, eos_token_ids=self.ends),
    )
    return [
      self.text.decode([int(t) for t in row[:length]])
      for row, length in zip(np.asarray(output.tokens), output.lengths)
    ]

  def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), self.batch_size):
      yield order[start : start + self.batch_size]


@functools.partial(jax.jit, static_argnames=("config", "kv"))
def _next_tokens(
  params: Any,
  tokens: jax.Array,
  following: jax.Array,
  lengths: jax.Array,
  *,
  config: LlamaConfig,
  kv: KVFormat,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability f32 [B, T] of the `following` tokens, and bool [B, T],
  whether each is the likeliest."""
  logits, _ = forward(params, tokens, config=config, kv=kv, counts=lengths)
  log_p = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
  return chosen, logits.argmax(axis=-1) == following


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_string("ckpt", None, "Model folder.", required=True, **define)
  flags.DEFINE_list("tasks", None, "Names.", required=True, **define)
  flags.DEFINE_string("include_path", None, "Folder of more tasks.", **define)
  flags.DEFINE_integer("num_fewshot", None, "Default: the task's.", **define)
  flags.DEFINE_integer(
    "limit", None, "Documents of a task; default: all.", lower_bound=1, **define
  )
  flags.DEFINE_integer(
    "batch_size", 8, "Texts at a time.", lower_bound=1, **define
  )
  flags.DEFINE_string("json", None, "Write the last line here too.", **define)


def run(values: flags.FlagValues) -> None:
  if values.json:
    cli.check_output_file(values.json)
  manager = TaskManager(include_path=values.include_path)
  unknown = [t for t in values.tasks if t not in manager.all_tasks]
  if unknown:
    raise DataError("no such task", got=", ".join(unknown))
  model = FireQLM(values.ckpt, values.batch_size)
  found = simple_evaluate(
    model=model,
    tasks=list(values.tasks),
    task_manager=manager,
    num_fewshot=values.num_fewshot,
    limit=values.limit,
    log_samples=False,
  )
  print(make_table(found))
  report = json.dumps(
    {
      "model": Path(values.ckpt).name,
      "recipe": model.model.recipe.name,
      "limit": values.limit,
      "results": found["results"],
    },
    default=str,
  )
  if values.json:
    Path(values.json).write_text(report + "\n")
  print(report)


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
