"""Programs of one thread, for kernels that move rows without tensor cores.

Where every thread works on words of its own, at addresses and under conditions
of its own, a kernel is plainest as the program of one thread. It is a function
of a `Threads` and of references to global memory; its values are registers, on
which Python's operators act. A register is an i32, an f32 or a truth value;
memory is read and written in 32-bit words, or less for the odd scale.

`run` emits the program as PTX. A test can as well call it with an object that
has the methods of `Threads` and holds a register of all threads in a NumPy
array, on which the same operators act.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from fireq_jax.pallas.inline import (
  assembly,
  fixed_assembly,
  global_address,
  i32,
)

BLOCK = 128  # threads of a CTA
WARP = 32


def run(program: Callable[..., None], *refs: Any) -> None:
  """Runs `program(threads, *refs)` in each thread of a kernel's CTAs.

  The kernel has one thread axis of one warpgroup, a grid of one axis, and
  `LoweringSemantics.Lane`.
  """

  def emit(_, *refs):
    program(Threads(), *refs)

  plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(emit)(*refs)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Register:
  """A value of one thread."""

  value: Any

  def __add__(self, other):
    return _binary(self, other, arith.addi, "add.rn.f32")

  __radd__ = __add__

  def __sub__(self, other):
    return _binary(self, other, arith.subi, "sub.rn.f32")

  def __mul__(self, other):
    return _binary(self, other, arith.muli, "mul.rn.f32")

  def __floordiv__(self, other):
    """Of numbers that are not negative."""
    return _binary(self, other, arith.divui)

  def __mod__(self, other):
    return _binary(self, other, arith.remui)

  def __and__(self, other):
    return _binary(self, other, arith.andi)

  def __or__(self, other):
    return _binary(self, other, arith.ori)

  def __xor__(self, other):
    return _binary(self, other, arith.xori)

  def __invert__(self):
    ones = -1 if self.value.type == i32() else 1
    return Register(arith.xori(self.value, _constant(ones, self.value.type)))

  def __lshift__(self, other):
    return _binary(self, other, arith.shli)

  def __rshift__(self, other):
    return _binary(self, other, arith.shrui)

  def __lt__(self, other):
    return _compare(self, other, arith.CmpIPredicate.slt, "setp.lt.f32")

  def __ge__(self, other):
    return _compare(self, other, arith.CmpIPredicate.sge, "setp.ge.f32")


class Threads:
  """What a thread can do."""

  @property
  def warp(self) -> Register:
    """The warp's number in the grid."""
    warps = BLOCK // WARP
    cta = Register(_index(gpu.block_id(gpu.Dimension.x)))
    return cta * warps + Register(mgpu.utils.warp_idx())

  @property
  def index(self) -> Register:
    """The thread's number in its warpgroup."""
    return Register(_index(gpu.thread_id(gpu.Dimension.x))) % BLOCK

  @property
  def lane(self) -> Register:
    return self.index % WARP

  def load(
    self, ref: Any, index: Any, words: int, when: Register | None = None
  ) -> list[Register]:
    """Words from element `index` on, or zeros: 1, 2 or 4, aligned to all."""
    address = _address(ref, index)
    outs = ", ".join(f"${i}" for i in range(words))
    vector = "" if words == 1 else f".v{words}"
    text = f"ld.global{vector}.b32 {{{outs}}}, [${words}];"
    constraints = ",".join(["=&r"] * words + ["l"])
    operands = [address]
    if when is not None:
      zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(words))
      text = (
        f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {zeros} @p {text} }}"
      )
      constraints += ",r"
      operands.append(_word(when))
    return _results(text, constraints, operands, words)

  def store(
    self,
    ref: Any,
    index: Any,
    values: Sequence[Register],
    when: Register | None = None,
    bits: int = 32,
  ) -> None:
    """Writes words, or the low `bits` of one, from element `index` on."""
    n = len(values)
    registers = [v.value for v in values]
    kind = "r"
    if bits < 32:
      # The narrowest register of PTX has 16 bits.
      half = ir.IntegerType.get_signless(16)
      registers = [arith.trunci(half, x) for x in registers]
      kind = "h"
    ins = ", ".join(f"${i}" for i in range(n))
    vector = "" if n == 1 else f".v{n}"
    text = f"st.global{vector}.b{bits} [${n}], {{{ins}}};"
    constraints = ",".join([kind] * n + ["l"])
    operands = [*registers, _address(ref, index)]
    if when is not None:
      text = f"{{ .reg .pred p; setp.ne.b32 p, ${n + 1}, 0; @p {text} }}"
      constraints += ",r"
      operands.append(_word(when))
    llvm.inline_asm(None, operands, text, constraints, has_side_effects=True)

  def fence(self) -> None:
    """Orders a thread's accesses to memory before it with those after it."""
    fixed_assembly("fence.acq_rel.gpu;")

  def arrive(self, counter: Register, counters: int, of: int) -> Register:
    """Counts the warps that come to one of `counters` counters.

    Each of the program's launches must bring `of` warps to it. Counters are
    the kernel's own, zero when it is loaded and again after the last arrival,
    so launches of the kernel must not overlap; in a stream they do not.

    Returns:
      How many came before.
    """
    text = (
      "{ .reg .pred p; .reg .b64 a;"
      f" .global .align 4 .u32 arrived[{counters}];"
      " bar.warp.sync 0xffffffff; setp.eq.s32 p, $2, 0; mov.b64 a, arrived;"
      " mad.wide.u32 a, $1, 4, a;"
      f" @p atom.global.acq_rel.gpu.inc.u32 $0, [a], {of - 1};"
      " shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; }"
    )
    operands = [counter.value, self.lane.value]
    return Register(fixed_assembly(text, operands, "=&r,r,r", i32()))

  @contextlib.contextmanager
  def when(self, condition: Register) -> Iterator[None]:
    """Runs what is inside only where all lanes of the warp agree to."""
    branch = scf.IfOp(condition.value)
    with ir.InsertionPoint(branch.then_block):
      yield
      scf.yield_([])

  def shuffle_xor(self, x: Register, lanes: int) -> Register:
    """x of the lane whose number differs from one's own in the bit `lanes`."""
    return Register(mgpu.utils.shfl_bfly(x.value, lanes))

  def select(self, condition: Register, yes: Any, no: Any) -> Register:
    like = next((x for x in (yes, no) if isinstance(x, Register)), None)
    yes, no = (_as_register(x, like).value for x in (yes, no))
    return Register(arith.select(condition.value, yes, no))

  def as_f32(self, x: Register) -> Register:
    """The f32 with the bits of x."""
    return Register(arith.bitcast(ir.F32Type.get(), x.value))

  def bits(self, x: Register) -> Register:
    """The bits of an f32."""
    return Register(arith.bitcast(i32(), x.value))

  def permute(self, low: Any, high: Any, places: Any) -> Register:
    """Four bytes of eight, by number in the low nibbles of `places`."""
    words = [_as_register(x, None) for x in (low, high, places)]
    return _word_of("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", *words)

  def absolute(self, x: Register) -> Register:
    return _f32("abs.f32 $0, $1;", x)

  def maximum(self, a: Register, b: Any) -> Register:
    """NaN if a or b is."""
    return _f32("max.NaN.f32 $0, $1, $2;", a, _as_register(b, a))

  def minimum(self, a: Register, b: Any) -> Register:
    return _f32("min.NaN.f32 $0, $1, $2;", a, _as_register(b, a))

  def exp2(self, x: Register) -> Register:
    return _f32("ex2.approx.ftz.f32 $0, $1;", x)

  def divide(self, a: Register, b: Register) -> Register:
    """a / b to 2 units in the last place, where 2^-126 <= |b| <= 2^126.

    The bits are those of XLA's division on a GPU (div.full.f32), which scales
    a and b outside of that range.
    """
    return a * _f32("rcp.approx.ftz.f32 $0, $1;", b)

  def pack_bf16(self, low: Register, high: Register) -> Register:
    """Two f32 rounded to bf16, in one word."""
    return _word_of("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", high, low)

  def pack_e4m3(self, low: Register, high: Register) -> Register:
    """Two f32 rounded to e4m3, saturating, in the low half of a word."""
    return _word_of(
      "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, $1, $2;"
      " mov.b32 $0, {h, 0}; }",
      "=r,f,f",
      high,
      low,
    )

  def unpack_e4m3(self, x: Register) -> Register:
    """The low byte of x, an e4m3, as f32."""
    return _f32(
      "{ .reg .b16 h, g; .reg .b32 w; mov.b32 {h, g}, $1;"
      " cvt.rn.f16x2.e4m3x2 w, h; mov.b32 {h, g}, w; cvt.f32.f16 $0, h; }",
      x,
      constraints="=f,r",
    )


