"""A policy server of openpi (pi0, pi0.5) as a teacher."""
