"""Vivado HLS, Vitis HLS and Vivado: runs, reports, archives for other machines."""
