"""What a model is: its configuration, the names of its tensors, one block's computation."""
