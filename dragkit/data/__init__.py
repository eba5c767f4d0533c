"""From heuristics files to packed batches: reading, labels, the packed store, collation."""
