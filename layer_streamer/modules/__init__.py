"""Any module in place of a callback: what its parameters are made of, and how they are bound."""
