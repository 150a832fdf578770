"""What to do to a model: frozen, validated, stored as YAML.

A recipe file is a nested mapping with the field names of `Recipe`; what it
leaves out keeps its default, and the default of everything is "off".
"""

import dataclasses
import importlib.resources
import math
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from fireq_jax.config import KVFormat, LlamaConfig, check
from fireq_jax.errors import ConfigError
from fireq_jax.plain import from_plain, near, to_plain

_frozen = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)

GROUPS = (32, 64, 128)

# Every quantised projection of a layer, with the block that holds it.
PROJECTIONS = {
  "q_proj": "self_attn",
  "k_proj": "self_attn",
  "v_proj": "self_attn",
  "o_proj": "self_attn",
  "gate_proj": "mlp",
  "up_proj": "mlp",
  "down_proj": "mlp",
}


def _check_literals(instance: Any) -> None:
  for name, hint in typing.get_type_hints(type(instance)).items():
    if typing.get_origin(hint) is Literal:
      allowed, value = typing.get_args(hint), getattr(instance, name)
      check(
        value in allowed,
        f"unknown {name}",
        expected=" or ".join(allowed),
        got=repr(value),
      )


def _check_number(name: str, value: float, *, least: float) -> None:
  check(
    math.isfinite(value) and value >= least,
    f"{name} must be finite and at least {least}",
    got=value,
  )


@_frozen
class WeightFormat:
  """How a weight is stored, and what it multiplies; see `QTensor`.

  Attributes:
    group: input channels that share a scale.
    scale: `e4m3` rounds every product of scale and code to e4m3 (the paper's
      sigma_FP8), `bf16` rounds none (sigma_BF16).
    codes: `full` uses [-8, 7], `symmetric` [-7, 7]; `e4m3` stores numbers of
      that type, each output with one f32 scale, whatever `group` and `scale`
      are (lm_head only).
    activation: `e4m3` rounds activations, per token; `bf16` leaves them.
  """

  group: int = 128
  scale: Literal["e4m3", "bf16"] = "e4m3"
  codes: Literal["full", "symmetric", "e4m3"] = "symmetric"
  activation: Literal["e4m3", "bf16"] = "e4m3"

  def __post_init__(self):
    _check_literals(self)
    check(
      self.group in GROUPS,
      "unsupported weight group",
      expected=" or ".join(map(str, GROUPS)),
      got=self.group,
    )

  @property
  def lowest_code(self) -> int:
    return -8 if self.codes == "full" else -7


@_frozen
class Solver:
  """How scales and codes are found; no stored byte changes its meaning.

  All but `scale` read the inputs each projection really gets, with what comes
  before it in the model already quantised. Of lm_head they find scales alone.

  Attributes:
    scale: `abs_max` takes max|w| / 7 (published), `search` the scale of least
      squared error, clipping and rounded products included.
    weighted: the search counts errors at the layer's output, by the second
      moment of its inputs within each group.
    gptq: codes correct each other's error at the layer's output.
  """

  scale: Literal["abs_max", "search"] = "abs_max"
  weighted: bool = False
  gptq: bool = False

  def __post_init__(self):
    _check_literals(self)
    check(
      self.scale == "search" or not self.reads_inputs,
      "weighted and gptq need the scale search",
    )

  @property
  def reads_inputs(self) -> bool:
    """Whether it needs calibration data."""
    return self.weighted or self.gptq


@_frozen
class Tuning:
  """Gradient descent on all a layer stores, for its output's error.

  Attributes:
    steps: of a layer; 0 is off.
    batch: calibration windows of a step.
    weight_rate: first step of weights, in units of their scales.
    factor_rate: of norms' gains and of the factors of keys, relative.
    settling: share of the way to its code's value that a weight goes in the
      last step, besides; less in those before, none in the first.
  """

  steps: int = 0
  batch: int = 8
  weight_rate: float = 0.01
  factor_rate: float = 0.001
  settling: float = 0.0

  def __post_init__(self):
    check(self.steps >= 0, "steps must not be negative", got=self.steps)
    check(self.batch > 0, "batch must be positive", got=self.batch)
    for name in ("weight_rate", "factor_rate", "settling"):
      _check_number(name, getattr(self, name), least=0.0)
    check(self.settling < 1, "settling must be below 1", got=self.settling)


