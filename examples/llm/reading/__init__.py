"""What a model's text is made of: reasoning, answer, calls of tools, as each family has them."""
