"""Layers that stay in host memory, computed there in passes of few tokens."""
