"""The routed netlist as Verilog again: what is simulated is what was placed, cell by cell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmq_fpga.ir.errors import InvalidInput

CELLS = Path(__file__).parent / "cells.v"  # what each cell computes
_BITS = re.compile(r"[01xz]+")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of cell.

    Attributes:
        inputs: its inputs.
        outputs: its outputs.
        ones: inputs that are 1 where nothing is connected; the others are 0.
        refused: values of parameters that the model has not.
        other: whether its parameters and its other ports make no difference to what is simulated.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ones: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    other: bool = False


_DRIVEN = {"TRELLIS_IO": "I", "SB_IO": "D_OUT_0"}  # the port that makes a pad an output
_KINDS: Mapping[str, _Kind] = {
    "TRELLIS_COMB": _Kind(
        inputs=("A", "B", "C", "D", "M", "FCI", "F1", "FXA", "FXB"),
        outputs=("F", "FCO", "OFX"),
        ones=("A", "B", "C", "D"),  # the switches of a look-up table's inputs are at 1 where nothing sets them
        refused=(("MODE", "DPRAM"), ("MODE", "RAMW")),
    ),
    "TRELLIS_FF": _Kind(inputs=("CLK", "LSR", "CE", "DI", "M"), outputs=("Q",), refused=(("SRMODE", "ASYNC"),)),
    "DCCA": _Kind(inputs=("CLKI", "CE"), outputs=("CLKO",)),
    "TRELLIS_IO": _Kind(inputs=("B",), outputs=("O",), refused=(("DIR", "OUTPUT"), ("DIR", "BIDIR"))),
    "TRELLIS_IO_OUTPUT": _Kind(inputs=("I",), outputs=("B",)),
    "EHXPLLL": _Kind(inputs=("CLKI",), outputs=("CLKOP", "LOCK"), other=True),
    "ICESTORM_LC": _Kind(
        inputs=("I0", "I1", "I2", "I3", "CIN", "CLK", "CEN", "SR"),
        outputs=("O", "LO", "COUT"),
        ones=("CEN",),
        refused=(("ASYNC_SR", "1"),),
    ),
    "SB_GB": _Kind(inputs=("USER_SIGNAL_TO_GLOBAL_BUFFER",), outputs=("GLOBAL_BUFFER_OUTPUT",)),
    "SB_IO": _Kind(inputs=("PACKAGE_PIN",), outputs=("D_IN_0",)),
    "SB_IO_OUTPUT": _Kind(inputs=("D_OUT_0",), outputs=("PACKAGE_PIN",)),
}


def netlist_verilog(netlist: Path, top: str) -> str:
    """Verilog of a routed netlist, an instance for each cell, which `cells.v` has the modules of.

    Args:
        netlist: the JSON that nextpnr writes.
        top: name of its module, and of the Verilog's.

    Raises:
        InvalidInput: when it is no netlist, or has a cell or a mode of one that `cells.v` has not.
    """
    try:
        module = json.loads(netlist.read_text())["modules"][top]
        ports, cells = module["ports"], module["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{netlist}: not a routed netlist of {top}: {error}") from error
    lines = ["`timescale 1 ns / 1 ps", "", f"module {top} ("]
    lines.append(",\n".join(f"    {_declared(name, port)}" for name, port in ports.items()))
    lines.append(");")
    bits = {bit for cell in cells.values() for bits in cell["connections"].values() for bit in bits}
    bits |= {bit for port in ports.values() for bit in port["bits"]}
    lines += [f"    wire n{bit};" for bit in sorted(bit for bit in bits if isinstance(bit, int))]
    for name, port in ports.items():
        joined = "{" + ", ".join(_wire(bit) for bit in reversed(port["bits"])) + "}"
        lines.append(
            f"    assign {joined} = {name};" if port["direction"] == "input" else f"    assign {name} = {joined};"
        )
    for number, (name, cell) in enumerate(cells.items()):
        model = cell["type"]
        if cell["connections"].get(_DRIVEN.get(model)):
            model += "_OUTPUT"
        if model not in _KINDS:
            raise InvalidInput(f"{netlist}: cell {name!r} is a {model}, which is not simulated")
        lines.append(_instance(netlist, name, cell, model, f"c{number}"))
    return "\n".join([*lines, "endmodule", ""])


def _declared(name: str, port: Mapping[str, Any]) -> str:
    width = f"[{len(port['bits']) - 1}:0] " if len(port["bits"]) > 1 else ""
    return f"{port['direction']} wire {width}{name}"


def _wire(bit: int | str) -> str:
    return f"n{bit}" if isinstance(bit, int) else "1'b1" if bit == "1" else "1'b0"


def _instance(netlist: Path, name: str, cell: Mapping[str, Any], model: str, label: str) -> str:
    kind = _KINDS[model]
    parameters = {key: value.strip() for key, value in cell["parameters"].items() if not kind.other}
    if wrong := next((f"{key} {value}" for key, value in kind.refused if parameters.get(key) == value), None):
        raise InvalidInput(f"{netlist}: cell {name!r}: {cell['type']} with {wrong} is not simulated")
    connected = {port: bits for port, bits in cell["connections"].items() if bits}
    if not kind.other and (unknown := set(connected) - {*kind.inputs, *kind.outputs}):
        raise InvalidInput(f"{netlist}: cell {name!r}: port {min(unknown)} of {cell['type']} is not simulated")
    if "FXA" in connected or "FXB" in connected:
        parameters["SECOND"] = "1"
    ports = [f".{port}({_wire(connected[port][0])})" for port in kind.outputs if port in connected]
    for port in kind.inputs:
        if port in connected:
            ports.append(f".{port}({_wire(connected[port][0])})")
        else:
            ports.append(f".{port}(1'b{int(port in kind.ones)})")
    # nextpnr puts a space behind text that would read as bits
    texts = {key for key, value in cell["parameters"].items() if not _BITS.fullmatch(value)}
    set_to = [
        f'.{key}("{value}")' if key in texts else f".{key}({len(value)}'b{value})" for key, value in parameters.items()
    ]
    chosen = f"#({', '.join(set_to)}) " if set_to else ""
    return f"    {model} {chosen}{label} ({', '.join(ports)});"
