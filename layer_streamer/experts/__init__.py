"""Which experts of a mixture keep a slot, and traces of what was asked for. No thread here."""
