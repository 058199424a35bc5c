"""Resource counts by open synthesis: Yosys, as the Python package pyosys."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.toolchain import ToolFailed, ToolMissing, run

FAMILY = "xcup"  # UltraScale+
SCRIPT = "synth.ys"
LOG = "synth.log"
COUNTS = "synth.json"

_NOTES = (
    "a Yosys estimate: it maps carry chains to CARRY4 and no three-input adders, and its inverters are not counted; "
    "compare it with figures of the same Yosys version only, not with Vivado's"
)
# a process of its own bounds the memory and can be stopped at any time
_WORKER = """\
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from pyosys import libyosys
libyosys.run_pass("script " + sys.argv[1], libyosys.Design())
"""


def synthesis_script(sources: Sequence[str], top: str) -> str:
    """The Yosys script; it also runs by itself, as `yosys synth.ys` in the project's folder."""
    return "\n".join(
        [
            f"read_verilog -sv -defer {' '.join(sources)}",
            f"synth_xilinx -family {FAMILY} -top {top} -flatten -noiopad -noclkbuf",
            f"tee -q -o {COUNTS} stat -json",
            "",
        ]
    )


def synthesize(
    folder: Path,
    *,
    time_limit_s: float,
    memory_limit_gb: float,
    on_line: Callable[[str], None] | None = None,
) -> Resources:
    """Run the script `synth.ys` of a folder; Yosys logs to `synth.log` there.

    Args:
        folder: holds the script; where it runs.
        time_limit_s: wall-clock limit in seconds.
        memory_limit_gb: limit of its address space, in GB.
        on_line: called with each line of the log.

    Raises:
        ToolMissing: without pyosys.
        ToolFailed: when synthesis fails or passes a limit; the message names the log.
    """
    run_script(folder, SCRIPT, LOG, COUNTS, time_limit_s=time_limit_s, memory_limit_gb=memory_limit_gb, on_line=on_line)
    return resources(json.loads((folder / COUNTS).read_text()))


def require_yosys() -> None:
    """Raise `ToolMissing` without pyosys."""
    if importlib.util.find_spec("pyosys") is None:
        raise ToolMissing("pyosys not found, needed to synthesize the Verilog with Yosys: pip install pyosys==0.70")


def run_script(
    folder: Path,
    script: str,
    log: str,
    made: str,
    *,
    time_limit_s: float,
    memory_limit_gb: float,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a Yosys script in its folder.

    Args:
        folder: where it lies and runs.
        script: name of the script.
        log: name for what Yosys says.
        made: name of what the script writes last.
        time_limit_s: wall-clock limit in seconds.
        memory_limit_gb: limit of its address space, in GB.
        on_line: called with each line of the log.

    Raises:
        ToolMissing: without pyosys.
        ToolFailed: when it fails or passes a limit; the message names the log.
    """
    require_yosys()
    (folder / made).unlink(missing_ok=True)
    command = [sys.executable, "-c", _WORKER, script, str(int(memory_limit_gb * 1e9))]
    code = run(command, cwd=folder, log=folder / log, time_limit_s=time_limit_s, on_line=on_line)
    if code or not (folder / made).exists():
        raise ToolFailed(
            f"Yosys failed with exit code {code} (memory limit {memory_limit_gb:g} GB); its log is {folder / log}"
        )


def resources(counts: dict[str, Any]) -> Resources:
    """The record of Yosys's cell counts (`stat -json`)."""
    cells: dict[str, int] = counts["design"]["num_cells_by_type"]

    def total(*prefixes: str) -> int:
        return sum(number for cell, number in cells.items() if cell.startswith(prefixes))

    return Resources(
        stage="yosys",
        tool="yosys",
        version=counts["creator"].split()[1],
        part=FAMILY,
        lut=total("LUT", "SRL", "RAM32", "RAM64", "RAM128", "RAM256"),
        ff=total("FD"),
        dsp=total("DSP"),
        bram=total("RAMB18") + 2 * total("RAMB36"),
        carry=total("CARRY"),
        notes=_NOTES,
    )
