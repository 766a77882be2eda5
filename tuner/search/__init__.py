"""Which candidate to try next. Pure, but for ``search``, which has them tried."""
