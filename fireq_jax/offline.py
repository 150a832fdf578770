"""How programs that run only while quantising are compiled."""

import functools

import jax

# XLA tries dozens of Triton kernels for every product, which takes minutes in
# all and saves programs that run a few times less than that.
jit = functools.partial(
  jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False}
)
