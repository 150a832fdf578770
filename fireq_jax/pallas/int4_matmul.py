"""INT4 weights times FP8 (or bf16) activations on Hopper tensor cores.

  y[t, n] = act(x_scale[t] * row_scale[n] * sum_c x[t, c] * w[n, c] + bias[n])

where x and x_scale may be what `act_quant` makes of bf16 activations.

The product is computed transposed: weights are the wgmma A operand, which may
come from registers, so INT4 codes go from shared memory to registers, become
e4m3 there (`dequant`), and meet x, the B operand, in shared memory. Tokens are
the N of wgmma, 8 to 256. A CTA takes tiles of `rows` rows of w by `tile_t`
tokens in steps of `blocks` blocks of 128 along C:

  producer     | TMA: codes, scales and x of the steps to come, in a ring ...
  consumer 0   | wait | codes -> e4m3 | wgmma | wait | ...    | epilogue |
  consumer 1   |   wait | codes -> e4m3 | wgmma | wait | ...  | epilogue |

A consumer is a warpgroup; it holds up to 64 rows. While one converts, another
keeps the tensor core busy; it may also convert `ahead`, while its own last
multiplication runs. Up to four consumers share the rows of a tile, or
`interleave` sets of them take turns at the steps and add up their sums at the
end of a tile. This hides the latency of the conversion where tiles have few
rows and memory sets the pace.

Scales. e4m3 group scales are part of the operand: the 16 possible products of
a group, rounded to e4m3, are a table in registers. bf16 group scales leave the
codes exact: each group's f32 partial sum is multiplied by its scale.

Few tokens. All SMs must pull the same number of bytes, so `rows` is chosen such
that the tiles fill a whole number of waves, best a single one: 256 rows for
28672, 192 for 22016. wgmma always works on 64 rows, but it may work on rows
that nobody loads or stores. Tiles of 32 rows waste
nothing: two blocks lie below each other in the 64 rows, each is multiplied by
the x of both, and of the two sums every row keeps its own block's. The halves
meet in shared memory at the end of a tile.

Few tokens in bf16, for weights that take e4m3, are quantised by the consumers
while the first weights are on their way (`quantised_operand`). Their codes stay
in shared memory, so that the ring carries weights alone.

Many tokens. The tiles of a last wave that few CTAs have may be cut along the
tokens, for the others to have parts of them. CTAs may work in pairs that get
the same x by `multicast`; a slot is then free when both have left it.

Gate and up. Of the 64 rows of a consumer 32 are of the gate and 32 the same of
the up projection, such that a thread has both (`gated`).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fireq_jax.config import check
from fireq_jax.pallas import quantised_operand
from fireq_jax.pallas.int4_matmul_kernel import Kernel
from fireq_jax.pallas.int4_matmul_plan import MOST_TOKENS, REGISTERS, rows_of
from fireq_jax.pallas.layouts import BLOCK, ROWS, PackedInt4
from fireq_jax.pallas.quantised_operand import WARPS

Epilogue = Literal["linear", "add", "mul", "silu"]

_SHARED_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
  """How the work is cut; it changes results only by rounding.

  Attributes:
    tile_t: tokens of a tile, a multiple of 8 up to 256.
    stages: steps the ring buffer holds, a multiple of `interleave`.
    rows: rows of a tile: 64 for each of up to four consumers, or 16, 32 or 48
      for one. Then they must divide the rows of the output, and not be gated.
    blocks: blocks of 128 along C in a step.
    interleave: sets of consumers that take turns at the steps; at most four
      consumers in all.
    cluster: CTAs that quantise activations for each other, a power of two,
      where the kernel quantises and has a multiple of so many tiles.
    split: 2 if two CTAs share a tile, as a cluster: of 64 rows or more,
      interleaved twice at most. `ctas` is without effect.
    cut: parts of a tile, along the tokens, of the last wave, if there are
      enough CTAs for them.
    ctas: CTAs that run; CTA i takes every `ctas`-th tile.
    raster: token tiles that are swept together, for reuse in the L2 cache.
    ahead: whether a consumer looks up, or of exact codes loads, a step's first
      codes while the step before multiplies. Only if the ring holds two steps
      for each set of consumers.
    multicast: whether two CTAs, a cluster, take neighbouring row tiles of the
      same tokens, so that x comes from the L2 cache once for both.
  """

  tile_t: int
  stages: int
  rows: int = 128
  blocks: int = 1
  interleave: int = 1
  cluster: int = 1
  split: int = 1
  cut: int = 1
  ctas: int = 132
  raster: int = 16
  ahead: bool = False
  multicast: bool = False

  def __post_init__(self):
    for name, low, high, multiple in (
      ("split", 1, 2, 1),
      ("cut", 1, 8 if self.split == 1 else 1, 1),
      ("tile_t", 8, 256, 8 * self.split * self.cut),
      ("rows", 16, 4 * ROWS, 16 if self.rows <= ROWS else ROWS),
      ("stages", 1, 32, self.interleave),
      ("blocks", 1, 8, 1),
    ):
      value = getattr(self, name)
      check(
        low <= value <= high and value % multiple == 0,
        f"{name} must be a multiple of {multiple} from {low} to {high}",
        got=value,
      )
    check(
      self.split == 1 or (self.rows >= ROWS and self.interleave <= 2),
      "CTAs share tiles of 64 rows or more, interleaved twice at most",
      got=(self.rows, self.interleave),
    )
    check(
      self.cluster in (1, 2, 4, 8),
      "1, 2, 4 or 8 CTAs quantise for each other",
      got=self.cluster,
    )
    check(
      not (self.multicast and self.split > 1),
      "a cluster either shares tiles or copies x to both",
    )
    check(
      not self.wide
      or (self.split == self.blocks == 1 and self.tile_t % 16 == 0),
      "wide tiles of three consumers have steps of one block, and one CTA",
      got=self,
    )
    check(
      self.row_groups * self.interleave in REGISTERS,
      "there are 1 to 4 consumers",
      got=self.row_groups * self.interleave,
    )

  @property
  def row_groups(self) -> int:
    return pl.cdiv(self.rows, ROWS)

  @property
  def wide(self) -> bool:
    """Whether sums leave so few registers that `int4_quarters` multiplies."""
    return self.row_groups == 3 and self.tile_t > MOST_TOKENS


def supported(
  x: jax.Array,
  w: PackedInt4,
  x_scale: jax.Array | None = None,
  *,
  norm_weight: jax.Array | None = None,
  eps: float = 0.0,
  bias: jax.Array | None = None,
  operand: jax.Array | None = None,
  epilogue: Epilogue = "linear",
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tokens: int | None = None,
) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  n, c = w.shape
  e4m3_scale = w.scale.dtype == jnp.float8_e4m3fn
  quantises = w.quantises(x_scale)
  x_dtype = jnp.bfloat16 if quantises else w.activation_dtype
  for ok, reason in (
    (x.ndim == 2 and x.shape[0] > 0, f"x of shape {x.shape}"),
    (
      x.dtype == x_dtype and (x_scale is None or w.activation == "e4m3"),
      f"x of {x.dtype} with{'out' if x_scale is None else ''} a scale and with"
      " this weight",
    ),
    (quantises or norm_weight is None, "a norm of activations as they are"),
    (
      not quantises or (w.group == BLOCK and quantised_operand.fits(*x.shape)),
      f"quantisation of x of shape {x.shape} in groups of {w.group}",
    ),
    (
      n // (2 if w.gated else 1) % ROWS == 0 and c % ROWS == 0,
      f"sizes {n} and {c} that are not multiples of 64",
    ),
    (
      e4m3_scale or w.scale.dtype == jnp.bfloat16,
      f"group scales of {w.scale.dtype}",
    ),
    (
      not (w.activation == "bf16" and e4m3_scale),
      "e4m3 group scales with bf16 activations",
    ),
    (
      w.group in (BLOCK, BLOCK // 2),
      f"groups of {w.group}",
    ),
    (
      jnp.dtype(out_dtype) in (jnp.bfloat16, jnp.float32),
      f"an output of {out_dtype}",
    ),
    (
      (operand is None) == (epilogue not in ("add", "mul")),
      f"epilogue {epilogue} with operand {operand is not None}",
    ),
    (
      not w.gated or epilogue == "linear",
      f"epilogue {epilogue} of a gated matmul",
    ),
  ):
    if not ok:
      raise NotImplementedError(f"the INT4 matmul does not handle {reason}")


@functools.partial(
  jax.jit, static_argnames=("eps", "epilogue", "out_dtype", "tokens", "tuning")
)
def int4_matmul(
  x: jax.Array,
  w: PackedInt4,
  x_scale: jax.Array | None = None,
  *,
  norm_weight: jax.Array | None = None,
  eps: float = 0.0,
  bias: jax.Array | None = None,
  operand: jax.Array | None = None,
  epilogue: Epilogue = "linear",
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tokens: int | None = None,
  tuning: Tuning,
) -> jax.Array:
  """Multiplies x by INT4 weights on a Hopper GPU; see the module docstring.

  Args:
    x: [T, C] e4m3, or bf16 for weights packed for bf16. It may come with
      `rows_of(T)` rows, if `tokens` says so, and is padded to them otherwise.
      Or a few tokens in bf16 for other weights: they are rounded to e4m3.
    w: [N, C] weights of `layouts.pack_int4_weights`.
    x_scale: f32 [T] or longer, with e4m3 activations.
    norm_weight: bf16 or f32 [C], gain of an RMSNorm of what is rounded here.
    eps: of that norm; static.
    bias: [N], added before the activation.
    operand: [T, N], added (epilogue "add") or multiplied ("mul") at the end.
    epilogue: "silu" applies SiLU. Gated weights always give silu(gate) * up.
    out_dtype: bf16 or f32; epilogues compute in f32.
    tokens: T; all rows of x by default.
    tuning: see `tunings.choose`; `stages` is lowered to what memory holds.

  Returns:
    [T, N], or [T, N / 2] of gated weights.

  Raises:
    NotImplementedError: the kernel cannot run this; see `supported`.
    ConfigError: the tuning is not one for this weight.
  """
  supported(
    x,
    w,
    x_scale,
    norm_weight=norm_weight,
    bias=bias,
    operand=operand,
    epilogue=epilogue,
    out_dtype=out_dtype,
  )
  n, c = w.shape
  check(
    not tuning.wide or w.scale.dtype == jnp.float8_e4m3fn,
    "wide tiles of three consumers are of e4m3 group scales",
    got=w.scale.dtype,
  )
  check(
    tuning.rows >= ROWS or (n % tuning.rows == 0 and not w.gated),
    "rows of a tuning do not fit the weight",
    got=f"{tuning.rows} for {n}, gated {w.gated}",
  )
  tokens = tokens or x.shape[0]
  rows = rows_of(tokens)
  quantises = w.quantises(x_scale)
  if rows <= 8:
    tuning = dataclasses.replace(tuning, tile_t=8, split=1, cut=1)
  if quantises:
    check(
      tokens <= tuning.tile_t and tuning.split == tuning.cut == 1,
      "tokens to be quantised need one tile",
      got=f"{tokens} tokens, {tuning}",
    )
    x = x[:tokens].reshape(tokens, WARPS, -1)
    if norm_weight is not None:
      norm_weight = norm_weight.reshape(WARPS, -1)
  else:
    x = _padded(x, rows, pl.cdiv(c, BLOCK) * BLOCK if c > BLOCK else c)
  operand = None if operand is None else _padded(operand, rows, n)
  inputs = dict(
    x=x,
    codes=w.codes,
    scale=w.scale,
    row_scale=w.row_scale,
    x_scale=x_scale,
    norm_weight=norm_weight,
    bias=bias,
    operand=operand,
  )
  inputs = {name: value for name, value in inputs.items() if value is not None}
  kernel = Kernel(inputs, w, epilogue, out_dtype, eps, tuning)
  while kernel.shared_bytes() > _SHARED_BYTES and tuning.stages > 1:
    fewer = tuning.stages - tuning.interleave
    tuning = dataclasses.replace(tuning, stages=fewer)
    kernel = Kernel(inputs, w, epilogue, out_dtype, eps, tuning)
  if operand is not None:
    inputs["operand"] = operand.astype(out_dtype).reshape(kernel.out.shape)
  return kernel().reshape(rows, -1)[:tokens]


def _padded(x, rows, columns):
  missing = rows - x.shape[0], columns - x.shape[1]
  return jnp.pad(x, [(0, m) for m in missing]) if any(missing) else x