@_frozen
class ChannelScaling:
  """Diagonal factors moved between a linear layer and what feeds it.

  Attributes:
    statistic: of the weights of each input channel: factors are
      `constant / statistic`, or the constant itself.
    qkv: constant at the attention input, against its norm's gain; 0 is off.
    o: at the attention output, against `v_proj`.
    gate_up: at the feed-forward input, against its norm's gain.
    down: at the input of `down_proj`, against `up_proj`.
    v_mul: `v_proj` is multiplied by this number and `o_proj` divided.
    awq: exponents of the mean absolute activation to try as factors, keeping
      those with the least error of the quantised layer. Empty is off.
  """

  statistic: Literal["constant", "abs_max", "abs_mean"] = "abs_mean"
  qkv: float = 0.0
  o: float = 0.0
  gate_up: float = 0.0
  down: float = 0.0
  v_mul: float = 1.0
  awq: tuple[float, ...] = ()

  def __post_init__(self):
    _check_literals(self)
    for site in ("qkv", "o", "gate_up", "down"):
      _check_number(site, getattr(self, site), least=0.0)
    _check_number("v_mul", self.v_mul, least=0.0)
    check(self.v_mul > 0, "v_mul must be positive", got=self.v_mul)
    for exponent in self.awq:
      check(0 <= exponent <= 1, "awq exponents must be in [0, 1]", got=exponent)


@_frozen
class KeyScaling:
  """RoPE-aware scaling of keys against queries (paper section 3).

  Attributes:
    alpha: radius every pair of channels gets before RoPE; 0 is off.
    beta: magnitude the outlier channels get after RoPE; 0 is off.
    top_k: channels per kv head treated after RoPE, besides their partners.
    fit: instead of all these, find the scale of every channel after RoPE, and
      a shift, that give scores the least error.
  """

  alpha: float = 0.0
  beta: float = 0.0
  top_k: int = 0
  fit: bool = False

  def __post_init__(self):
    _check_number("alpha", self.alpha, least=0.0)
    _check_number("beta", self.beta, least=0.0)
    check(self.top_k >= 0, "top_k must not be negative", got=self.top_k)
    check(
      (self.beta > 0) == (self.top_k > 0),
      "beta and top_k are both positive or both 0",
      got=f"beta {self.beta} and top_k {self.top_k}",
    )
    check(
      not self.fit or not (self.alpha or self.top_k),
      "fit replaces alpha, beta and top_k",
    )


@_frozen
class Rotation:
  """Orthogonal matrices absorbed into the weights on both sides.

  Attributes:
    residual: rotate the residual stream; folds every norm's gain into the
      weights that follow, so a tied model gets an `lm_head` of its own.
    value: change the basis of the values of each kv head, against `o_proj`,
      to the one in which rounding them costs least.
  """

  residual: bool = False
  value: bool = False


@_frozen
class Override:
  """Another weight format for some projections of some layers.

  Attributes:
    layers: indices, negative from the end; empty is every layer.
    projections: `q_proj` and so on; empty is every projection.
    weight: the format; None leaves bf16.
  """

  layers: tuple[int, ...] = ()
  projections: tuple[str, ...] = ()
  weight: WeightFormat | None = None

  def __post_init__(self):
    for name in self.projections:
      check(
        name in PROJECTIONS,
        f"unknown projection {name!r}{near(name, PROJECTIONS)}",
        expected="one of " + ", ".join(PROJECTIONS),
      )


