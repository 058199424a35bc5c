"""An RTL project placed and routed by Vivado: the script that an archive carries, and what its reports say."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.vendor.reports import check_target, read_vivado
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet

FOLDER = "rtl"  # in the archive
SCRIPT = "vivado.tcl"
LOG = "build.log"
UTILIZATION = "utilization.rpt"
TIMING = "timing.rpt"
EXIT_CODE = "exit_code"
TOP = "network_wrapper"
STAGE = "rtl_impl"  # as `impl` is that of the HLS project
_RECORD = "rtl.json"
_CONSTRAINTS = "src/network.xdc"


@dataclass(frozen=True, kw_only=True)
class RtlTarget:
    """What `rtl.json` says of how a network's Verilog is to be built.

    Attributes:
        network: digest of the network.
        part: FPGA part.
        clock_ns: clock period in ns.
        latency_cycles: from input to output; 0 for combinational logic.
    """

    network: str
    part: str
    clock_ns: float
    latency_cycles: int

    @classmethod
    def of(cls, folder: Path, net: QNet) -> RtlTarget:
        """The target of an RTL project.

        Raises:
            InvalidInput: when there is no project, or it is another network's.
        """
        try:
            data = json.loads((folder / _RECORD).read_text())
            target = cls(
                network=data["network"],
                part=data["part"],
                clock_ns=float(data["clock_ns"]),
                latency_cycles=int(data["latency_cycles"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{folder}: not an RTL project of this package: {error!r}: run or pack again") from error
        if target.network != net.digest:
            raise InvalidInput(
                f"{folder}: made from the QNet {target.network[:12]}, not from {net.digest[:12]}: run or pack again"
            )
        return target


def write_rtl(source: Path, net: QNet, folder: Path, *, part: str | None = None, clock_ns: float | None = None) -> None:
    """Copy an RTL project's Verilog and constraints for Vivado, with the script that routes them.

    Args:
        source: the project.
        net: the network that it was made from.
        folder: the copy.
        part: FPGA part instead of the project's.
        clock_ns: clock period in ns instead of the project's.

    Raises:
        InvalidInput: when the project is another network's.
    """
    target = RtlTarget.of(source, net)
    target = replace(target, part=part or target.part, clock_ns=clock_ns or target.clock_ns)
    shutil.copytree(source / "src", folder / "src")
    if (constraints := folder / _CONSTRAINTS).exists():
        text, count = re.subn(
            r"(?m)^set clock_period .*$", f"set clock_period {target.clock_ns:g}", constraints.read_text()
        )
        assert count == 1, f"{constraints}: no clock period"
        constraints.write_text(text)
    record = json.loads((source / _RECORD).read_text()) | {"part": target.part, "clock_ns": target.clock_ns}
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    sources = sorted(str(path.relative_to(folder)) for path in (folder / "src").rglob("*.v"))
    (folder / SCRIPT).write_text(_script(target, sources))


def read_rtl(folder: Path, net: QNet) -> Resources:
    """Utilization, shortest clock period and latency of an RTL project that Vivado has routed.

    Raises:
        InvalidInput: when the reports are not there, cannot be trusted, or are of another network, part or clock.
    """
    target = RtlTarget.of(folder, net)
    record = read_vivado(folder / UTILIZATION, TOP, folder / TIMING)
    check_target(folder / UTILIZATION, record, target.part, target.clock_ns)
    if record.stage != "impl":
        raise InvalidInput(f"{folder / UTILIZATION}: of a design that is not routed: run {SCRIPT} to its end")
    assert record.achieved_clock_ns is not None
    return replace(
        record,
        stage=STAGE,
        latency_cycles=target.latency_cycles,
        ii=1,
        fmax_mhz=round(1000 / record.achieved_clock_ns, 1),
        # without registers the one period that the constraints ask for is the whole way
        latency_ns=round(max(target.latency_cycles, 1) * record.achieved_clock_ns, 3),
        notes=f"{record.notes}; the Verilog, out of context: no pads; delays of the constraints included",
    )


def _script(target: RtlTarget, sources: list[str]) -> str:
    """Vivado's batch script, for versions since 2017: a synthesis with retiming is spelled differently in each."""
    if target.latency_cycles:
        before, after = f"read_xdc -mode out_of_context {_CONSTRAINTS}\n", ""
    else:  # a clock of no port, between whose edges the whole network has to be done
        before = ""
        after = (
            f"create_clock -name sys_clk -period {target.clock_ns:g}\n"
            "set_input_delay 0 -clock sys_clk [all_inputs]\n"
            "set_output_delay 0 -clock sys_clk [all_outputs]\n"
        )
    files = " \\\n    ".join(sources)
    return f"""\
# Synthesizes, places and routes {TOP} out of context, for Vivado in batch mode:
# vivado -mode batch -source {SCRIPT}
read_verilog [list \\
    {files}]
{before}synth_design -top {TOP} -part {target.part} -mode out_of_context -flatten_hierarchy full
{after}opt_design
place_design
phys_opt_design
route_design
report_utilization -file {UTILIZATION}
report_timing_summary -file {TIMING}
"""
