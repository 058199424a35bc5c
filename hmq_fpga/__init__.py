"""hmq_fpga."""
