"""The chain of matmuls: its definition against NumPy, the kernel against it."""

import deviceless
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from int4_problems import qtensor
from test_int4_matmul import silu, value

from fireq_jax.pallas import reference
from fireq_jax.pallas.decode_chain import decode_chain, supported
from fireq_jax.pallas.layouts import PackedInt4, pack_int4_weights

EPS = 1e-5


def problem(rng, tokens, hidden, ffn, lowest=-7):
  """x, a and the stages of a layer: o, gate and up, down, qkv."""
  pack = lambda *w, gated=False: pack_int4_weights(
    w, gated=gated, asymmetric=lowest == -8
  )

  def weight(n, c):
    w = qtensor(rng, n, c, lowest=lowest)  # brought to a size that keeps x's
    return w.replace(tensor_scale=w.tensor_scale * 8 * c**0.5)

  logical = [
    [weight(hidden, hidden)],
    [weight(ffn, hidden), weight(ffn, hidden)],
    [weight(hidden, ffn)],
    [weight(hidden, hidden), weight(hidden // 2, hidden)],
  ]
  gain = lambda: jnp.asarray(rng.uniform(0.5, 1.5, hidden), jnp.bfloat16)
  gains = [None, gain(), None, gain()]
  stages = [
    (pack(*w, gated=i == 1), gain)
    for i, (w, gain) in enumerate(zip(logical, gains))
  ]
  draw = lambda: jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.bfloat16)
  return draw(), draw(), stages, logical


def rounded(x):
  """x as e4m3 codes times a scale a row."""
  scale = np.abs(x).max(axis=1, keepdims=True) / 448
  return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def to_bf16(x):
  return np.asarray(x, ml_dtypes.bfloat16).astype(np.float64)


def test_definition_agrees_with_numpy():
  rng = np.random.default_rng(1)
  x, a, stages, logical = problem(rng, 3, 256, 384)
  got = reference.decode_chain(x, a, stages, eps=EPS)
  x, a = to_bf16(x), to_bf16(a)
  for weights, (_, gain) in zip(logical, stages):
    if gain is None:
      x = to_bf16(x + rounded(a) @ value(weights[0]).T)
      continue
    rms = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)
    y = rounded(x * to_bf16(gain)) / rms
    parts = [y @ value(w).T for w in weights]
    gated = len(parts) == 2 and parts[0].shape == parts[1].shape
    a = to_bf16(silu(parts[0]) * parts[1] if gated else np.hstack(parts))
  for out, wanted in zip(got, (x, a)):
    error = np.linalg.norm(to_bf16(out) - wanted) / np.linalg.norm(wanted)
    # Where a value lies between two codes, rounding may go either way.
    assert error < 0.02


def shapes(tokens, hidden=4096, ffn=14336, qkv=6144, encoding="sign_magnitude"):
  struct = jax.ShapeDtypeStruct

  def weight(n, c, gated=False):
    return PackedInt4(
      codes=struct((c // 128, n, 64), jnp.uint8),
      scale=struct((c // 128, n), jnp.float8_e4m3fn),
      row_scale=struct((n,), jnp.float32),
      shape=(n, c),
      encoding=encoding,
      activation="e4m3",
      gated=gated,
    )

  gain = struct((hidden,), jnp.bfloat16)
  stages = [
    (weight(hidden, hidden), None),
    (weight(2 * ffn, hidden, True), gain),
    (weight(hidden, ffn), None),
    (weight(qkv, hidden), gain),
  ]
  x = struct((tokens, hidden), jnp.bfloat16)
  return x, x, stages


def test_what_it_does_not_handle_is_refused():
  supported(*shapes(4))
  supported(*shapes(4, ffn=11008, qkv=12288))  # Llama-2-7B
  supported(*shapes(4, 2048, 8192, 3072))  # Llama-3.2-1B
  for wrong, reason in (
    (shapes(5), "5 tokens"),
    (shapes(1, ffn=11008 + 64), "not multiples of 128"),
    (shapes(1, qkv=6144 + 16), "not multiples of 128"),
    ((shapes(1)[0], None, shapes(1)[2]), "activations where there are none"),
  ):
    with pytest.raises(NotImplementedError, match=reason):
      supported(*wrong)


@pytest.mark.parametrize("tokens", [1, 4])
def test_lowers_for_cuda(tokens):
  counters = jax.ShapeDtypeStruct((2,), jnp.int32)
  chain = jax.jit(lambda *args: decode_chain(*args, eps=EPS))
  trace = chain.trace(*shapes(tokens), counters)
  assert "mosaic_gpu" in trace.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@deviceless.needs_plugin
def test_compiles_without_spills(tmp_path, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  cases = [
    shapes(1),
    shapes(2, encoding="twos_complement"),
    shapes(4, 2048, 8192, 3072),
    shapes(4, ffn=11008, qkv=12288),
  ]
  chain = lambda *args: decode_chain(*args, eps=EPS)
  counters = jax.ShapeDtypeStruct((2,), jnp.int32)
  reports = deviceless.compile_all(
    [(chain, (*case, counters)) for case in cases], tmp_path
  )
  assert len(reports) == len(cases)
  for report in reports:
    # A few words, kept while rows are quantised; none in the main loop.
    assert report.spilled_bytes <= 160
    assert not report.serialised_wgmma


@pytest.mark.gpu
@pytest.mark.parametrize(
  "tokens, hidden, ffn, lowest",
  [
    *((tokens, 2048, 6144, -7) for tokens in range(1, 5)),
    (2, 2048, 6144, -8),
    (1, 1536, 2944, -7),  # 12 and 23 blocks of 128, so slots are not full
    (4, 1536, 2944, -8),
  ],
)
def test_kernel_agrees_with_definition(tokens, hidden, ffn, lowest):
  """Each stage alone, the chain to each, and the same bits every time."""
  rng = np.random.default_rng(tokens)
  x, a, stages, _ = problem(rng, tokens, hidden, ffn, lowest)
  h = jnp.asarray(rng.normal(size=(tokens, ffn)), jnp.bfloat16)
  counters = jnp.zeros(2, jnp.int32)
  definition = jax.jit(reference.decode_chain, static_argnames="eps")
  alone = [(inputs, [stage]) for inputs, stage in zip((a, a, h, a), stages)]
  chains = [(a, stages[:n]) for n in (2, 3, 4)]
  for i, (first, part) in enumerate(alone + chains):
    got = decode_chain(x, first, part, counters, eps=EPS)
    wanted = definition(x, first, part, eps=EPS)
    again = decode_chain(x, first, part, counters, eps=EPS)
    assert not counters.any()
    for y, w, z in zip(got, wanted, again):
      assert (y == z).all()
      y, w = y.astype(jnp.float32), w.astype(jnp.float32)
      error = jnp.linalg.norm(y - w) / jnp.linalg.norm(w)
      # Later stages round what differs in the last bit before.
      assert error < (4e-3 if i < len(alone) else 0.06), (i, error)
