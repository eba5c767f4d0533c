"""The bundled generator, a tiny Nemotron-H, and its training on invented facts."""
