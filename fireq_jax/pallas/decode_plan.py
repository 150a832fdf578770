"""How decode attention is shared out among multiprocessors and warpgroups."""

import dataclasses

from fireq_jax.config import check
from fireq_jax.pallas.int4_fragments import TOKENS

_CONSUMERS = 3


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
  """Chooses splits and teams that end soonest.

  Times are in units of 0.5 us, in which all CTAs together load a block each;
  they were fitted to what 1 to 128 sequences of 1k to 128k tokens took.

  Args:
    items: (sequence, head) pairs.
    blocks: blocks of the longest sequence.
    tuning: what it leaves open is chosen.
  """
  block_time, alone = 2.8, 0.4  # in a consumer; to load, at the very least
  consumers = tuning.consumers or _CONSUMERS
  stages = tuning.stages or 3 * consumers

  def cost(choice):
    splits, team = choice
    edge = 3 if team == 1 else 6  # to begin and to merge an item
    share = -(-blocks // splits)
    busy = -(-items * splits // tuning.ctas)  # items of a CTA
    rounds = -(-busy // (consumers // team))
    compute = rounds * (-(-share // team) * block_time + edge)
    fill = alone * min(share, stages)
    load = busy * share * max(min(items * splits / tuning.ctas, 1), alone)
    combine = 3 + splits / 16 if splits > 1 else 0
    return max(compute + fill, load + edge) + combine

  most = max(1, min(blocks, tuning.ctas))
  shares = [tuning.splits] if tuning.splits else range(1, most + 1)
  teams = [tuning.team] if tuning.team else [consumers]
  choices = [(s, t) for t in teams for s in shares]
  # Not measured with longer sequences or several splits.
  if tuning.team is None and 1 in shares and blocks <= 16:
    choices.append((1, 1))
  splits, team = min(choices, key=cost)
  is_open = (tuning.stages, tuning.consumers, tuning.team) == (None,) * 3
  if is_open and (splits, team) == (1, consumers) and blocks <= 16:
    consumers, stages, team = 2, 8, 2  # which are merged sooner
  return dataclasses.replace(
    tuning, stages=stages, consumers=consumers, splits=splits, team=team
  )
