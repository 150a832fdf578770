"""The adapter of the lm-evaluation-harness, offline, on a random model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
  "lm_eval", reason="needs the extra: pip install -e '.[lm-eval]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")

import lm_eval_adapter  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from fireq_jax.errors import DataError  # noqa: E402
from fireq_jax.models.llama import forward  # noqa: E402

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(make_hf_checkpoint):
  return make_hf_checkpoint(tokenizer=True, max_position_embeddings=32)


def requests(kind, arguments):
  return [
    Instance(request_type=kind, doc={}, arguments=a, idx=i)
    for i, a in enumerate(arguments)
  ]


def log_p(model, tokens):
  """f64 [T, V], log-probabilities after each token, of one text alone."""
  logits, _ = forward(
    model.params,
    jnp.asarray([tokens]),
    config=model.config,
    kv=model.recipe.kv,
  )
  logits = np.asarray(logits[0], np.float64)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_loglikelihood_is_the_sum_over_the_continuation(folder):
  lm = lm_eval_adapter.FireQLM(folder, batch_size=2)
  pairs = [("ab", "cd"), ("", "xyz"), ("a" * 30, "bcdefg"), ("a ", "b")]
  # Bytes; a text without context follows the end token, 257, as this
  # tokenizer has no BOS; only 33 tokens fit; a space joins what follows it.
  split = [
    (b"ab", b"cd"),
    (None, b"xyz"),
    (b"a" * 27, b"bcdefg"),
    (b"a", b" b"),
  ]
  found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
  for (got, greedy), (context, continuation) in zip(found, split):
    before = [lm.eot_token_id] if context is None else byte_ids(lm, context)
    after = byte_ids(lm, continuation)
    scores = log_p(lm.model, [*before, *after][:-1])[len(before) - 1 :]
    want = [row[token] for row, token in zip(scores, after)]
    assert len(want) == len(after)
    np.testing.assert_allclose(got, np.sum(want), rtol=1e-3)
    assert greedy == bool((scores.argmax(axis=-1) == after).all())


def byte_ids(lm, text):
  return lm.tok_encode(text.decode(), add_special_tokens=False)


def test_greedy_continuations_are_recognised_and_cut_at_stops(folder):
  lm = lm_eval_adapter.FireQLM(folder)
  tokens = byte_ids(lm, b"hello")
  for _ in range(3):
    tokens.append(int(log_p(lm.model, tokens)[-1].argmax()))
  text = lm.text.decode(tokens[5:])
  ask = lambda **options: lm.generate_until(
    requests("generate_until", [("hello", {"max_gen_toks": 3} | options)])
  )
  assert ask() == [text]
  assert ask(until=text[1:2]) == [text[: text.index(text[1:2])]]
  with pytest.raises(DataError, match="greedy"):
    ask(do_sample=True, temperature=0.5)
  with pytest.raises(DataError, match="no room"):
    ask(max_gen_toks=32)


def test_rolling_windows_score_every_token_once(folder):
  lm = lm_eval_adapter.FireQLM(folder)
  text = bytes(range(97, 123)) * 2
  ids = byte_ids(lm, text)
  (got,) = lm.loglikelihood_rolling(
    requests("loglikelihood_rolling", [(text.decode(),)])
  )
  first = log_p(lm.model, [lm.prefix_token_id, *ids[:31]])
  want = first[np.arange(32), ids[:32]].sum()
  # The second window sees what it needs of the first.
  second = log_p(lm.model, ids[19:51])
  want += second[np.arange(12, 32), ids[32:52]].sum()
  np.testing.assert_allclose(got, want, rtol=1e-3)


def test_a_task_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  documents = [
    {"question": f"{colour} is", "choices": [" a", " bc", " d"], "answer": i}
    for i, colour in enumerate(["red", "green", "blue"])
  ]
  data = tmp_path / "data.jsonl"
  data.write_text("\n".join(map(json.dumps, documents)))
  (tmp_path / "tasks").mkdir()
  (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(data=data))
  out = tmp_path / "report.json"
  command = [
    "lm_eval_adapter.py",
    f"--ckpt={folder}",
    f"--include_path={tmp_path / 'tasks'}",
    f"--json={out}",
  ]
  assert lm_eval_adapter.main([*command, "--tasks=colours"]) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert report == json.loads(out.read_text())
  lm = lm_eval_adapter.FireQLM(folder)
  right = 0
  for document in documents:
    scores = []
    for choice in document["choices"]:
      before = byte_ids(lm, document["question"].encode())
      after = byte_ids(lm, choice.encode())
      table = log_p(lm.model, [*before, *after][:-1])[len(before) - 1 :]
      scores.append(sum(row[t] for row, t in zip(table, after)))
    right += int(np.argmax(scores)) == document["answer"]
  assert report["results"]["colours"]["acc,none"] == pytest.approx(right / 3)
  assert lm_eval_adapter.main([*command, "--tasks=none-such"]) == 2
  assert "no such task" in capsys.readouterr().err
