"""A run: what its configuration means, its folder, its results."""
