"""LUTs of a network of which no Verilog is written."""

from __future__ import annotations

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl.trace import NotUnrolled, trace
from hmq_fpga.ir.logic import luts
from hmq_fpga.ir.network import QNet


def estimate(net: QNet) -> Resources:
    """A record by the fitted formula; see `luts` for how good it is."""
    return Resources(
        stage="model",
        tool="hmq_fpga",
        lut=round(luts(net)),
        dsp=0,
        bram=0,
        ii=1,
        notes="a formula fitted to the tracer's figures; fully unrolled distributed arithmetic",
    )


def traced_luts(net: QNet) -> int:
    """The tracer's own figure, as `RtlProject.lut` has it; the formula's for a network that is too large to trace."""
    try:
        return round(float(trace(net).cost))
    except NotUnrolled:
        return round(luts(net))
