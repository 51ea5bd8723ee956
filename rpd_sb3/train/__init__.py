"""A training run from its command line to its folder."""
