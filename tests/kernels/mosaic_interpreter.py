"""Completes JAX's Mosaic GPU interpreter for the kernels' sake, on a CPU.

JAX 0.11.2 interprets Mosaic GPU kernels thread by thread, with shared memory,
TMA, barriers and a race detector. Three things are missing:

- wgmma with the A operand in registers;
- wgmma as the asynchronous instruction it is: here it runs at the wait that
  covers it, so that memory reused too early gives a race and a wrong result;
- inlined PTX: its meaning is looked up by the `kind` of the inlined function.

This patches private modules of one JAX version, so it lives with the tests.
"""

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback, state
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import (
  gpu_callbacks,
  interpret_pallas_call,
  jaxpr_interpret,
  shared_memory,
)
from jax._src.pallas.mosaic_gpu.interpret.params import (
  InterpretGPUParams,
  force_gpu_interpret_mode,
)
from jax._src.state import indexing

from fireq_jax.pallas import dequant

VERSION = "0.11.2"

# Copies take turns at so many clocks. One that shares its clock with a later,
# awaited copy counts as awaited as well, which hides races.
_PARAMS = InterpretGPUParams(detect_races=True, num_tma_threads_per_device=1000)

_pending = {}  # thread -> [(multiplication, its clock)], oldest first
_lock = threading.Lock()


@contextlib.contextmanager
def interpret():
  """Runs Mosaic GPU kernels traced inside on the CPU; yields `races()`."""
  saved = (
    gpu_callbacks.wgmma,
    gpu_callbacks.wgmma_accumulator_deref,
    jaxpr_interpret.JaxprInterpreter.interpret,
  )
  guard = gpu_callbacks.fail_on_exception
  gpu_callbacks.wgmma = guard(_wgmma)
  gpu_callbacks.wgmma_accumulator_deref = guard(
    functools.partial(_deref, original=saved[1])
  )
  jaxpr_interpret.JaxprInterpreter.interpret = functools.partialmethod(
    _interpret, original=saved[2]
  )
  _pending.clear()
  try:
    with force_gpu_interpret_mode(_PARAMS):
      yield lambda: interpret_pallas_call.get_races().races_found
  finally:
    (
      gpu_callbacks.wgmma,
      gpu_callbacks.wgmma_accumulator_deref,
      jaxpr_interpret.JaxprInterpreter.interpret,
    ) = saved
    gpu_callbacks.reset_gpu_interpret_mode_state()


def _wgmma(
  *,
  token,
  mesh_location,
  thread,
  acc_allocation_key_as_array,
  acc_transforms,
  a_allocation_key_as_array,
  a_transforms,
  b_allocation_key_as_array,
  b_transforms,
  source_info=None,
):
  memory = gpu_callbacks._get_shared_memory()
  where = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)

  def access(key, transforms):
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    transforms = gpu_callbacks._remove_noop_transforms(transforms)
    return key, memory.access(key, jax.tree.map(int, transforms))

  def read(source):
    return np.asarray(
      memory.get_buffer_content(
        *source, thread, increment_clock=False, logging_info=where
      )[0]
    )

  acc = access(acc_allocation_key_as_array, acc_transforms)
  operands = [access(b_allocation_key_as_array, b_transforms)]
  a_registers = np.asarray(a_allocation_key_as_array)
  if a_registers.ndim != 2:
    operands.append(access(a_allocation_key_as_array, a_transforms))
  # The tensor core reads shared memory through the async proxy, at a time of
  # its own, which the issuing thread learns about only by waiting.
  memory.incr_clock(thread)
  clock = memory.get_clock(thread).copy()
  clock.inc(memory.get_next_tma_thread_id())
  for key, part in operands:
    gpu_callbacks.get_races().check_read(
      thread, clock.async_smem_clock.copy(), key, part, source_info=source_info
    )

  def multiply():
    b = read(operands[0]).astype(np.float32)
    a = a_registers if a_registers.ndim == 2 else read(operands[1])
    with np.errstate(invalid="ignore"):  # rows that nobody loads are NaN
      total = read(acc) + a.astype(np.float32) @ b
    memory.store_buffer_content(
      *acc, total, thread, increment_clock=False, logging_info=where
    )

  with _lock:
    _pending.setdefault(thread, []).append((multiply, clock))
  return token


