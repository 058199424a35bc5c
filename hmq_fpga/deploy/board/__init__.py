"""A network on a board: a serial line in, a serial line out, a bitstream by open tools, and a simulation of it all."""
