"""Bytes on their way: memory, files, slots, stages, lanes, clocks. All threads live here."""