def _finish(thread, in_flight):
  """Runs a thread's multiplications but for the `in_flight` latest."""
  with _lock:
    queue = _pending.get(thread, [])
    count = max(0, len(queue) - in_flight)
    due, _pending[thread] = queue[:count], queue[count:]
  memory = gpu_callbacks._get_shared_memory()
  for multiply, clock in due:
    multiply()
    with memory.lock:
      memory.clocks[thread].update(clock)


def _deref(*, original, **kwargs):
  if kwargs["wait_n"] is not None:
    _finish(kwargs["thread"], int(kwargs["wait_n"]))
  return original(**kwargs)


def _wait(token, thread, *, n):
  _finish(thread, n)
  return token


def _wgmma_wait(interpreter, eqn, token, _):
  wait = functools.partial(_wait, n=eqn.params["n"])
  token = callback.io_callback(
    wait, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, interpreter.thread
  )
  return token, []


def _inline(interpreter, eqn, token, values):
  emit = eqn.params["mgpu_fn"]
  if hasattr(emit, "interpret_model"):
    tree = eqn.params["pytree_args"]
    args = jax.tree.unflatten(tree, values[: tree.num_leaves])
    return token, jax.tree.leaves(emit.interpret_model(*args))
  if emit.kind == "fence":
    commit = functools.partial(
      gpu_callbacks.commit_smem, source_info=eqn.source_info
    )
    token = callback.io_callback(
      commit,
      gpu_callbacks.TOKEN_SHAPE_DTYPE,
      token=token,
      mesh_location=interpreter.mesh_location,
      thread=interpreter.thread,
    )
    return token, []
  if emit.kind == "sync":
    token = gpu_callbacks.call_named_barrier(
      token,
      interpreter.mesh_location,
      interpreter.thread,
      0,
      num_threads=128 * emit.warpgroups,
      sync=True,
      source_info=eqn.source_info,
    )
    return token, []
  if emit.kind == "join" and len(values) > 1:  # it has been joined already
    return token, [values[1]]
  if emit.kind == "pick":
    whole = dequantize(values[0], values[1:], emit.encoding)
    return token, [whole] * len(eqn.outvars)
  if emit.kind == "put_row":
    return _put_row(interpreter, eqn, token, *values), []
  if emit.kind in ("begin", "multiply"):
    return _quarters(interpreter, eqn, token, values)
  assert emit.kind == "biased" or emit.encoding == "subnormal"
  return token, [dequantize(values[0], [], emit.encoding)]


def _put_row(interpreter, eqn, token, codes, scale, row, _, *targets):
  """A row of codes and its scale, into an operand and a vector of scales."""
  blocks, tiles, _, rows, columns = eqn.invars[4].aval.shape
  for target, shape, index, value in (
    (
      targets[0],
      (blocks, tiles * rows, columns),
      (slice(None), row, slice(None)),
      codes.reshape(blocks, columns),
    ),
    (targets[1], (tiles * rows,), (row,), scale),
  ):
    token, _ = gpu_callbacks.call_swap(
      token=token,
      result_shape_and_dtype=jax.ShapeDtypeStruct(value.shape, value.dtype),
      mesh_location=interpreter.mesh_location,
      thread=interpreter.thread,
      allocation_key_as_array=target,
      transforms=(indexing.NDIndexer.from_indices_shape(index, shape),),
      val=value,
      mask=None,
      source_info=eqn.source_info,
    )
  return token


