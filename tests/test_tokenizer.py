"""Text to tokens and back, in one piece and as a stream."""

import json
import random

import pytest

from fireq_jax.errors import CheckpointError, DataError, UnsupportedError
from fireq_jax.loading import resolve
from fireq_jax.tokenizer import Tokenizer

TEXT = "héllo wörld 日本語 🎉 naïve\n  code()"


@pytest.fixture(scope="module")
def demo():
  return Tokenizer(resolve("demo"), 4096)


@pytest.fixture
def folder(make_hf_checkpoint):
  return make_hf_checkpoint(tokenizer=True)


def set_template(folder, template):
  path = folder / "tokenizer_config.json"
  settings = json.loads(path.read_text()) | {"chat_template": template}
  path.write_text(json.dumps(settings))


def test_round_trip_starts_with_bos(demo):
  tokens = demo.encode(TEXT)
  assert tokens[0] == 0 and demo.decode(tokens) == TEXT
  assert demo.eos_token_ids == (1,)


def test_bytes(folder):
  """The fixture's tokenizer has one token a byte, so streams split them."""
  tokenizer = Tokenizer(folder, 320)
  tokens = tokenizer.encode(TEXT)
  assert len(tokens) == len(TEXT.encode())
  pieces = list(tokenizer.stream(tokens))
  assert "".join(pieces) == TEXT
  assert all("\ufffd" not in piece for piece in pieces)
  assert pieces[:3] == ["h", "é", "l"]


def test_stream_of_anything_is_its_decoding(demo):
  rng = random.Random(0)
  for _ in range(100):
    tokens = [rng.randrange(4096) for _ in range(20)]
    assert "".join(demo.stream(tokens)) == demo.decode(tokens)


def test_stream_does_not_wait(demo):
  """Text is yielded with its last token, before the next is asked for."""
  asked = []

  def tokens():
    for token in demo.encode("a b c"):
      asked.append(token)
      yield token

  stream = demo.stream(tokens())
  text = ""
  while text != "a":
    text += next(stream)
  assert len(asked) == 2  # BOS and "a"


def test_chat(folder):
  with pytest.raises(UnsupportedError, match="no chat template"):
    Tokenizer(folder, 320).encode_chat([{"role": "user", "content": "hi"}])
  set_template(
    folder,
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}",
  )
  tokenizer = Tokenizer(folder, 320)
  tokens = tokenizer.encode_chat(
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
  )
  assert tokenizer.decode(tokens) == "[user]hi[assistant]ho>"


@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception('only one user') }}",
    "{% for %}",
  ],
)
def test_bad_templates_are_errors(folder, template):
  set_template(folder, template)
  with pytest.raises(DataError, match="chat template failed"):
    Tokenizer(folder, 320).encode_chat([{"role": "user", "content": "hi"}])


def test_without_jinja(folder, monkeypatch):
  set_template(folder, "x")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UnsupportedError, match="pip install"):
    Tokenizer(folder, 320).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}'])
def test_damaged_tokenizer(folder, content):
  (folder / "tokenizer.json").write_text(content)
  with pytest.raises(CheckpointError, match="tokenizer"):
    Tokenizer(folder, 320)


def test_missing_or_too_large(folder, tmp_path):
  with pytest.raises(CheckpointError, match="no tokenizer.json"):
    Tokenizer(tmp_path, 320)
  with pytest.raises(CheckpointError, match="larger than the model"):
    Tokenizer(folder, 257)


def test_remote_code_is_never_run(folder, tmp_path):
  mark = tmp_path / "ran"
  (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
  path = folder / "tokenizer_config.json"
  path.write_text(
    json.dumps(
      json.loads(path.read_text())
      | {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    )
  )
  try:
    Tokenizer(folder, 320)
  except CheckpointError:
    pass
  assert not mark.exists()
