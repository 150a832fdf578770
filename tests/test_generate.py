"""What generate() promises, on a model small enough to check by hand."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
import small_llama
from jax.sharding import AxisType, PartitionSpec

from fireq_jax.config import (
  GenerateConfig,
  KVFormat,
)
from fireq_jax.errors import ConfigError, DataError
from fireq_jax.generate import generate, generate_stream, pad_prompts
from fireq_jax.models.llama import init_params

generation = importlib.import_module("fireq_jax.generate")

CONFIG = small_llama.config(vocab_size=29)
PARAMS = jax.tree.map(
  lambda x: x * 12 if x.ndim == 2 else x,
  init_params(CONFIG, jax.random.key(3), jnp.float32),
)
KV = KVFormat(cache="int4", scale="f32")
TOKENS, LENGTHS = pad_prompts([[1, 2, 3], [7], [4, 4, 9, 12, 5]])
NEW = 8


def options(**changes):
  return GenerateConfig(**{"max_new_tokens": NEW, **changes})


def run(tokens=TOKENS, lengths=LENGTHS, opts=None, call=generate, **keywords):
  return call(
    PARAMS,
    tokens,
    lengths,
    config=CONFIG,
    kv=KV,
    options=opts or options(),
    **keywords,
  )


def streamed(**keywords):
  """(tokens [B, steps], active [B, steps]) of the streaming twin."""
  steps = list(run(call=generate_stream, **keywords))
  return (np.stack(part, axis=1) for part in zip(*steps, strict=True))


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def greedy():
  return jax.device_get(run())


def test_greedy_equals_numpy(greedy):
  assert greedy.tokens.dtype == np.int32
  for row, length in enumerate(LENGTHS):
    sequence = TOKENS[row, :length].tolist()
    for token in greedy.tokens[row]:
      logits = numpy_llama.forward(
        PARAMS, sequence, CONFIG, numpy_llama.round_int4
      )[-1]
      assert token == logits.argmax()
      sequence.append(token)
  assert greedy.lengths.tolist() == [NEW] * 3 and not greedy.finished.any()
  assert len(np.unique(greedy.tokens)) > 5


def first_at(row, token):
  """Where a greedy row first has the token, or NEW."""
  return int(np.argmax(row == token)) if token in row else NEW


@pytest.mark.parametrize("which", ["first", "two"])
def test_stops_at_any_eos(greedy, which):
  """For every row: the greedy tokens cut after the first EOS, then padding."""
  rows = greedy.tokens
  eos = {
    "first": (rows[0, 0],),
    "two": (rows[0, 4], rows[2, 2]),
  }[which]
  opts = options(eos_token_ids=tuple(map(int, eos)), pad_token_id=28)
  out = run(opts=opts)
  ends = [min(first_at(row, e) for e in eos) for row in rows]
  for row, end in enumerate(ends):
    np.testing.assert_array_equal(
      out.tokens[row, : end + 1], rows[row, : end + 1]
    )
    assert (out.tokens[row, end + 1 :] == 28).all()
    assert out.lengths[row] == min(end + 1, NEW)
    assert out.finished[row] == (end < NEW)


def test_ragged_rows_equal_each_alone(greedy):
  keys = jax.random.split(jax.random.key(5), 3)
  sampled = run(key=keys, temperature=1.0, top_p=0.9)
  assert not np.array_equal(sampled.tokens, greedy.tokens)
  for row in range(3):
    one = TOKENS[row : row + 1], LENGTHS[row : row + 1]
    alone = run(*one)
    np.testing.assert_array_equal(alone.tokens[0], greedy.tokens[row])
    alone = run(*one, key=keys[row : row + 1], temperature=1.0, top_p=0.9)
    np.testing.assert_array_equal(alone.tokens[0], sampled.tokens[row])


def test_keys(greedy):
  sampled = lambda key, **k: run(key=key, temperature=1.5, **k)
  key = jax.random.key(0)
  assert_same(sampled(key), sampled(key))
  assert (sampled(key).tokens != sampled(jax.random.key(1)).tokens).any()
  per_row = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
  assert_same(sampled(per_row), sampled(key))
  assert_same(sampled(jax.random.PRNGKey(0)), sampled(key))
  mixed = run(key=key, temperature=jnp.array([0.0, 1.5, 0.0]))
  np.testing.assert_array_equal(mixed.tokens[::2], greedy.tokens[::2])
  np.testing.assert_array_equal(mixed.tokens[1], sampled(key).tokens[1])
  only_best = run(key=key, temperature=1.5, opts=options(top_k=1))
  assert_same(only_best, greedy)


STREAM = options(top_k=9, eos_token_ids=(3, 17))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("new", [NEW, 20])
def test_stream_equals_batch(new, seed):
  """20 are made in two loops of ten, the last of which must do nothing."""
  keywords = {
    "key": jax.random.key(seed),
    "temperature": np.array([1.0, 0.0, 2.0]),
    "top_p": 0.8,
    "opts": dataclasses.replace(STREAM, max_new_tokens=new),
  }
  want = run(**keywords)
  tokens, active = streamed(**keywords)
  assert tokens.shape[1] == max(want.lengths)
  np.testing.assert_array_equal(tokens, want.tokens[:, : tokens.shape[1]])
  np.testing.assert_array_equal(active.sum(1), want.lengths)


def test_rows_that_never_end_stop_in_time():
  """Nor does an end that is drawn after the last token count."""
  long = np.asarray(run(opts=options(max_new_tokens=28)).tokens)
  new = 20
  later = [t for t in np.unique(long[:, new:]) if t not in long[:, :new]]
  eos = (int(later[0]),) if later else (28,)
  out = run(opts=options(max_new_tokens=new, eos_token_ids=eos))
  np.testing.assert_array_equal(out.tokens, long[:, :new])
  assert (np.asarray(out.lengths) == new).all() and not out.finished.any()


@pytest.mark.parametrize(
  ("steps", "want"), [(0, 0), (5, 5), (16, 16), (19, 10), (72, 8), (1023, 11)]
)
def test_steps_between_looks_at_the_end(steps, want):
  assert generation._unchecked_steps(steps) == want


@pytest.mark.parametrize(
  ("eos", "count"), [((), 99), ((3,), generation._unchecked_steps(99))]
)
def test_the_host_waits_for_few_steps(eos, count):
  """XLA runs a loop without asking the device where it knows the count."""

  def compiled(tokens, lengths):
    return run(tokens, lengths, options(max_new_tokens=100, eos_token_ids=eos))

  text = jax.jit(compiled).lower(TOKENS[:, :2], LENGTHS).compile().as_text()
  assert f'"known_trip_count":{{"n":"{count}"}}' in text


def test_inside_jit_vmap_and_scan():
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key: run(key=key, temperature=1.0).tokens
  one_by_one = jnp.stack([draw(key) for key in keys])
  np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), one_by_one)
  _, scanned = jax.lax.scan(lambda _, key: (None, draw(key)), None, keys)
  np.testing.assert_array_equal(scanned, one_by_one)


def test_inside_shard_map():
  """Each device generates for its own rows, and stops when they are done."""
  mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,))
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda tokens, lengths, key: run(
    tokens, lengths, STREAM, key=key, temperature=1.0
  )
  rows = PartitionSpec("data")
  split = jax.shard_map(draw, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)
  got = jax.jit(split)(TOKENS, LENGTHS, keys)
  assert_same(got, draw(TOKENS, LENGTHS, keys))


def test_one_compilation_per_shape(monkeypatch):
  traces = []
  forward = generation.forward
  monkeypatch.setattr(
    generation,
    "forward",
    lambda *args, **kw: (traces.append(args[1].shape), forward(*args, **kw))[1],
  )
  opts = options(max_new_tokens=3)
  for seed, temperature in enumerate((0.3, 0.7, 1.1)):
    key = jax.random.key(seed)
    run(TOKENS + seed, opts=opts, key=key, temperature=temperature, top_p=0.5)
  assert traces == [(3, 16), (3, 1)]
  wider = pad_prompts([[1] * 17] * 3)
  run(*wider, opts=opts)
  run(wider[0], np.array([3, 2, 32]), opts=opts)
  assert traces[2:] == [(3, 32), (3, 1)]
  traces.clear()
  for seed in range(2):
    streamed(opts=opts, key=jax.random.key(seed), temperature=1.0)
  assert traces == [(3, 16), (3, 1)]


def test_streaming_updates_the_cache_in_place(monkeypatch):
  pointers = []
  step = generation._stream_step

  def spy(params, state, **static):
    out = step(params, state, **static)
    leaves = jax.tree.leaves(out[0].cache.layers)
    pointers.append([x.unsafe_buffer_pointer() for x in leaves])
    assert all(x.is_deleted() for x in jax.tree.leaves(state.cache.layers))
    return out

  monkeypatch.setattr(generation, "_stream_step", spy)
  streamed(opts=STREAM)
  assert len(pointers) > 2 and len(set(map(tuple, pointers))) == 1


def test_cache_full_to_the_last_slot(greedy):
  tokens = TOKENS[:, :5]
  out = run(tokens, LENGTHS, options(cache_capacity=5 + NEW))
  np.testing.assert_array_equal(out.tokens, greedy.tokens)
  with pytest.raises(ConfigError, match="cache_capacity.*at least 13.*got 12"):
    run(tokens, LENGTHS, options(cache_capacity=4 + NEW))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("call", [generate, generate_stream])
def test_prompts_read_in_chunks(greedy, chunk, call):
  """Rows that end in the first, a middle and the last chunk, or at its edge."""
  opts = options(prefill_chunk=chunk)
  if call is generate:
    return assert_same(jax.device_get(run(opts=opts)), greedy)
  tokens, active = streamed(opts=opts)
  np.testing.assert_array_equal(tokens, greedy.tokens[:, : tokens.shape[1]])
  assert active.all()


def test_nothing_to_generate():
  out = run(opts=options(max_new_tokens=0))
  assert out.tokens.shape == (3, 0)
  assert not out.lengths.any() and not out.finished.any()
  assert list(run(opts=options(max_new_tokens=0), call=generate_stream)) == []


BAD_PROMPTS = {
  "no rows": (np.zeros((0, 4), np.int32), np.zeros(0, np.int32)),
  "no columns": (np.zeros((3, 0), np.int32), LENGTHS),
  "one dimension": (TOKENS[0], LENGTHS),
  "lengths of other rows": (TOKENS, LENGTHS[:2]),
  "empty prompt": (TOKENS, np.array([1, 0, 2])),
  "longer than its row": (TOKENS, np.array([1, 17, 2])),
  "negative id": (TOKENS - 1, LENGTHS),
  "id beyond the vocabulary": (TOKENS + 20, LENGTHS),
  "huge id": (TOKENS.astype(np.int64) + 2**32, LENGTHS),
  "float ids": (TOKENS.astype(np.float32), LENGTHS),
  "float lengths": (TOKENS, LENGTHS.astype(np.float32)),
}
KEY = jax.random.key(0)
BAD_OPTIONS = {
  "temperature": {"temperature": -0.1, "key": KEY},
  "temperature ": {"temperature": float("nan"), "key": KEY},
  "finite": {"temperature": float("inf"), "key": KEY},
  "temperature must be a scalar": {"temperature": np.ones(2), "key": KEY},
  "needs a key": {"temperature": 1.0},
  "one key per row": {"key": jax.random.split(KEY, 2)},
  "must be a PRNG key": {"key": 0},
  "implementation": {"implementation": "mosaic"},
  "top_p": {"top_p": 0.0},
  "top_p ": {"top_p": 1.01},
  "at most 1": {"top_p": np.array([0.5, float("nan"), 1])},
  "top_k": {"opts": options(top_k=30)},
  "eos_token_ids": {"opts": options(eos_token_ids=(29,))},
  "positions": {"opts": options(max_new_tokens=60)},
}


@pytest.mark.parametrize("call", [generate, generate_stream])
@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused(name, call):
  with pytest.raises(DataError):
    run(*BAD_PROMPTS[name], call=call)


@pytest.mark.parametrize("call", [generate, generate_stream])
@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_refused(message, call):
  with pytest.raises(ConfigError, match=message.strip()):
    run(call=call, **BAD_OPTIONS[message])


@pytest.mark.parametrize(
  "bad",
  [
    {"max_new_tokens": -1},
    {"max_new_tokens": 1.0},
    {"max_new_tokens": True},
    {"top_k": -1},
    {"top_k": None},
    {"pad_token_id": "0"},
    {"cache_capacity": 0},
    {"prefill_chunk": 0},
    {"eos_token_ids": [3]},
    {"eos_token_ids": 3},
    {"eos_token_ids": (3.0,)},
    {"eos_token_ids": (-1,)},
  ],
)
def test_what_no_generation_can_be(bad):
  (name,) = bad
  with pytest.raises(ConfigError, match=name):
    options(**bad)


def test_shapes_are_checked_under_jit():
  with pytest.raises(DataError):
    jax.jit(lambda t: run(t, LENGTHS[:2]))(TOKENS)
  with pytest.raises(ConfigError, match="needs a key"):
    jax.jit(lambda t: run(temperature=t))(0.0)


def test_pad_prompts():
  tokens, lengths = pad_prompts([[3], [1, 2, 3]], pad_token_id=9)
  assert tokens.shape == (2, 16) and tokens.dtype == lengths.dtype == np.int32
  assert tokens[1, :4].tolist() == [1, 2, 3, 9] and lengths.tolist() == [1, 3]
  widths = [pad_prompts([[0] * n])[0].shape[1] for n in (16, 17, 32, 33, 1000)]
  assert widths == [16, 32, 32, 64, 1024]
  for bad in ([], [[1], []]):
    with pytest.raises(DataError):
      pad_prompts(bad)
