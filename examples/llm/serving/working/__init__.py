"""The engine in a thread of its own, and orders on their way through it."""
