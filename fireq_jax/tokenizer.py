"""Text to tokens and back, from local files only; no remote code ever runs."""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fireq_jax.errors import CheckpointError, DataError, UnsupportedError


class Tokenizer:
  """The tokenizer of a model folder."""

  def __init__(self, folder: str | os.PathLike, vocab_size: int):
    """Reads `tokenizer.json` and its companions.

    Args:
      folder: a Hugging Face folder or one of our checkpoints.
      vocab_size: of the model; no token may lie beyond.

    Raises:
      CheckpointError: no tokenizer there, damaged, or larger than the model.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
      raise CheckpointError(
        "no tokenizer.json",
        where=folder,
        hint="copy the tokenizer files of the original model here",
      )
    auto_tokenizer = _import_auto_tokenizer()
    try:
      self._tokenizer: Any = auto_tokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
      )
      size = 1 + max(self._tokenizer.get_vocab().values())
    except Exception as error:  # transformers raises many types
      reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
      raise CheckpointError(
        "unreadable tokenizer", where=folder, got=reason
      ) from error
    if size > vocab_size:
      raise CheckpointError(
        "the tokenizer is larger than the model",
        where=folder,
        expected=f"at most {vocab_size} tokens",
        got=size,
      )

  @property
  def eos_token_ids(self) -> tuple[int, ...]:
    """The tokenizer's own end of a sequence, if it has one."""
    eos = self._tokenizer.eos_token_id
    return () if eos is None else (eos,)

  def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
    """Tokens of `text`, with the special tokens the model expects (BOS)."""
    return list(
      self._tokenizer(text, verbose=False, add_special_tokens=special_tokens)[
        "input_ids"
      ]
    )

  def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a conversation, ready for the assistant's answer.

    Args:
      messages: dicts with keys `role` and `content`.

    Raises:
      UnsupportedError: the tokenizer has no chat template, or jinja2 is absent.
      DataError: the template refuses these messages.
    """
    if not self._tokenizer.chat_template:
      raise UnsupportedError(
        "this tokenizer has no chat template", hint="use a plain prompt"
      )
    if importlib.util.find_spec("jinja2") is None:
      raise UnsupportedError(
        "chat templates need jinja2", hint="pip install -e '.[chat]'"
      )
    try:
      return list(
        self._tokenizer.apply_chat_template(
          list(messages), add_generation_prompt=True, return_dict=False
        )
      )
    except Exception as error:  # templates raise what they like
      raise DataError(
        "the chat template failed", got=str(error).split("\n")[0]
      ) from error

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of `tokens` without special tokens."""
    return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

  def stream(self, tokens: Iterable[int]) -> Iterator[str]:
    """Yields text as tokens arrive, never half a character.

    Joined, the pieces are `decode` of all tokens. Each piece is decoded after
    the tokens of the previous one, because some tokenizers drop the space
    that begins a text.
    """
    window: list[int] = []
    shown = 0  # how many tokens of the window are already yielded
    for token in tokens:
      window.append(token)
      text = self.decode(window)
      if text.endswith("\N{REPLACEMENT CHARACTER}"):
        continue
      yield text[len(self.decode(window[:shown])) :]
      window, shown = window[shown:], len(window) - shown
    if len(window) > shown:
      yield self.decode(window)[len(self.decode(window[:shown])) :]


def _import_auto_tokenizer() -> Any:
  # The import warns that PyTorch is absent, which is how we want it.
  logger = logging.getLogger("transformers")
  logger.disabled = True
  try:
    from transformers import AutoTokenizer
  finally:
    logger.disabled = False
  return AutoTokenizer
