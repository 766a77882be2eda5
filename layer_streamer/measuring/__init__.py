"""What is measured: the machine's limits, and timed passes beside them."""
