"""A record of resources by the fitted formula, for a network that is not traced."""

from __future__ import annotations

from hmq_fpga.deploy.report import Resources
from hmq_fpga.ir.logic import luts
from hmq_fpga.ir.network import QNet


def estimate(net: QNet) -> Resources:
    """LUTs of the fully unrolled network; see `luts` for how good they are."""
    return Resources(
        stage="model",
        tool="hmq_fpga",
        lut=round(luts(net)),
        dsp=0,
        bram=0,
        ii=1,
        notes="a formula fitted to the tracer's figures; fully unrolled distributed arithmetic",
    )
