"""Keys and values: tiers, rows, transfers."""
