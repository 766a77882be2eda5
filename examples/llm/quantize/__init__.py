"""Quantizing a model: codes, scales, what calibration adds, and the files that are written."""
