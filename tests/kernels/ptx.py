"""Evaluates short straight-line PTX on NumPy arrays of register bits."""

import re

import ml_dtypes
import numpy as np

_WORD = 0xFFFFFFFF


def run(text: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Executes `text`, given the bits of its inputs; returns all registers."""
  env = dict(registers)

  def value(operand):
    operand = operand.strip()
    if operand.startswith("{"):
      low, high = operand[1:-1].split(",")
      return (value(low) & 0xFFFF) | (value(high) & 0xFFFF) << 16
    if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", operand):
      return np.int64(int(operand, 0))
    return env[operand]

  body = text.strip().removeprefix("{").removesuffix("}")
  for statement in filter(None, map(str.strip, body.split(";"))):
    if statement.startswith(".reg"):
      continue
    op, operands = statement.split(None, 1)
    to, *sources = re.findall(r"\{[^}]*\}|[^,\s][^,]*", operands)
    result = _OPS[op](*map(value, sources))
    env[to.strip()] = np.asarray(result, np.int64) & _WORD
  return env


def _lop3(a, b, c, table):
  result = np.int64(0)
  for i in range(8):
    if int(table) >> i & 1:
      terms = [x if i >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
      result = result | (terms[0] & terms[1] & terms[2])
  return result


def _prmt(a, b, selector):
  sources = [(x >> 8 * i) & 255 for x in (a, b) for i in range(4)]
  sources = np.stack(np.broadcast_arrays(*sources, selector)[:8])
  result = np.int64(0)
  for i in range(4):
    nibble = np.broadcast_to((selector >> 4 * i) & 15, sources.shape[1:])
    byte = np.take_along_axis(sources, (nibble & 7)[None], 0)[0]
    sign = np.where(byte & 128, 255, 0)
    result = result | np.where(nibble & 8, sign, byte) << 8 * i
  return result


def _pairwise(dtype, operation):
  """An operation on two 16-bit floats a register."""

  def apply(*words):
    result = np.int64(0)
    for shift in (0, 16):
      halves = [
        np.asarray((w >> shift) & 0xFFFF).astype(np.uint16).view(dtype)
        for w in words
      ]
      bits = np.asarray(operation(*halves), dtype).view(np.uint16)
      result = result | bits.astype(np.int64) << shift
    return result

  return apply


def _to_e4m3x2(word):
  result = np.int64(0)
  for i in range(2):
    half = np.asarray((word >> 16 * i) & 0xFFFF).astype(np.uint16)
    value = np.clip(half.view(np.float16).astype(np.float32), -448, 448)
    bits = value.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    result = result | bits.astype(np.int64) << 8 * i
  return result


def _fma(a, b, c):
  wide = [x.astype(np.float64) for x in (a, b, c)]
  return (wide[0] * wide[1] + wide[2]).astype(ml_dtypes.bfloat16)


_OPS = {
  "mov.b32": lambda a: a,
  "mov.u32": lambda a: a,
  "bfe.u32": lambda a, start, bits: (a >> start) & ((1 << bits) - 1),
  "mad.lo.u32": lambda a, b, c: a * b + c,
  "xor.b32": lambda a, b: a ^ b,
  "and.b32": lambda a, b: a & b,
  "shl.b32": lambda a, b: a << b,
  "shr.u32": lambda a, b: a >> b,
  "shf.l.wrap.b32": lambda low, high, n: (high << n) | (low >> (32 - n)),
  "lop3.b32": _lop3,
  "prmt.b32": _prmt,
  "mul.rn.f16x2": _pairwise(np.float16, lambda a, b: a * b),
  "fma.rn.bf16x2": _pairwise(ml_dtypes.bfloat16, _fma),
  "cvt.rn.satfinite.e4m3x2.f16x2": _to_e4m3x2,
}
