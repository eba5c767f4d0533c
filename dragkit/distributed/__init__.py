"""Several ranks: collectives, torchrun, consistency checks, sharded weights."""
