"""Triton kernels: unpacking, products of packed matrices with few tokens, norms and SwiGLU.

Modules here import Triton, which is optional: only ``llm.fused``, which asks first whether it is
there, imports them.
"""
