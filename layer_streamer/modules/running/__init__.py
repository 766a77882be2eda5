"""How a forward, or a backward, goes over the layers of its blocks."""
