"""What rivals.py measures: one module a kind of peer, each run in a process of its own.

Nothing here imports layer_streamer before it is measured: one of the peers has a package of that
name.
"""
