"""Triton kernels: unpacking, products of packed matrices with few tokens, norms and SwiGLU.

Modules here import Triton, which is optional: only ``fused`` and ``passes.decode``,
which ask first whether it is there, import them.
"""
