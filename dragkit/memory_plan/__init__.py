"""What fits on a card, predicted without one: dimensions, bytes, operations, choices."""
