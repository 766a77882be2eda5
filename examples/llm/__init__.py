"""A small reference engine for LLaMA-family models over streamed layers.

It uses the public surface of layer_streamer only; copy what you need.
"""
