"""From the folder of a network on a board to its bitstream: Yosys, nextpnr, and the family's own packer."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.board.boards import Board
from hmq_fpga.deploy.board.project import TOP, BoardProject, Clock, divided
from hmq_fpga.deploy.rtl.devices import ECP5
from hmq_fpga.deploy.rtl.nextpnr import DoesNotFit, Nextpnr, overflowing, tool
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.yosys import run_script
from hmq_fpga.deploy.toolchain import ToolFailed, run
from hmq_fpga.ir.errors import InvalidInput

BUILT = "built.json"  # the record of a bitstream
NETLIST, REPORT, ROUTED = "netlist.json", "report.json", "routed.json"
TRIES = 4  # clocks until the timing is met
SLOWEST_MHZ = 16.5  # that PLLs of iCE40 make; those of ECP5 make 10
MARGIN = 0.97  # of the highest clock of one placement, for the next
_MEMORY_GB = 8.0
_OUTPUT_MHZ = re.compile(r"clkout0 frequency: ([\d.]+) MHz|F_PLLOUT:\s+([\d.]+) MHz \(achieved\)")


@dataclass(frozen=True, kw_only=True)
class _Beside(Nextpnr):
    """A program that comes with the nextpnr of a family."""

    @property
    def function(self) -> str:
        """What the package calls it, behind `run_`."""
        return self.program


class TooSlow(ToolFailed):
    """No clock was found that the placed and routed network keeps."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bitstream.

    Attributes:
        bitstream: its file.
        load: the command that loads it.
        line: where the serial line ends.
        clock_mhz: the network's clock, in MHz.
        fmax_mhz: the highest that it could be, by nextpnr after routing, in MHz.
        latency_cycles: of the network.
        used: places of the FPGA that are taken and there are, by their kind.
    """

    bitstream: str
    load: str
    line: str
    clock_mhz: float
    fmax_mhz: float
    latency_cycles: int
    used: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


def build(
    project: RtlProject,
    board: Board,
    folder: Path,
    x: npt.NDArray[np.float32],
    *,
    baud: int = 115_200,
    mhz: float | None = None,
    time_limit_s: float = 3600,
    on_step: Callable[[str], None] | None = None,
) -> tuple[BoardProject, Built]:
    """Write the folder of a network on a board, and make its bitstream.

    The network runs at the oscillator's clock, or, where that is too fast for it or another one is wanted, at a PLL's
    below what nextpnr finds possible.

    Args:
        project: the network's Verilog.
        board: the board.
        folder: where to write; an earlier one is replaced.
        x: real inputs `(n, *input_shape)` that the host script sends.
        baud: of the serial line.
        mhz: highest clock, in MHz; None for the oscillator's.
        time_limit_s: wall-clock limit of each step, in seconds.
        on_step: hears in words what begins.

    Returns:
        The folder, and what came of it.

    Raises:
        ToolMissing: without Yosys or nextpnr.
        ToolFailed: when one fails or passes the limit, or no clock is found; the message names the log.
        DoesNotFit: when the FPGA is too small.
        InvalidInput: when no frame or no serial line can be had of it.
    """
    say = on_step or (lambda _: None)
    tool(board.family).require()
    if mhz is not None and mhz <= 0:
        raise InvalidInput(f"--mhz {mhz:g}: give a frequency above 0")
    clock = None if mhz is None or mhz == board.clock_mhz else clock_below(board, mhz, time_limit_s)
    for _ in range(TRIES):
        made = BoardProject.create(project, board, folder, x, baud=baud, clock=clock)
        say(f"synthesizing for {board.title} at {made.clock.mhz:g} MHz")
        _synthesize(made, time_limit_s)
        say("placing and routing")
        fmax, used = _place_and_route(made, time_limit_s)
        if fmax >= made.clock.mhz:
            break
        say(f"{fmax:.1f} MHz are possible")
        clock = clock_below(board, MARGIN * fmax, time_limit_s)
    else:
        raise TooSlow(f"{board.title}: {fmax:.1f} MHz after routing at {made.clock.mhz:g}; give a lower --mhz")
    say("packing")
    _pack(made, time_limit_s)
    built = Built(
        bitstream=str(folder / board.bitstream),
        load=f"{board.load} {folder / board.bitstream}",
        line=board.line,
        clock_mhz=made.clock.mhz,
        fmax_mhz=round(fmax, 2),
        latency_cycles=made.latency_cycles,
        used=used,
    )
    (folder / BUILT).write_text(json.dumps(built.to_json(), indent=1) + "\n")
    return made, built


def clock_below(board: Board, mhz: float, time_limit_s: float) -> Clock:
    """About the fastest clock of at most some MHz that the board makes of its oscillator.

    That is a PLL's, or, below what those make, the oscillator's divided by a power of two.

    Raises:
        ToolMissing: without the package of the family.
        ToolFailed: when there is none.
    """
    if mhz >= SLOWEST_MHZ:
        return _pll(board, mhz, time_limit_s)
    return divided(board.clock_mhz, max(1, math.ceil(math.log2(board.clock_mhz / mhz))))


def _pll(board: Board, mhz: float, time_limit_s: float) -> Clock:
    wanted, program, names = mhz, "icepll", ["-p", "-m", "-n", "board_clock"]  # -p: the clock's pad is the PLL's own
    if board.family is ECP5:
        program = "ecppll"
        names = ["--module", "board_clock", "--clkin_name", "clock_in", "--clkout0_name", "clock_out"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for _ in range(20):
            log, both = folder / "pll.log", ("-i", f"{board.clock_mhz:g}", "-o", f"{wanted:.4f}", "-f", "clock.v")
            _program(board, program, (*both, *names), folder, log, time_limit_s)
            found = _OUTPUT_MHZ.search(log.read_text())
            achieved = float(found[1] or found[2]) if found else 0.0
            if 0 < achieved <= mhz:
                return Clock(mhz=achieved, verilog=(folder / "clock.v").read_text())
            wanted *= 0.99
    raise ToolFailed(f"{board.title}: its PLL makes no clock of {mhz:.3g} MHz or a little less from its oscillator")


def _synthesize(made: BoardProject, time_limit_s: float) -> None:
    files = " ".join(str(path.relative_to(made.folder)) for path in made.sources)
    script = [
        f"read_verilog -sv -defer {files}",
        f"{made.board.family.synthesis} -top {TOP} -json {NETLIST}",
        "tee -q -o cells.json stat -json",
    ]
    (made.folder / "synth.ys").write_text("\n".join(script) + "\n")
    run_script(
        made.folder, "synth.ys", "yosys.log", "cells.json", time_limit_s=time_limit_s, memory_limit_gb=_MEMORY_GB
    )


def _place_and_route(made: BoardProject, time_limit_s: float) -> tuple[float, dict[str, tuple[int, int]]]:
    """The highest clock, in MHz, and the places taken and there."""
    board, folder = made.board, made.folder
    log, report = folder / "nextpnr.log", folder / REPORT
    pins, packed = ("--lpf", "--textcfg") if board.family is ECP5 else ("--pcf", "--asc")
    files = ("--json", NETLIST, pins, board.pin_file, packed, "packed.txt", "--write", ROUTED, "--report", REPORT)
    goal = ("--freq", f"{made.clock.mhz:g}", "--timing-allow-fail", "--seed", "1")
    code = _run(tool(board.family), (*board.options, *files, *goal), folder, log, time_limit_s)
    if code or not report.exists():
        if counts := overflowing(log.read_text(errors="replace")):
            raise DoesNotFit(f"does not fit {board.title}: {counts}; give a larger board or a network of fewer LUTs")
        raise ToolFailed(f"{board.family.program} failed with exit code {code}; its log is {log}")
    found = json.loads(report.read_text())
    used = {kind: (p["used"], p["available"]) for kind, p in found["utilization"].items() if p["used"]}
    return _fmax(found), used


def _fmax(report: dict[str, Any]) -> float:
    """The highest clock of a report of nextpnr, in MHz."""
    return float(min(clock["achieved"] for clock in report["fmax"].values()))


def _pack(made: BoardProject, time_limit_s: float) -> None:
    board, log = made.board, made.folder / "pack.log"
    program = "ecppack" if board.family is ECP5 else "icepack"
    files = ("packed.txt", board.bitstream)
    _program(board, program, (*board.pack, *files), made.folder, log, time_limit_s)


def _program(board: Board, name: str, arguments: Sequence[str], folder: Path, log: Path, time_limit_s: float) -> None:
    """Run a program that comes with the family's nextpnr."""
    program = _Beside(
        program=name,
        variable=f"HMQ_FPGA_{name.upper()}",
        purpose=f"make bitstreams of {board.family.name} devices",
        remedy="pip install 'hmq-fpga[route]'",
        family=board.family,
    )
    if code := _run(program, arguments, folder, log, time_limit_s):
        raise ToolFailed(f"{name} failed with exit code {code}; its log is {log}")


def _run(program: Nextpnr, arguments: Sequence[str], folder: Path, log: Path, time_limit_s: float) -> int:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:  # a package that is stopped leaves its own
        environment = {**os.environ, "TMPDIR": str(Path(scratch).resolve())}
        command = [*program.command(_MEMORY_GB), *arguments]
        return run(command, cwd=folder, log=log, time_limit_s=time_limit_s, env=environment)
