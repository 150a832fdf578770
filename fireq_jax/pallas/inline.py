"""Functions on registers inside kernels, with their meaning in plain JAX."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm
from jaxlib.mlir.dialects import math as mlir_math

ONE_A_THREAD = plgpu.Layout.WG_STRIDED((128,), 1)
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
# JAX 0.10 wants an index of `load`, 0.11 deprecates it, 0.12 has none.
_WHOLE = ((),) if _INDEX is not None and _INDEX.default is _INDEX.empty else ()


def inline(
  emit: Callable[..., Any],
  model: Callable[..., Any],
  *,
  arg_types: tuple,
  return_type: plgpu.ShapeDtypeStruct | tuple[plgpu.ShapeDtypeStruct, ...],
) -> Callable[..., Any]:
  """Returns a function on arrays in registers.

  Args:
    emit: builds its instructions from `FragmentedArray`s.
    model: computes the same from `jax.Array`s; an interpreter of kernels
      finds it as `interpret_model`.
    arg_types: layouts of the arguments.
    return_type: shape, dtype and layout of the result, or of each.
  """
  function = lambda _, *args: emit(*args)
  function.interpret_model = model  # pyrefly: ignore[missing-attribute]
  return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(
    function
  )


@dataclasses.dataclass(frozen=True)
class Inlined:
  """Emits what has no meaning in plain JAX; an interpreter knows it by `kind`.

  Attributes:
    emit: builds instructions, as `plgpu.inline_mgpu` has it.
    kind: what they do.
    encoding: of the INT4 codes among the arguments.
    warpgroups: that take part.
  """

  emit: Callable[..., Any]
  kind: str
  encoding: str | None = None
  warpgroups: int | None = None

  def __call__(self, *args):
    return self.emit(*args)


def fence_async_proxy() -> None:
  """Orders reads of shared memory before the copies that overwrite it."""

  def emit(_):
    nvvm.fence_proxy(
      nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
    )

  plgpu.inline_mgpu()(Inlined(emit, "fence"))()


def sync_threads(warpgroups: int) -> None:
  """Waits for all threads of a CTA of `warpgroups` warpgroups."""

  def emit(_):
    gpu.barrier()

  plgpu.inline_mgpu()(Inlined(emit, "sync", warpgroups=warpgroups))()


def sync_warpgroup() -> None:
  """Waits for the threads of a warpgroup."""

  def emit(_):
    mgpu.utils.warpgroup_barrier()

  emit.interpret_model = lambda: ()  # pyrefly: ignore[missing-attribute]
  plgpu.inline_mgpu()(emit)()


def divide(x: Any, y: Any, layout: Any) -> Any:
  """f32 x / y, y a scalar and neither too close to the smallest f32.

  Rounded to nearest like a division, for one instruction more than a product.
  """

  def emit(x, y):
    [y] = y.registers.flat
    one = arith.constant(y.type, 1.0)
    rest = lambda inverse: mlir_math.fma(arith.negf(inverse), y, one)
    inverse = arith.divf(one, y)  # may be an approximation
    inverse = mlir_math.fma(rest(inverse), inverse, inverse)
    beyond = arith.mulf(rest(inverse), inverse)  # bits that do not fit
    out = np.empty_like(x.registers)
    for index, register in np.ndenumerate(x.registers):
      out[index] = vector(
        [
          mlir_math.fma(value, inverse, arith.mulf(value, beyond))
          for value in elements(register)
        ]
      )
    return array(out, x.layout)

  return inline(
    emit,
    lambda x, y: x / y,
    arg_types=(layout, plgpu.Layout.WG_SPLAT(())),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout),
  )(x, y)


def widen(x: Any, layout: Any) -> Any:
  """f32 of f32 or bf16, for an instruction each where those lie in pairs."""
  if x.dtype == jnp.float32:
    return x

  def emit(x):
    f32 = ir.F32Type.get()
    out = np.empty_like(x.registers)
    for index, register in np.ndenumerate(x.registers):
      pairs, odd = divmod(ir.VectorType(register.type).shape[0], 2)
      if odd:
        wide = ir.VectorType.get((2 * pairs + 1,), f32)
        out[index] = arith.extf(wide, register)
        continue
      words = mgpu.utils.bitcast(register, ir.VectorType.get((pairs,), i32()))
      bits = [
        half
        for word in elements(words)
        for half in (
          arith.shli(word, constant(16)),
          arith.andi(word, constant(-(2**16))),
        )
      ]
      out[index] = vector([arith.bitcast(f32, half) for half in bits])
    return array(out, x.layout)

  return inline(
    emit,
    lambda x: x.astype(jnp.float32),
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout),
  )(x)


def load(ref: Any, layout: Any, *, optimized: bool = False) -> Any:
  """Loads from shared or global memory, insisting on speed if `optimized`."""
  return plgpu.load(ref, *_WHOLE, layout=layout, optimized=optimized)


def store(ref: Any, value: Any) -> None:
  """Stores to shared or global memory, without insisting on speed."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:  # JAX before 0.12
    ref[...] = value


