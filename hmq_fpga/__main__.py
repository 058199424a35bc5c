"""`python -m hmq_fpga` is `hmq-fpga`."""

from hmq_fpga.cli import main

main()