def _constant(number, type_):
  if type_ == ir.F32Type.get():
    return arith.constant(type_, float(number))
  if number >= 2**31:
    number -= 2**32
  return arith.constant(type_, ir.IntegerAttr.get(type_, number))


def _as_register(x, like):
  if isinstance(x, Register):
    return x
  type_ = i32() if like is None else like.value.type
  return Register(_constant(x, type_))


def _binary(a, b, of_integers, of_floats=None):
  b = _as_register(b, a)
  if a.value.type == ir.F32Type.get():
    return _f32(f"{of_floats} $0, $1, $2;", a, b)
  return Register(of_integers(a.value, b.value))


def _compare(a, b, of_integers, of_floats):
  b = _as_register(b, a)
  if a.value.type != ir.F32Type.get():
    return Register(arith.cmpi(of_integers, a.value, b.value))
  word = _word_of(
    f"{{ .reg .pred p; {of_floats} p, $1, $2; selp.b32 $0, 1, 0, p; }}",
    "=r,f,f",
    a,
    b,
  )
  return Register(arith.trunci(ir.IntegerType.get_signless(1), word.value))


def _f32(text, *operands, constraints=None):
  constraints = constraints or ",".join(["=f"] + ["f"] * len(operands))
  values = [x.value for x in operands]
  return Register(assembly(ir.F32Type.get(), values, text, constraints))


def _word_of(text, constraints, *operands):
  return Register(
    assembly(i32(), [x.value for x in operands], text, constraints)
  )


def _results(text, constraints, operands, n):
  if n == 1:
    return [Register(assembly(i32(), operands, text, constraints))]
  struct = llvm.StructType.get_literal([i32()] * n)
  out = assembly(struct, operands, text, constraints)
  return [Register(llvm.extractvalue(i32(), out, (i,))) for i in range(n)]


def _word(condition):
  return arith.extui(i32(), condition.value)


def _index(x):
  return arith.index_cast(i32(), x)


def _address(ref, index):
  """The address of element `index` of a reference that is contiguous."""
  i64 = ir.IntegerType.get_signless(64)
  width = mgpu.utils.bitwidth(ir.MemRefType(ref.type).element_type) // 8
  index = (
    index.value if isinstance(index, Register) else _constant(index, i32())
  )
  offset = arith.muli(arith.extui(i64, index), _constant(width, i64))
  return arith.addi(global_address(ref), offset)
