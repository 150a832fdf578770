"""Llama in NumPy float64, written from the papers and apart from the library.

One sequence at a time, one head at a time, as plainly as possible.
"""

import numpy as np


def frequencies(rope, head_dim):
  """Angles per position, by the piecewise definition of Llama 3.1."""
  pairs = np.arange(head_dim // 2)
  inv = float(rope.theta) ** (-2.0 * pairs / head_dim)
  if rope.type == "linear":
    return inv / rope.factor
  if rope.type == "default":
    return inv
  out = []
  for f in inv:
    wavelength = 2 * np.pi / f
    longest = rope.original_max_position_embeddings / rope.low_freq_factor
    shortest = rope.original_max_position_embeddings / rope.high_freq_factor
    if wavelength < shortest:
      out.append(f)
    elif wavelength > longest:
      out.append(f / rope.factor)
    else:
      smooth = (
        rope.original_max_position_embeddings / wavelength
        - rope.low_freq_factor
      ) / (rope.high_freq_factor - rope.low_freq_factor)
      out.append((1 - smooth) * f / rope.factor + smooth * f)
  return np.array(out)


def rotate(x, position, inv):
  """x [H] at one position, channel i turning with channel i + H / 2."""
  half = len(x) // 2
  pair = (x[:half] + 1j * x[half:]) * np.exp(1j * position * inv)
  return np.concatenate([pair.real, pair.imag])


def norm(x, weight, eps):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight


def attend(q, k, v, start=0):
  """q [T, N, H], k and v [S, K, H]; query t sees keys up to start + t."""
  length, heads, head_dim = q.shape
  group = heads // k.shape[1]
  out = np.zeros_like(q)
  for t in range(length):
    seen = start + t + 1
    for n in range(heads):
      scores = k[:seen, n // group] @ q[t, n] / np.sqrt(head_dim)
      p = np.exp(scores - scores.max())
      out[t, n] = p @ v[:seen, n // group] / p.sum()
  return out


def round_int4(x, to_scale=lambda scale: scale):
  """Per-row INT4 of x [..., H], returned as float64 values."""
  scale = to_scale(np.abs(x).max(-1, keepdims=True) / 7)
  scale = np.where(scale == 0, 1, scale)
  return np.clip(np.rint(x / scale), -7, 7) * scale


def forward(params, tokens, config, round_kv=lambda x: x):
  """Logits float64 [T, V] of one sequence [T]; `round_kv` acts on K and V."""
  f64 = lambda x: np.asarray(x, np.float64)
  model = params["model"]
  embedding = f64(model["embed_tokens"]["embedding"])
  inv = frequencies(config.rope, config.head_dim)
  turn = lambda x: np.stack(
    [[rotate(head, t, inv) for head in row] for t, row in enumerate(x)]
  )
  heads = lambda x: x.reshape(len(tokens), -1, config.head_dim)
  x = embedding[tokens]
  for layer in model["layers"]:
    attn, mlp = layer["self_attn"], layer["mlp"]
    kernel = lambda part, name: f64(part[name]["kernel"])
    h = norm(x, f64(layer["input_layernorm"]["weight"]), config.rms_norm_eps)
    q = turn(heads(h @ kernel(attn, "q_proj")))
    k = turn(heads(h @ kernel(attn, "k_proj")))
    v = heads(h @ kernel(attn, "v_proj"))
    out = attend(q, round_kv(k), round_kv(v))
    x = x + out.reshape(len(tokens), -1) @ kernel(attn, "o_proj")
    weight = f64(layer["post_attention_layernorm"]["weight"])
    h = norm(x, weight, config.rms_norm_eps)
    gate = h @ kernel(mlp, "gate_proj")
    silu = gate / (1 + np.exp(-gate))
    x = x + (silu * (h @ kernel(mlp, "up_proj"))) @ kernel(mlp, "down_proj")
  x = norm(x, f64(model["norm"]["weight"]), config.rms_norm_eps)
  if config.tie_word_embeddings:
    return x @ embedding.T
  return x @ f64(params["lm_head"]["kernel"])
