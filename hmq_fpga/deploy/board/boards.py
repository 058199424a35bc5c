"""The boards: which FPGA, which clock, which pins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hmq_fpga.deploy.rtl.devices import ECP5, ICE40, Family
from hmq_fpga.ir.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board with a serial line to a computer.

    Attributes:
        title: what it is.
        family: of its FPGA.
        options: of nextpnr, for its FPGA and package.
        clock_mhz: of its oscillator, in MHz.
        clock: pin of the oscillator.
        rx: pin that the computer sends to.
        tx: pin that the computer listens to.
        high: pins to hold at 1.
        pack: options of the program that makes the bitstream.
        load: command that loads the bitstream, which its end names.
        line: where the serial line ends.
    """

    title: str
    family: Family
    options: tuple[str, ...]
    clock_mhz: float
    clock: str
    rx: str
    tx: str
    high: tuple[str, ...] = ()
    pack: tuple[str, ...] = ()
    load: str
    line: str

    @property
    def bitstream(self) -> str:
        """Name of the bitstream's file."""
        return {"ecp5": "bitstream.bit", "ice40": "bitstream.bin"}[self.family.name]

    @property
    def pin_file(self) -> str:
        """Name of the file of its pins."""
        return {"ecp5": "pins.lpf", "ice40": "pins.pcf"}[self.family.name]

    def pins(self) -> str:
        """Text of the file of its pins, for the ports of the top level."""
        ports = {"clock": self.clock, "rx": self.rx, "tx": self.tx}
        ports |= {f"high[{i}]": pin for i, pin in enumerate(self.high)}
        if self.family is ICE40:
            return "".join(f"set_io {port} {pin}\n" for port, pin in ports.items())
        lines = [f'FREQUENCY PORT "clock" {self.clock_mhz:g} MHZ;\n']
        for port, pin in ports.items():
            pull = " PULLMODE=UP" if port == "rx" else ""  # a line that is not plugged in is idle
            lines.append(f'LOCATE COMP "{port}" SITE "{pin}";\nIOBUF PORT "{port}" IO_TYPE=LVCMOS33{pull};\n')
        return "".join(lines)


def _ulx3s(size: str) -> Board:
    # https://github.com/emard/ulx3s, doc/constraints/ulx3s_v20.lpf: clk_25mhz, ftdi_txd (in), ftdi_rxd (out); low on
    # wifi_gpio0 lets the ESP32 on the board take over
    return Board(
        title=f"ULX3S with an LFE5U-{size.upper()}",
        family=ECP5,
        options=(f"--{size[:-1]}k", "--package", "CABGA381", "--speed", "6"),
        clock_mhz=25.0,
        clock="G2",
        rx="M1",
        tx="L4",
        high=("L2",),
        pack=("--compress",),
        load="openFPGALoader -b ulx3s",
        line="its USB port US1, as /dev/ttyUSB0",
    )


def _orangecrab(size: str) -> Board:
    # https://github.com/orangecrab-fpga/orangecrab-examples, orangecrab_r0.2.1.pcf: clk48, gpio_0, gpio_1
    return Board(
        title=f"OrangeCrab r0.2 with an LFE5U-{size.upper()}",
        family=ECP5,
        options=(f"--{size[:-1]}k", "--package", "CSFBGA285", "--speed", "8"),
        clock_mhz=48.0,
        clock="A9",
        rx="N17",
        tx="M18",
        pack=("--compress", "--freq", "38.8"),
        load="openFPGALoader -b orangeCrab",
        line="a 3.3 V serial adapter at its pins 0 (in) and 1 (out)",
    )


BOARDS: Mapping[str, Board] = {
    **{f"ulx3s-{size}": _ulx3s(size) for size in ("12f", "25f", "45f", "85f")},
    **{f"orangecrab-{size}": _orangecrab(size) for size in ("25f", "85f")},
    # https://github.com/icebreaker-fpga/icebreaker-verilog-examples, icebreaker/icebreaker.pcf: CLK, RX, TX
    "icebreaker": Board(
        title="iCEBreaker with an iCE40UP5K",
        family=ICE40,
        options=("--up5k", "--package", "sg48"),
        clock_mhz=12.0,
        clock="35",
        rx="6",
        tx="9",
        load="openFPGALoader -b ice40_generic",
        line="the second serial port of its USB port, as /dev/ttyUSB1",
    ),
}


def find_board(name: str) -> Board:
    """The board of a name.

    Raises:
        InvalidInput: for one that is not known.
    """
    if name not in BOARDS:
        raise InvalidInput(f"board {name!r} is not known; there are {', '.join(BOARDS)}")
    return BOARDS[name]
