"""``python -m layer_streamer``: tools for people, on top of the library."""