def _quarters(interpreter, eqn, token, values):
  """Reads what `int4_quarters` does; sums to which products are added, if so.

  What it begins with is not modelled: `multiply` reads all codes and scales.
  """
  count = eqn.params["pytree_args"].num_leaves
  transforms = jax.tree.unflatten(
    eqn.params["pytree_ref_transforms"], values[count:]
  )
  operands = []
  for i, variable in enumerate(eqn.invars[:count]):
    ref = variable.aval
    if not isinstance(ref, state.AbstractRef):
      continue
    for transform in transforms[i]:
      ref = transform.transform_type(ref)
    token, operand = gpu_callbacks.call_get(
      token=token,
      result_shape_and_dtype=jax.ShapeDtypeStruct(ref.shape, ref.dtype),
      mesh_location=interpreter.mesh_location,
      thread=interpreter.thread,
      allocation_key_as_array=values[i],
      transforms=transforms[i],
      source_info=eqn.source_info,
    )
    operands.append(operand)
  outs = [v.aval for v in eqn.outvars]
  if eqn.params["mgpu_fn"].kind == "begin":
    return token, [jnp.zeros(out.shape, out.dtype) for out in outs]
  codes, scales, x = operands
  # Of 16 rows that a warp multiplies, 8 are of a gate and 8 of its up rows.
  together = lambda x: x.reshape(len(x), -1, 8 * 2 // len(x), x.shape[-1])
  codes = together(codes).swapaxes(0, 1).reshape(-1, codes.shape[-1])
  scales = jnp.swapaxes(scales, 0, 1)[..., None]  # [G, H, 64 / H, 1]
  scales = [together(x).swapaxes(0, 1).reshape(-1) for x in scales]
  weights = dequantize(codes, scales, eqn.params["mgpu_fn"].encoding)
  weights, x = weights.astype(jnp.float32), x.astype(jnp.float32)
  products = jnp.split(weights @ x.T, len(outs), axis=1)
  return token, [a + b for a, b in zip(values, products)]


def _accumulator_store(interpreter, eqn, token, values):
  key, value = values
  token, _ = gpu_callbacks.call_swap(
    token=token,
    result_shape_and_dtype=jax.ShapeDtypeStruct(value.shape, value.dtype),
    mesh_location=interpreter.mesh_location,
    thread=interpreter.thread,
    allocation_key_as_array=key,
    transforms=(),
    val=value,
    mask=None,
    source_info=eqn.source_info,
  )
  unused = eqn.outvars[0].aval
  return token, [jnp.zeros(unused.shape, unused.dtype)]


def dequantize(words, scales, encoding):
  """What the inlined PTX of `fireq_jax.pallas.dequant` computes.

  words: uint8 [R, C / 2]; scales: e4m3 [R] for each equal part of C, or none.
  """
  nibbles = jnp.stack([words & 15, words >> 4], axis=-1).astype(jnp.int32)
  nibbles = nibbles.reshape(words.shape[0], -1, 4, 8)  # row, chunk, thread, i
  if encoding == "biased":
    codes = nibbles - 8
    order = lambda t, i: 8 * (i % 4) + 2 * t + i // 4
  else:
    order = lambda t, i: 16 * (i // 4) + 4 * t + i % 4
    if encoding == "twos_complement":
      codes = jnp.where(nibbles > 7, nibbles - 16, nibbles)
    else:
      top = nibbles >> 3
      negative = jnp.concatenate([top[..., 1::2], top[..., 0::2]], axis=-1)
      size = nibbles & 7
      if encoding == "subnormal":
        odd = jnp.roll(size[..., 1::2], 1, axis=-1)
        size = jnp.concatenate([size[..., 0::2], odd], axis=-1)
      codes = jnp.where(negative == 1, -size, size)
  places = np.array([[order(t, i) for i in range(8)] for t in range(4)])
  codes = codes.reshape(*codes.shape[:2], 32)[..., np.argsort(places.ravel())]
  values = codes.reshape(words.shape[0], -1).astype(jnp.float32)
  values *= dequant.unit(encoding)
  if scales:
    values = values.reshape(words.shape[0], len(scales), -1)
    factor = jnp.stack([s.astype(jnp.float32) for s in scales], axis=1)
    values = (values * factor[..., None]).reshape(words.shape[0], -1)
    values = jnp.clip(values, -448, 448)
  dtype = jnp.bfloat16 if encoding == "biased" else jnp.float8_e4m3fn
  return values.astype(dtype)


_RULES = {
  primitives.wgmma_wait_p: _wgmma_wait,
  primitives.inline_mgpu_p: _inline,
  primitives.wgmma_accumulator_store_p: _accumulator_store,
}


def _interpret(self, jaxpr, token, *args, original):
  """Interprets equations one by one where one of them has a rule here."""
  if not any(eqn.primitive in _RULES for eqn in jaxpr.eqns):
    return original(self, jaxpr, token, *args)
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args))
  is_literal = lambda v: isinstance(v, jax_core.Literal)
  read = lambda v: v.val if is_literal(v) else env[v]
  for eqn in jaxpr.eqns:
    if eqn.primitive in _RULES:
      rule = _RULES[eqn.primitive]
      token, outs = rule(self, eqn, token, [read(v) for v in eqn.invars])
      env.update(zip(eqn.outvars, outs))
      continue
    inputs = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))
    outvars = [v for v in eqn.outvars if not isinstance(v, jax_core.DropVar)]
    one = jaxpr.replace(
      constvars=[],
      invars=inputs,
      outvars=outvars,
      eqns=[eqn],
      debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    token, outs = original(self, one, token, *[env[v] for v in inputs])
    env.update(zip(outvars, outs))
  return token, [read(v) for v in jaxpr.outvars]
