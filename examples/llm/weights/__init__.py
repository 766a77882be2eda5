"""Stored tensors: packed formats, how they are found and described, how they are unpacked."""
