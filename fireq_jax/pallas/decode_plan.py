"""How decode attention is shared out among multiprocessors and warpgroups."""

import dataclasses

from fireq_jax.config import check
from fireq_jax.pallas.int4_fragments import TOKENS

_CONSUMERS = 3
_STAGES = {1: 8, 2: 8, 3: 9}  # by consumers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
  """Free choices of the kernel.

  Attributes:
    block: cached tokens of one step of the ring, a multiple of 128.
    stages: steps of all rings, a multiple of `consumers`.
    consumers: warpgroups that compute.
    splits: parts into which a sequence is cut.
    team: consumers that share an item, all or 1.
    ctas: persistent CTAs, one a multiprocessor.

  What is None is chosen by `plan`.
  """

  block: int = 128
  stages: int | None = None
  consumers: int | None = None
  splits: int | None = None
  team: int | None = None
  ctas: int = 132

  def __post_init__(self):
    check(
      self.block % TOKENS == 0 and self.block > 0,
      "decode block must be a positive multiple of 128",
      got=self.block,
    )
    consumers = self.consumers or _CONSUMERS
    check(
      consumers in (1, 2, 3) and (self.stages or consumers) % consumers == 0,
      "decode stages must be a multiple of 1, 2 or 3 consumers",
      got=f"{self.stages} and {self.consumers}",
    )
    check(
      self.team in (None, 1, consumers),
      "a decode team is one consumer or all of them",
      got=self.team,
    )


def plan(items: int, blocks: int, tuning: Tuning) -> Tuning:
  """Chooses splits, consumers and teams that end soonest.

  Times are in units of 0.5 us, in which all CTAs together load a block each;
  they were fitted to what 1 to 128 sequences of 1k to 128k tokens took.

  Args:
    items: (sequence, head) pairs.
    blocks: blocks of the longest sequence.
    tuning: what it leaves open is chosen.
  """
  # By consumers: of a block in one of them; to begin and to merge an item.
  block_time, edges = {1: 1.9, 2: 1.9, 3: 2.65}, {1: 2.2, 2: 4, 3: 6.3}
  alone = 0.4  # to load a block, at the very least
  stages_of = lambda consumers: tuning.stages or _STAGES[consumers]

  def cost(choice):
    splits, consumers, team = choice
    edge = edges[team]
    share = -(-blocks // splits)
    busy = -(-items * splits // tuning.ctas)  # items of a CTA
    rounds = -(-busy // (consumers // team))
    compute = rounds * (-(-share // team) * block_time[consumers] + edge)
    fill = alone * min(share, stages_of(consumers))
    load = busy * share * max(min(items * splits / tuning.ctas, 1), alone)
    combine = 3 + splits / 16 if splits > 1 else 0
    return max(compute + fill, load + edge) + combine

  most = max(1, min(blocks, tuning.ctas))
  shares = [tuning.splits] if tuning.splits else range(1, most + 1)
  numbers = [tuning.consumers] if tuning.consumers else [1, 2, _CONSUMERS]
  if tuning.stages and not tuning.consumers:
    numbers = [_CONSUMERS]
  choices = [(s, n, tuning.team or n) for n in numbers for s in shares]
  # Not measured with longer sequences or several splits.
  if tuning.team is None and 1 in shares and blocks <= 16:
    choices.append((1, numbers[-1], 1))
  choices = [c for c in choices if c[2] in (1, c[1])]
  splits, consumers, team = min(choices, key=cost)
  return dataclasses.replace(
    tuning,
    stages=stages_of(consumers),
    consumers=consumers,
    splits=splits,
    team=team,
  )
