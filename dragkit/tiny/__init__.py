"""How the bundled generator was made: a tiny Nemotron-H, warmed up on invented facts."""
