"""Products of few tokens on a processor, in C++ that is compiled where it runs, if it can be."""
