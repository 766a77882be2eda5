"""Calls of tools in a model's text: how each family of models writes them."""
