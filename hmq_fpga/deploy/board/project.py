"""The folder of a network on a board: top level, pins, host script; simulated as a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.board.boards import Board
from hmq_fpga.deploy.board.simulate import SimulatedBoard, Talked, compile_board, run_host
from hmq_fpga.deploy.rtl.gates import CELLS, netlist_verilog
from hmq_fpga.deploy.rtl.project import STREAM, RtlProject
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.files import replacing

TOP = "board_top"
ROUTED_TOP = "top"  # what nextpnr calls it
IDLE_BITS = 4096  # 36 ms at 115,200 baud: longer than a computer's pauses inside a frame
LONGEST = 65_535  # bytes of a frame's payload
_CODE = Path(__file__).parent

_TOP = """\
// {title}: a serial line of {baud} baud at {mhz:g} MHz, frames, the network.

`timescale 1 ns / 1 ps

module {top} #(
    parameter CLOCKS_PER_BIT = {clocks_per_bit}
) (
    input wire clock,
    input wire rx,
{high_port}    output wire tx
);

{high_value}    wire clk, locked;
    board_clock source (.clock_in(clock), .clock_out(clk), .locked(locked));

    // from power-up on, and while the clock is not stable
    reg [1:0] stable = 0;
    reg [7:0] up = 0;
    always @(posedge clk) begin
        stable <= {{stable[0], locked}};
        up <= !stable[1] ? 0 : &up ? up : up + 1;
    end
    reg resetn = 0;
    always @(posedge clk) resetn <= &up;

    wire [{in_top}:0] sample;
    wire [{out_top}:0] result;
    wire sample_valid, sample_ready, result_valid, result_ready;

    network_frames #(
        .IN_BYTES({in_bytes}), .OUT_BYTES({out_bytes}), .CLOCKS_PER_BIT(CLOCKS_PER_BIT), .IDLE_BITS({idle_bits})
    ) frames (
        .clk(clk), .resetn(resetn), .rx(rx), .tx(tx),
        .m_axis_tdata(sample), .m_axis_tvalid(sample_valid), .m_axis_tready(sample_ready),
        .s_axis_tdata(result), .s_axis_tvalid(result_valid), .s_axis_tready(result_ready)
    );

    {stream} #(.DEPTH(1)) stream (
        .aclk(clk), .aresetn(resetn),
        .s_axis_tdata(sample), .s_axis_tvalid(sample_valid), .s_axis_tready(sample_ready), .s_axis_tlast(1'b1),
        .m_axis_tdata(result), .m_axis_tvalid(result_valid), .m_axis_tready(result_ready), .m_axis_tlast()
    );

endmodule
"""
OSCILLATOR = """\
// The oscillator itself.
module board_clock (
    input wire clock_in,
    output wire clock_out,
    output wire locked
);
    assign clock_out = clock_in;
    assign locked = 1'b1;
endmodule
"""

_DIVIDER = """\
// The oscillator, divided by {divider}.
module board_clock (
    input wire clock_in,
    output wire clock_out,
    output wire locked
);
    reg [{top}:0] count = 0;
    always @(posedge clock_in) count <= count + 1;
    assign clock_out = count[{top}];
    assign locked = 1'b1;
endmodule
"""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What drives the network.

    Attributes:
        mhz: its frequency, in MHz.
        verilog: module `board_clock`, from the oscillator to this clock.
        divider: clocks of the oscillator for one of this, where it is divided.
    """

    mhz: float
    verilog: str
    divider: int = 1


def divided(oscillator_mhz: float, twice: int) -> Clock:
    """The oscillator's clock, divided by two some times."""
    return Clock(
        mhz=oscillator_mhz / (1 << twice),
        verilog=_DIVIDER.format(top=twice - 1, divider=1 << twice),
        divider=1 << twice,
    )


@dataclass(frozen=True, kw_only=True)
class BoardProject:
    """A folder with all that a network on a board is made of.

    Attributes:
        board: the board.
        folder: where it is.
        clock: what drives the network.
        clocks_per_bit: of the serial line.
        latency_cycles: of the network.
    """

    board: Board
    folder: Path
    clock: Clock
    clocks_per_bit: int
    latency_cycles: int

    @classmethod
    def create(
        cls,
        project: RtlProject,
        board: Board,
        folder: Path,
        x: npt.NDArray[np.float32],
        *,
        baud: int = 115_200,
        clock: Clock | None = None,
    ) -> BoardProject:
        """Write it, replacing the folder in one step.

        Args:
            project: the network's Verilog.
            board: the board.
            folder: where to write.
            x: real inputs `(n, *input_shape)` that the host script sends.
            baud: of the serial line.
            clock: what drives the network; None for the oscillator.

        Raises:
            InvalidInput: when a sample is too long for a frame, or the clock too slow for the line.
        """
        clock = clock or Clock(mhz=board.clock_mhz, verilog=OSCILLATOR)
        clocks_per_bit = round(clock.mhz * 1e6 / baud)
        if clocks_per_bit < 4 or abs(clock.mhz * 1e6 / baud / clocks_per_bit - 1) > 0.02:
            raise InvalidInput(f"{baud} baud cannot be had from {clock.mhz:g} MHz within 2 %; give a lower --baud")
        if max(project.input_port.bytes, project.output_port.bytes) > LONGEST:
            raise InvalidInput(f"a sample takes {project.input_port.bytes:,} bytes; a frame holds up to {LONGEST:,}")
        with replacing(folder) as new:
            sources = new / "rtl"
            sources.mkdir()
            for path in (*project.sources, _CODE / "frames.v"):
                shutil.copyfile(path, sources / path.name)
            (sources / f"{STREAM}.v").write_text(project.stream_core())
            (sources / "clock.v").write_text(clock.verilog)
            (sources / f"{TOP}.v").write_text(_top(project, board, clock, baud, clocks_per_bit))
            (new / board.pin_file).write_text(board.pins())
            layout = {"network": project.net.digest, "baud": baud, "clock_mhz": clock.mhz, "board": board.title}
            layout |= {"inputs": asdict(project.input_port), "outputs": asdict(project.output_port)}
            (new / "board.json").write_text(json.dumps(layout, indent=1) + "\n")
            shutil.copyfile(_CODE / "host.py", new / "host.py")
            codes = project.net.encode(x).reshape(len(x), -1)
            expected = reference.run(project.net, x).reshape(len(x), -1)
            np.savez_compressed(new / "samples.npz", codes=codes, expected=expected)
        return cls(
            board=board,
            folder=folder,
            clock=clock,
            clocks_per_bit=clocks_per_bit,
            latency_cycles=project.latency_cycles,
        )

    @property
    def sources(self) -> tuple[Path, ...]:
        """The Verilog files."""
        return tuple(sorted((self.folder / "rtl").glob("*.v")))

    def simulated(self, *, flips: float = 0.0, time_limit_s: float = 3600) -> SimulatedBoard:
        """The whole top level in Verilator, compiled in `sim/`; the oscillator takes the place of a PLL.

        Args:
            flips: probability that noise inverts a bit on the line.
            time_limit_s: wall-clock limit in seconds of each of the two steps.

        Raises:
            ToolMissing: without Verilator or a C++ compiler.
            ToolFailed: when a step fails or passes the limit.
        """
        sim = self.folder / "sim"
        sim.mkdir(exist_ok=True)
        (sim / "clock.v").write_text(OSCILLATOR)
        sources = [path for path in self.sources if path.name != "clock.v"]
        library = compile_board(sim, [*sources, sim / "clock.v"], TOP, time_limit_s=time_limit_s)
        return self._board(library, flips)

    def gates(self, netlist: Path, *, time_limit_s: float = 3600) -> SimulatedBoard:
        """The placed and routed top level in Verilator, cell by cell, compiled in `gates/`.

        Args:
            netlist: the JSON that nextpnr left of it.
            time_limit_s: wall-clock limit in seconds of each of the two steps.

        Raises:
            InvalidInput: when it is no netlist, or has cells that are not simulated.
            ToolMissing: without Verilator or a C++ compiler.
            ToolFailed: when a step fails or passes the limit.
        """
        folder = self.folder / "gates"
        folder.mkdir(exist_ok=True)
        verilog = folder / f"{TOP}_gates.v"
        verilog.write_text(netlist_verilog(netlist, ROUTED_TOP))
        per_bit = self.clocks_per_bit * self.clock.divider
        library = compile_board(folder, [verilog, CELLS], ROUTED_TOP, clocks_per_bit=per_bit, time_limit_s=time_limit_s)
        return self._board(library, 0.0)

    def _board(self, library: Path, flips: float) -> SimulatedBoard:
        return SimulatedBoard(library, idle_bits=IDLE_BITS, answer_bits=64 + self.latency_cycles, flips=flips)

    def simulate(
        self, *, samples: int | None = None, flips: float = 0.0, timeout_s: float = 5, time_limit_s: float = 3600
    ) -> Talked:
        """Let the host script talk to the simulated board; its log is `host.log`.

        Args:
            samples: how many to send; None for all.
            flips: probability that noise inverts a bit on the line.
            timeout_s: seconds that the host script waits for an answer.
            time_limit_s: wall-clock limit in seconds of each step.

        Raises:
            ToolMissing: without Verilator or a C++ compiler.
            ToolFailed: when a step fails or passes the limit, or the board does not answer.
        """
        with self.simulated(flips=flips, time_limit_s=time_limit_s) as board:
            return self.talk(board, samples=samples, timeout_s=timeout_s, time_limit_s=time_limit_s)

    def talk(
        self, board: SimulatedBoard, *, samples: int | None = None, timeout_s: float = 60, time_limit_s: float = 3600
    ) -> Talked:
        """Let the host script talk to a simulated board; its log is `host.log`.

        Args:
            board: the simulation.
            samples: how many to send; None for all.
            timeout_s: seconds that the host script waits for an answer.
            time_limit_s: wall-clock limit in seconds.

        Raises:
            ToolFailed: at the limit, or when the board does not answer.
        """
        script, log = (self.folder.resolve() / name for name in ("host.py", "host.log"))
        return run_host(script, board, log, samples=samples, timeout_s=timeout_s, time_limit_s=time_limit_s)


def _top(project: RtlProject, board: Board, clock: Clock, baud: int, clocks_per_bit: int) -> str:
    high = len(board.high)
    values: dict[str, Any] = {
        "title": board.title,
        "baud": f"{baud:,}",
        "mhz": clock.mhz,
        "top": TOP,
        "stream": STREAM,
        "clocks_per_bit": clocks_per_bit,
        "idle_bits": IDLE_BITS,
        "in_bytes": project.input_port.bytes,
        "out_bytes": project.output_port.bytes,
        "in_top": 8 * project.input_port.bytes - 1,
        "out_top": 8 * project.output_port.bytes - 1,
        "high_port": f"    output wire [{high - 1}:0] high,\n" if high else "",
        "high_value": "    assign high = ~0;\n\n" if high else "",
    }
    return _TOP.format(**values)
