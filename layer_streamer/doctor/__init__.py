"""What a user needs to know of a machine and a model: facts, gathered without ever failing."""
