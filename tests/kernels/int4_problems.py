"""Random weights and activations of INT4 matmuls, and their shapes."""

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.pallas import layouts
from fireq_jax.qtensor import QTensor, pack_int4

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16


def qtensor(rng, n, c, *, scale=E4M3, group=128, lowest=-7, activation="e4m3"):
  codes = rng.integers(lowest, 8, (n, c)).astype(np.int8)
  return QTensor(
    codes=pack_int4(jnp.asarray(codes)),
    scale=jnp.asarray(rng.uniform(0.25, 4, (n, c // group))).astype(scale),
    tensor_scale=jnp.float32(2.0 ** rng.integers(-3, 4)),
    activation=activation,
  )


def activations(rng, t, c, dtype):
  x = rng.normal(size=(t, c)).astype(np.float32)
  scale = rng.uniform(0.5, 1.5, t).astype(np.float32)
  x = jnp.asarray(x).astype(E4M3 if dtype == "e4m3" else BF16)
  return x, jnp.asarray(scale) if dtype == "e4m3" else None


def problem(rng, n, c, t, *, kind="e4m3", lowest=-7, gated=False, **options):
  """Arguments and keyword arguments of an `int4_matmul`."""
  scale = E4M3 if kind == "e4m3" else BF16
  activation = "bf16" if kind == "bf16" else "e4m3"
  group = options.pop("group", 128)
  make = lambda n: qtensor(
    rng, n, c, scale=scale, group=group, lowest=lowest, activation=activation
  )
  parts = [make(n // 2), make(n // 2)] if gated else [make(n)]
  w = layouts.pack_int4_weights(parts, gated=gated, asymmetric=lowest == -8)
  x, x_scale = activations(rng, t, c, activation)
  if options.get("epilogue") in ("add", "mul"):
    shape = t, n // 2 if gated else n
    options["operand"] = jnp.asarray(rng.normal(size=shape)).astype(BF16)
  if options.pop("bias", False):
    options["bias"] = jnp.asarray(rng.normal(size=n)).astype(BF16)
  return (x, w, x_scale), options


MODES = {
  "e4m3": dict(scale=E4M3, activation="e4m3", encoding="sign_magnitude"),
  "exact": dict(scale=BF16, activation="e4m3", encoding="subnormal"),
  "bf16": dict(scale=BF16, activation="bf16", encoding="biased"),
}


def shapes(t, n, c, *, mode, gated=False):
  """Like `problem`, with shapes for arrays."""
  struct, f32 = jax.ShapeDtypeStruct, jnp.float32
  mode = MODES[mode]
  w = layouts.PackedInt4(
    codes=struct((c // 128, n, 64), jnp.uint8),
    scale=struct((c // 128, n), mode["scale"]),
    row_scale=struct((n,), f32),
    shape=(n, c),
    encoding=mode["encoding"],
    activation=mode["activation"],
    gated=gated,
  )
  x_scale = None if mode["activation"] == "bf16" else struct((t,), f32)
  return struct((t, c), w.activation_dtype), w, x_scale
