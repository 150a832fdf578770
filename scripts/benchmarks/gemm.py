"""Device time of the INT4 matmul against bf16, FP8 and naive INT4 matmuls.

Codes and activations are random, and weights rotate through more than 200 MB,
so that they come from memory and not from the L2 cache. Baselines run in the
same process: XLA's bf16 and its product with a dequantised INT4 weight, and,
where torch is installed, cuBLAS FP8 with one scale a tensor and with one scale
a row. What does gate and up in one call is held against FP8 and XLA's
silu(gate) * up after it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import common
from fireq_jax.errors import ResourceError
from fireq_jax.pallas import layouts, reference, tunings
from fireq_jax.pallas.int4_matmul import int4_matmul
from fireq_jax.qtensor import quantize_e4m3, unpack_int4

SHAPES = {  # n, k
  "llama-3-8b/gate_up": (28672, 4096),
  "llama-2-7b/gate_up": (22016, 4096),
  "llama-3-8b/down": (4096, 14336),
  "llama-2-7b/down": (4096, 11008),
  "llama-3-8b/qkv": (6144, 4096),
  "llama-3-8b/o": (4096, 4096),
}
MODES = ("e4m3", "bf16", "w4a16", "gated")
_ROTATED_BYTES = 200e6

NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    "shapes", list(SHAPES), "Names of projections.", flag_values=values
  )
  flags.DEFINE_list(
    "tokens",
    "1 16 64 128 256 1024 4096".split(),
    "Rows of x.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "modes",
    list(MODES),
    "Scale dtype with e4m3 activations, bf16 activations, or gate and up.",
    flag_values=values,
  )


def run(values: flags.FlagValues) -> Iterator[common.Row]:
  tokens = [m for (m,) in common.sizes(values.tokens, "tokens")]
  modes = common.names(values.modes, MODES)
  for name in common.names(values.shapes, SHAPES):
    n, k = SHAPES[name]
    try:
      yield from common.isolated(
        measure,
        n,
        k,
        tokens=tokens,
        modes=modes,
        timeout_s=150,
      )
    except ResourceError as error:
      yield {"n": n, "k": k, "error": str(error)}


def measure(
  n: int, k: int, *, tokens: Sequence[int], modes: Sequence[str]
) -> list[common.Row]:
  """Rows of one projection."""
  rows = []
  for m in tokens:
    baselines = _baselines(n, k, m)
    for mode in modes:
      if mode == "gated" and n < 2 * k or mode == "w4a16" and m > 256:
        continue
      us, error = _int4(n, k, m, mode)
      row = {"n": n, "k": k, "m": m, "mode": mode, "epilogue": "linear"}
      if mode == "gated":
        row |= {"mode": "e4m3", "epilogue": "silu(gate) * up"}
      fp8 = [v for name, v in baselines.items() if name.startswith("fp8")]
      after = baselines["xla_silu_mul"] if mode == "gated" else 0
      rows.append(
        row
        | {
          "us": us,
          "tbps": n * k / 2 / us / 1e6,
          "tflops": 2 * n * k * m / us / 1e6,
          "relative_error": error,
          "speedup_over_fp8": (min(fp8) + after) / us if fp8 else None,
          "baselines": baselines,
        }
      )
  return rows


def _int4(n, k, m, mode):
  """Microseconds, and the error against f32 of the same operands."""
  scale = jnp.bfloat16 if mode in ("bf16", "w4a16") else jnp.float8_e4m3fn
  count = copies(n * k / 2)
  weights = [weight(i, n, k, scale, mode) for i in range(count)]
  x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
  x_scale = None
  if mode != "w4a16":
    x, x_scale = quantize_e4m3(x)
  tuning = tunings.choose(m, weights[0])
  call = jax.jit(
    lambda w, x, x_scale: int4_matmul(x, w, x_scale, tuning=tuning)
  )
  us = common.device_us(call, [(w, x, x_scale) for w in weights])
  return us, _error(call(weights[0], x, x_scale), weights[0], x, x_scale)


def weight(seed, n, k, scale, mode):
  keys = jax.random.split(jax.random.key(seed), 2)
  encoding = "sign_magnitude" if scale == jnp.float8_e4m3fn else "subnormal"
  if mode == "w4a16":
    encoding = "biased"
  group_scale = jax.random.uniform(
    keys[1], (k // 128, n), minval=0.25, maxval=4
  )
  return layouts.PackedInt4(
    codes=jax.random.bits(keys[0], (k // 128, n, 64), jnp.uint8),
    scale=group_scale.astype(scale),
    row_scale=jnp.ones(n, jnp.float32),
    shape=(n, k),
    encoding=encoding,
    activation="bf16" if mode == "w4a16" else "e4m3",
    gated=mode == "gated",
  )


def _error(y, w, x, x_scale):
  """||y - wanted|| / ||wanted|| of 64 outputs of up to 8 tokens."""
  n = w.shape[0]
  rows = jnp.arange(64)
  if w.gated:
    rows = jnp.concatenate([rows, n // 2 + rows])
  part = w.replace(
    codes=w.codes[:, rows],
    scale=w.scale[:, rows],
    row_scale=w.row_scale[rows],
    shape=(len(rows), w.shape[1]),
  )
  x_scale = None if x_scale is None else x_scale[:8]
  wanted = reference.int4_matmul(x[:8], part, x_scale, out_dtype=jnp.float32)
  y = y[:8, :64].astype(jnp.float32)
  return float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted))


def _baselines(n, k, m):
  """{name: us} of the same product in other formats."""
  key = jax.random.key(1)
  x = jax.random.normal(key, (m, k), jnp.bfloat16)
  h = jax.random.normal(key, (m, n), jnp.bfloat16)
  results = {"xla_silu_mul": common.device_us(jax.jit(_silu_mul), [(h,)])}
  del h
  if m <= 1024:
    weights = [
      jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16)
      for i in range(copies(2 * n * k))
    ]
    call = jax.jit(lambda w, x: x @ w)
    results["xla_bf16"] = common.device_us(call, [(w, x) for w in weights])
    del weights
  if m in (16, 1024):
    packed = [
      (
        jax.random.bits(jax.random.key(i), (n, k // 2), jnp.uint8),
        jnp.ones((n, k // 128), jnp.bfloat16),
      )
      for i in range(copies(n * k / 2))
    ]
    call = jax.jit(_naive_int4)
    results["xla_int4"] = common.device_us(call, [(*w, x) for w in packed])
    del packed
  return results | _torch_fp8(n, k, m)


def _silu_mul(h):
  gate, up = jnp.split(h, 2, axis=1)
  return jax.nn.silu(gate) * up


def _naive_int4(codes, scale, x):
  groups = unpack_int4(codes).reshape(*scale.shape, -1).astype(jnp.bfloat16)
  return x @ (groups * scale[..., None]).reshape(codes.shape[0], -1).T


def _torch_fp8(n, k, m):
  try:
    import torch  # pyrefly: ignore[missing-import]
  except ImportError:
    return {}
  make = lambda *shape: torch.randn(
    shape, device="cuda", dtype=torch.bfloat16
  ).to(torch.float8_e4m3fn)
  ones = lambda *shape: torch.ones(shape, device="cuda")
  x = make(m, k)
  weights = [make(n, k) for _ in range(copies(n * k))]
  results = {}
  for name, scales in (
    ("fp8_tensorwise", (ones(), ones())),
    ("fp8_rowwise", (ones(m, 1), ones(1, n))),
  ):

    def call(w, scales=scales):
      torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16)

    results[name] = common.device_us(
      call, [(w,) for w in weights], sync=torch.cuda.synchronize
    )
  del weights
  torch.cuda.empty_cache()
  return results


def copies(size: float) -> int:
  return max(2, round(_ROTATED_BYTES / size))


def plot(rows: Iterable[common.Row], axes: Any) -> None:
  for n, k in SHAPES.values():
    points = [
      (row["m"], row["speedup_over_fp8"])
      for row in rows
      if (row["n"], row["k"]) == (n, k)
      and row.get("mode") == "e4m3"
      and row["epilogue"] == "linear"
      and row["speedup_over_fp8"]
    ]
    axes.plot(*zip(*points), marker="o", label=f"{n} x {k}")
  axes.axhline(1, color="gray")
  axes.set(xscale="log", xlabel="tokens", ylabel="times faster than cuBLAS FP8")
  axes.legend()
