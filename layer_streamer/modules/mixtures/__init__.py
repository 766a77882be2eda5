"""Mixtures of transformers whose experts are brought on demand."""
