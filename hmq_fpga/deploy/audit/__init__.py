"""Faults planted one at a time, to see whether parity finds them."""
