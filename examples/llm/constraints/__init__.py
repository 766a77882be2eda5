"""Text that is held to a schema, a regular expression or a grammar: which tokens may follow."""
