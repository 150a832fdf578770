"""Agreement of the kernels with plain JAX on a trained model.

A model is quantised in memory and reads a text through the kernels and through
`implementation="xla"`, each with a cache of its own: whole windows (prefill),
and their second halves token by token after the first halves (decode), with
the true token at every step. A row gives the share of tokens whose likeliest
successor is the same, and both perplexities.

Rounding to e4m3 and INT4 turns the least difference of a sum into another code
now and then, and layer after layer into other logits. So each row also tells
how well plain JAX agrees with itself when the scale of every output of every
quantised projection is changed by a random 2**-14 (about the precision of an
FP8 sum on a tensor core), and how far the kernels and plain JAX are from plain
JAX with f32 activations, as a mean KL divergence.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fireq_jax import calibrate, pipeline, recipe
from fireq_jax.config import Implementation
from fireq_jax.evaluate import cut_text
from fireq_jax.kv_cache import init_cache
from fireq_jax.loading import load_model
from fireq_jax.models.llama import cast_floats, forward
from fireq_jax.pallas.layouts import PackedInt4
from fireq_jax.prepare import prepare
from fireq_jax.tokenizer import Tokenizer


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_multi_string(
    "ckpt", None, "Hugging Face folders.", required=True, **define
  )
  flags.DEFINE_multi_string("text", None, "Texts.", required=True, **define)
  flags.DEFINE_string(
    "calib", None, "Calibration data.", required=True, **define
  )
  flags.DEFINE_multi_string(
    "recipe", ["fireq"], "Recipe names or files.", **define
  )
  flags.DEFINE_integer("num_windows", 32, "Of each text.", **define)
  flags.DEFINE_integer("seq_len", 512, "Tokens of a window.", **define)
  flags.DEFINE_integer("num_calib", 64, "Calibration windows.", **define)


def run(values: flags.FlagValues) -> Iterable[dict]:
  for ckpt in values.ckpt:
    model = load_model(ckpt)
    tokenizer = Tokenizer(model.path, model.config.vocab_size)
    calibration = calibrate.cut_windows(
      calibrate.read_tokens(
        values.calib,
        vocab_size=model.config.vocab_size,
        encode=tokenizer.encode,
      ),
      count=values.num_calib,
      length=values.seq_len,
    )
    for name in values.recipe:
      steps = recipe.load(name)
      quantized = pipeline.quantize_model(
        pipeline.Source.from_params(model.params),
        model.config,
        steps,
        calibration,
      )
      variant = dataclasses.replace(
        model, params=prepare(quantized), recipe=steps
      )
      for text in values.text:
        windows = cut_text(
          tokenizer.encode(Path(text).read_text()),
          length=values.seq_len,
          count=values.num_windows,
        )
        labels = {
          "model": Path(ckpt).name,
          "recipe": steps.name,
          "text": Path(text).name,
        }
        for row in compare(variant, windows):
          yield labels | row


def compare(model: Any, windows: np.ndarray) -> Iterable[dict]:
  """A row for prefill and one for decode.

  Args:
    model: a `Checkpoint` with execution parameters.
    windows: i32 [W, T].
  """
  tokens = jnp.asarray(windows)
  params = model.params
  runs = {
    "exact": (cast_floats(params, jnp.float32), "xla"),
    "xla": (params, "xla"),
    "control": (_changed(params), "xla"),
    "kernels": (params, "auto"),
  }
  for stage, first in (("prefill", 0), ("decode", windows.shape[1] // 2)):
    following = tokens[:, first + 1 :]
    logits = {
      name: _read(
        tree,
        tokens,
        config=model.config,
        kv=model.recipe.kv,
        decode=stage == "decode",
        implementation=implementation,
      )[:, :-1]
      for name, (tree, implementation) in runs.items()
    }
    top1, control = (
      float(_same(logits[name], logits["xla"]))
      for name in ("kernels", "control")
    )
    ppl, control_ppl, reference = (
      float(jnp.exp(_loss(logits[name], following)))
      for name in ("kernels", "control", "xla")
    )
    kl, reference_kl = (
      float(_divergence(logits["exact"], logits[name]))
      for name in ("kernels", "xla")
    )
    yield {
      "stage": stage,
      "tokens": following.size,
      "top1": top1,
      "control_top1": control,
      "ppl": ppl,
      "reference_ppl": reference,
      "ppl_change": ppl / reference - 1,
      "control_ppl_change": control_ppl / reference - 1,
      "kl": kl,
      "reference_kl": reference_kl,
    }


def _changed(params: Any) -> Any:
  """The parameters with another scale of each output, by about 2**-14."""
  keys = iter(jax.random.split(jax.random.key(0), 1000))

  def change(w):
    if not isinstance(w, PackedInt4):
      return w
    noise = jax.random.normal(next(keys), w.row_scale.shape)
    return dataclasses.replace(
      w, row_scale=w.row_scale * (1 + 2.0**-14 * noise)
    )

  return jax.tree.map(
    change, params, is_leaf=lambda w: isinstance(w, PackedInt4)
  )


@functools.partial(
  jax.jit, static_argnames=("config", "kv", "decode", "implementation")
)
def _read(
  params: Any,
  tokens: jax.Array,
  *,
  config: Any,
  kv: Any,
  decode: bool,
  implementation: Implementation,
) -> jax.Array:
  """Logits [B, T, V] of the tokens, or of their second halves."""
  batch, length = tokens.shape
  step = functools.partial(
    forward, params, config=config, implementation=implementation
  )
  cache = init_cache(config, batch, -(-length // 16) * 16, kv)
  if not decode:
    return step(tokens, cache)[0]
  half = length // 2
  _, cache = step(tokens[:, :half], cache, last_only=True)

  def next_token(cache, column):
    logits, cache = step(column[:, None], cache, last_only=True)
    return cache, logits

  _, logits = jax.lax.scan(next_token, cache, tokens[:, half:].T)
  return jnp.swapaxes(logits, 0, 1)


@jax.jit
def _same(logits: jax.Array, reference: jax.Array) -> jax.Array:
  return (logits.argmax(-1) == reference.argmax(-1)).mean()


@jax.jit
def _loss(logits: jax.Array, following: jax.Array) -> jax.Array:
  """Mean negative log-likelihood."""
  log_p = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_p, following[..., None], axis=-1).mean()


@jax.jit
def _divergence(exact: jax.Array, logits: jax.Array) -> jax.Array:
  """Mean KL divergence from `exact` to `logits`, nats a token."""
  log_q, log_p = map(jax.nn.log_softmax, (exact, logits))
  return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