@_frozen
class Recipe:
  """Everything that turns a float model into a quantised one.

  Attributes:
    weight: format of every projection; None leaves bf16. Embedding and norms
      always stay bf16.
    head: format of lm_head; None leaves bf16. With one, a tied model gets an
      `lm_head` of its own.
    overrides: exceptions to `weight`; the last one that matches counts.
  """

  name: str
  weight: WeightFormat | None = None
  head: WeightFormat | None = None
  kv: KVFormat = KVFormat()
  solver: Solver = Solver()
  scaling: ChannelScaling = ChannelScaling()
  keys: KeyScaling = KeyScaling()
  rotation: Rotation = Rotation()
  tuning: Tuning = Tuning()
  overrides: tuple[Override, ...] = ()

  def __post_init__(self):
    for weight in (self.weight, *(item.weight for item in self.overrides)):
      check(
        weight is None or weight.codes != "e4m3",
        "only lm_head can be stored in e4m3",
      )

  @property
  def reads_inputs(self) -> bool:
    """Whether it looks at what layers get in the quantised model."""
    return self.solver.reads_inputs or self.tuning.steps > 0

  @property
  def needs_calibration(self) -> bool:
    """Whether quantising reads activations, and so needs tokens."""
    return bool(
      self.reads_inputs
      or self.scaling.awq
      or self.keys.alpha > 0
      or self.keys.top_k > 0
      or self.keys.fit
      or self.rotation.value
    )

  def weight_format(
    self, layer: int, projection: str, num_layers: int
  ) -> WeightFormat | None:
    """Returns the format of one projection; None is bf16."""
    weight = self.weight
    for override in self.overrides:
      layers = [i % num_layers for i in override.layers]
      if (not layers or layer in layers) and (
        not override.projections or projection in override.projections
      ):
        weight = override.weight
    return weight

  def check_model(self, config: LlamaConfig) -> None:
    """Raises `ConfigError` if a model of this shape cannot use the recipe."""
    num_layers = config.num_hidden_layers
    for override in self.overrides:
      for i in override.layers:
        check(
          -num_layers <= i < num_layers,
          "an override names a layer the model does not have",
          where=f"recipe {self.name}",
          expected=f"{-num_layers} to {num_layers - 1}",
          got=i,
        )
    attention_out = config.num_attention_heads * config.head_dim
    in_features = dict.fromkeys(PROJECTIONS, config.hidden_size) | {
      "o_proj": attention_out,
      "down_proj": config.intermediate_size,
    }
    for layer in range(num_layers):
      for name, size in in_features.items():
        self._check_group(
          self.weight_format(layer, name, num_layers), size, name
        )
    self._check_group(self.head, config.hidden_size, "lm_head")
    check(
      2 * self.keys.top_k <= config.head_dim,
      "top_k is more than half of the head",
      where=f"recipe {self.name}",
      expected=f"at most {config.head_dim // 2}",
      got=self.keys.top_k,
    )

  def _check_group(
    self, weight: WeightFormat | None, size: int, name: str
  ) -> None:
    if weight is None or weight.codes == "e4m3" or size % weight.group == 0:
      return
    valid = [str(g) for g in GROUPS if size % g == 0]
    remedy = "" if name == "lm_head" else " through an override"
    raise ConfigError(
      f"group {weight.group} does not divide the {size} inputs of {name}",
      where=f"recipe {self.name}",
      expected=f"group {' or '.join(valid)}" if valid else None,
      hint=None if valid else f"leave it in bf16{remedy}",
    )


def to_dict(recipe: Recipe) -> dict[str, Any]:
  """Returns the recipe as plain dicts, lists and scalars."""
  return to_plain(recipe)


def from_dict(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
  """Inverse of `to_dict`; `where` names the source in errors.

  Raises:
    ConfigError: an unknown key, a missing name, or an invalid value.
  """
  return from_plain(Recipe, values, where)


def dumps(recipe: Recipe) -> str:
  """Returns the recipe as YAML; `load` of it gives an equal recipe."""
  return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def presets() -> list[str]:
  """Names of the recipes in the package."""
  folder = importlib.resources.files("fireq_jax") / "recipes"
  return sorted(
    f.name.removesuffix(".yaml")
    for f in folder.iterdir()
    if f.name.endswith(".yaml")
  )


def load(name_or_path: str | pathlib.Path) -> Recipe:
  """Reads a preset by name, or a YAML file.

  Raises:
    ConfigError: no such preset or file, not YAML, or an invalid recipe.
  """
  name = str(name_or_path)
  if name in presets():
    folder = importlib.resources.files("fireq_jax") / "recipes"
    text = (folder / f"{name}.yaml").read_text()
  else:
    try:
      text = pathlib.Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(
        f"neither a preset nor a readable file{near(name, presets())}",
        where=f"recipe {name}",
        expected="a YAML file or one of " + ", ".join(presets()),
      ) from error
  try:
    values = yaml.safe_load(text)
  except yaml.YAMLError as error:
    raise ConfigError(
      f"not YAML: {' '.join(str(error).split())}", where=f"recipe {name}"
    ) from error
  return from_dict(values, where=f"recipe {name}")
