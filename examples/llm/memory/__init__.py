"""Who gets how much of the memory that an engine is granted."""