def swizzled(
  shape: tuple[int, ...], dtype: Any, columns: int | None = None
) -> Any:
  """Shared memory tiled and swizzled for TMA and wgmma, by `columns`."""
  bits = 8 * jnp.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle((columns or shape[-1]) * bits)
  transforms = (
    plgpu.TilingTransform((8, 8 * swizzle // bits)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def i32() -> Any:
  return ir.IntegerType.get_signless(32)


def constant(value: int) -> Any:
  return arith.constant(i32(), ir.IntegerAttr.get(i32(), value))


def assembly(result: Any, operands: list, text: str, constraints: str) -> Any:
  """One instruction, or a block of them, of PTX."""
  return llvm.inline_asm(result, operands, text, constraints)


def fixed_assembly(
  text: str, operands: Any = (), inputs: str = "", result: Any = None
) -> Any:
  """PTX that must stay where it is."""
  constraints = inputs + ("," if inputs else "") + "~{memory}"
  return llvm.inline_asm(
    result or ir.Type.parse("!llvm.void"),
    list(operands),
    text,
    constraints,
    has_side_effects=True,
  )


def shared_address(ref: Any) -> Any:
  """Of shared memory, 32 bits."""
  return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))


def global_address(ref: Any) -> Any:
  """Of global memory, 64 bits."""
  i64 = ir.IntegerType.get_signless(64)
  return llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))


def elements(register: Any) -> list:
  """The elements of a register of a `FragmentedArray`, which is a vector."""
  n = ir.VectorType(register.type).shape[0]
  return [llvm.extractelement(register, constant(i)) for i in range(n)]


def vector(values: list) -> Any:
  out = llvm.mlir_undef(ir.VectorType.get((len(values),), values[0].type))
  for i, value in enumerate(values):
    out = llvm.insertelement(out, value, constant(i))
  return out


def array(
  registers: Any, layout: Any, is_signed: bool | None = None
) -> mgpu.FragmentedArray:
  return mgpu.FragmentedArray(
    _registers=registers, _layout=layout, _is_signed=is_signed
  )


def one_a_thread(value: Any) -> mgpu.FragmentedArray:
  """An array of 128 in layout `ONE_A_THREAD`; `value` is a thread's."""
  registers = np.empty((1,), dtype=object)
  registers[0] = vector([value])
  signed = True if value.type == i32() else None
  return mgpu.FragmentedArray(
    _registers=registers,
    _layout=mgpu.WGStridedFragLayout((128,), 1),
    _is_signed=signed,
  )


def run_words(count: int, text: str, operands: Any, inputs: str) -> list:
  """`fixed_assembly` with `count` i32 results, $0 and so on."""
  words = ", ".join(["i32"] * count)
  kind = ir.Type.parse(f"!llvm.struct<({words})>") if count > 1 else i32()
  result = fixed_assembly(text, operands, "=&r," * count + inputs, kind)
  if count == 1:
    return [result]
  return [llvm.extractvalue(i32(), result, (i,)) for i in range(count)]
