"""One candidate, measured in processes of its own."""
