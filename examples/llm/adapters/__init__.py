"""Adapters (LoRA): what is added to the products of a model whose own weights stay as they are."""
