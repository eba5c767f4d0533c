"""Numbers of training: equal in any batch, exact in the draw, and never updated when not finite."""
