"""Predicts what fits on a card, without the card: dimensions, bytes, operations, choices."""
