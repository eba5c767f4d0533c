"""Several ranks: collectives, torchrun, consistency checks, sharded frozen weights."""
