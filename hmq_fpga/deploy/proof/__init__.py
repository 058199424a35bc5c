"""Proof that what is generated computes a network, for all inputs and not for a sample."""
