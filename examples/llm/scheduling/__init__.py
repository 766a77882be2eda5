"""Requests of several clients on their way through shared passes: who takes part, with how much."""
