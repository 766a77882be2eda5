"""What comes of an order, as clients read it: whole, or as a stream."""
