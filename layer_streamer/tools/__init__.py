"""The command ``layer-streamer``: tools for people, on top of all the rest."""
