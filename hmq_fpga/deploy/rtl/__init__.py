"""Unrolled Verilog: tracing, simulation, synthesis by open tools, estimates."""
