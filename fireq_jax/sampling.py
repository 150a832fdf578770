"""From logits to the next token: greedy, temperature, top-k and top-p."""

import jax
import jax.numpy as jnp


def sample(
  logits: jax.Array,
  keys: jax.Array,
  *,
  temperature: jax.Array | None,
  top_p: jax.Array,
  top_k: int = 0,
) -> jax.Array:
  """Draws one token per row; temperature, then top-k, then top-p, in f32.

  A row depends on nothing but its own logits, key, temperature and top_p.

  Args:
    logits: f32 [B, V].
    keys: typed PRNG keys [B].
    temperature: f32 [B]; 0 takes the most likely token. None is 0 for all
      rows, known when the program is traced.
    top_p: f32 [B] in (0, 1]; keeps the fewest most likely tokens whose
      probabilities sum to at least top_p.
    top_k: keeps the k most likely tokens; 0 keeps all (static).

  Returns:
    i32 [B].
  """

  def greedy():
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  if temperature is None:
    return greedy()

  def draw():
    scale = jnp.where(temperature > 0, temperature, 1.0)
    ordered, ids = jax.lax.top_k(
      logits / scale[:, None], top_k or logits.shape[-1]
    )
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may bring the sum to 1 before the last token.
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    choice = jax.vmap(jax.random.categorical)(
      keys, jnp.where(keep, ordered, -jnp.inf)
    )
    drawn = jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, drawn, greedy())

  return jax.lax.cond(jnp.any(temperature > 0), draw, greedy)
