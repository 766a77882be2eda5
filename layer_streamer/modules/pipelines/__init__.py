"""Whole pipelines of diffusers: the large models stream within one budget, the rest stays."""
