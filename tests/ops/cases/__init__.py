"""One file an op: what proves and measures it."""
