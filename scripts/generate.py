"""Continues a prompt, or chats, token by token.

  python scripts/generate.py --ckpt demo-fireq --prompt "To sort a list"
  python scripts/generate.py --ckpt DIR --chat

--ckpt is one of our checkpoints, a Hugging Face folder, or `demo`.
"""

import sys
import time
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from fireq_jax import cli
from fireq_jax.config import GenerateConfig
from fireq_jax.errors import ConfigError
from fireq_jax.generate import generate_stream, pad_prompts
from fireq_jax.loading import load_model
from fireq_jax.prepare import prepare
from fireq_jax.tokenizer import Tokenizer


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_string("ckpt", None, "Model folder.", required=True, **define)
  flags.DEFINE_string("prompt", None, "Text to continue.", **define)
  flags.DEFINE_bool(
    "chat", False, "Answer every line of the standard input.", **define
  )
  flags.DEFINE_integer(
    "max_new_tokens", 128, "Tokens to produce.", lower_bound=0, **define
  )
  flags.DEFINE_integer(
    "prefill_chunk",
    8192,
    "Tokens of a prompt read at once; fewer need less memory.",
    lower_bound=1,
    **define,
  )
  flags.DEFINE_float("temperature", 0.7, "0 is greedy.", **define)
  flags.DEFINE_integer(
    "top_k", 0, "Sample among the k likeliest; 0: all.", **define
  )
  flags.DEFINE_float("top_p", 0.95, "Sample within this probability.", **define)
  flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, **define)
  flags.DEFINE_bool("verify", True, "Check digests while loading.", **define)


def run(values: flags.FlagValues) -> None:
  if values.chat == (values.prompt is not None):
    raise ConfigError("give either --prompt TEXT or --chat")
  model = load_model(values.ckpt, verify=values.verify)
  tokenizer = Tokenizer(model.path, model.config.vocab_size)
  params = prepare(model.params, donate=True)
  eos = {*tokenizer.eos_token_ids, *model.config.eos_token_ids}
  options = GenerateConfig(
    max_new_tokens=values.max_new_tokens,
    eos_token_ids=tuple(sorted(eos)),
    top_k=values.top_k,
    prefill_chunk=values.prefill_chunk,
  )

  def answer(prompt: list[int], before: str = "", turn: int = 0) -> str:
    """Prints the continuation as it comes, and its speed; returns it."""
    steps = generate_stream(
      params,
      *pad_prompts([prompt]),
      config=model.config,
      kv=model.recipe.kv,
      options=options,
      key=jax.random.fold_in(jax.random.key(values.seed), turn),
      temperature=values.temperature,
      top_p=values.top_p,
    )
    times = []

    def new_tokens() -> Iterator[int]:
      for step in steps:
        times.append(time.perf_counter())
        yield int(step.tokens[0])

    print(before, end="")
    pieces = []
    for piece in tokenizer.stream(new_tokens()):
      print(piece, end="", flush=True)
      pieces.append(piece)
    print()
    if len(times) > 2:
      speed = (len(times) - 2) / (times[-1] - times[1])
      print(f"{len(times)} tokens, {speed:.1f} a second", file=sys.stderr)
    return "".join(pieces)

  if not values.chat:
    answer(tokenizer.encode(values.prompt), before=values.prompt)
    return
  messages = []
  while line := _ask():
    messages.append({"role": "user", "content": line})
    text = answer(tokenizer.encode_chat(messages), turn=len(messages))
    messages.append({"role": "assistant", "content": text})


def _ask() -> str:
  """The next line of the user, or nothing at the end."""
  if sys.stdin.isatty():
    print("> ", end="", flush=True)
  return sys.stdin.readline().strip()


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
