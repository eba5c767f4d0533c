"""Turns question files into packed batches: reading, labels, the packed store, collation."""
