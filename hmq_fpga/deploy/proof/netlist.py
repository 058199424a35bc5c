"""Verilog in canonical forms: Yosys elaborates it down to additions, bits and registers, and these are followed.

A word is known as an integer that has its bits, modulo two to the power of its width. Where bits of several words are
put together, the parts of one word add up again to what they are of it. The modules of single operations are followed
from their ports, so that what leaves one is a word, however it was put together.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hmq_fpga.deploy.proof.forms import Forms, Value
from hmq_fpga.deploy.proof.network import product, select
from hmq_fpga.deploy.rtl.verilator import Port
from hmq_fpga.deploy.toolchain import ToolFailed, ToolMissing, run
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes

_CELLS = ("$add", "$sub", "$neg", "$mul", "$and", "$or", "$xor", "$not", "$reduce_or", "$reduce_and", "$mux", "$pmux")
_COMPARED = ("$eq", "$logic_not")
_IGNORED = ("$scopeinfo",)
_WORKER = """\
import sys
from pyosys import libyosys
libyosys.run_pass("script " + sys.argv[1], libyosys.Design())
"""
Bit = int | str


@dataclass(frozen=True)
class Netlist:
    """What Yosys makes of Verilog.

    Attributes:
        modules: of cells on single bits, by name.
        top: the module that holds all others, which are single operations.
    """

    modules: Mapping[str, Any]
    top: str


def elaborate(sources: Sequence[Path], top: str, flat: Sequence[str], *, time_limit_s: float = 600) -> Netlist:
    """Read Verilog by Yosys, without any optimization.

    Args:
        sources: the files.
        top: the module that is looked at.
        flat: patterns of the modules that become part of it.
        time_limit_s: wall-clock limit in seconds.

    Raises:
        ToolMissing: without pyosys.
        ToolFailed: when Yosys cannot read it, with its last line.
    """
    if importlib.util.find_spec("pyosys") is None:
        raise ToolMissing("pyosys not found, needed to read the Verilog: pip install pyosys==0.70")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for i, source in enumerate(sources):  # Yosys does not take every character that a path may have
            (folder / f"{i}.v").write_bytes(source.read_bytes())
        names = " ".join(f"{i}.v" for i in range(len(sources)))
        steps = [
            f"read_verilog -sv -defer {names}",
            f"hierarchy -check -top {top}",
            "proc -norom",
            "setattr -mod -set keep_hierarchy 1 *",
            f"setattr -mod -unset keep_hierarchy {top} {' '.join(flat)}",
            "flatten",
            "opt_clean",
            "write_json net.json",
        ]
        (folder / "read.ys").write_text("\n".join(steps) + "\n")
        command = [sys.executable, "-c", _WORKER, "read.ys"]
        code = run(command, cwd=folder, log=folder / "log", time_limit_s=time_limit_s)
        if code or not (folder / "net.json").exists():
            lines = [line for line in (folder / "log").read_text().splitlines() if "ERROR" in line]
            raise ToolFailed(f"Yosys cannot read the Verilog: {' '.join(lines[:1]) or f'exit code {code}'}")
        return Netlist(json.loads((folder / "net.json").read_text())["modules"], top)


def netlist_forms(
    netlist: Netlist, inputs: Sequence[Value], input_port: Port, output_port: Port, forms: Forms
) -> tuple[list[Value], set[int]]:
    """The output codes in a row, and after how many registers they come.

    Raises:
        InvalidInput: for a cell that is not followed.
    """
    reader = _Reader(netlist, netlist.top, forms)
    for i, value in enumerate(inputs):
        word = _Word(reader.floor(value, input_port.shift), input_port.width, 0)
        field = reader.ports["model_inp"][i * input_port.width : (i + 1) * input_port.width]
        reader.give(f"model_inp {i}", field, word)
    reader.follow_all()
    values, stages = [], set()
    for i in range(output_port.elements):
        field = reader.ports["model_out"][i * output_port.width : (i + 1) * output_port.width]
        value, stage = reader.exact(field, signed=output_port.signed)
        values.append(forms.sum([(value, 1 << output_port.shift)]))
        stages |= {stage} - {None}
    return values, {stage for stage in stages if stage is not None}


@dataclass(frozen=True, eq=False)
class _Word:
    value: Value
    width: int
    stage: int | None  # registers before it; None of what is constant


class _Reader:
    def __init__(self, netlist: Netlist, module: str, forms: Forms) -> None:
        self.netlist, self.forms = netlist, forms
        description = netlist.modules[module]
        self.ports = {name: port["bits"] for name, port in description["ports"].items()}
        self.cells = {name: cell for name, cell in description["cells"].items() if cell["type"] not in _IGNORED}
        self.words: dict[str, _Word] = {}
        self.driver: dict[Bit, tuple[str, int]] = {}  # bit of a word
        self.register: dict[Bit, Bit] = {}
        for name, cell in self.cells.items():
            if cell["type"] == "$dff":
                self.register.update(zip(cell["connections"]["Q"], cell["connections"]["D"], strict=True))
            elif cell["type"] in _CELLS + _COMPARED or cell["type"] in netlist.modules:
                self.driver.update({bit: (name, i) for i, bit in enumerate(cell["connections"][self._made(cell)])})
            else:
                raise InvalidInput(f"the Verilog has a {cell['type']}, which is not followed")

    def give(self, name: str, bits: Sequence[Bit], word: _Word) -> None:
        """A word that comes from outside."""
        self.words[name] = word
        self.driver.update({bit: (name, k) for k, bit in enumerate(bits)})

    def _made(self, cell: Any) -> str:
        """The port that a cell drives."""
        driven: list[str] = [port for port, direction in cell["port_directions"].items() if direction == "output"]
        if len(driven) != 1:
            raise InvalidInput(f"the Verilog has a {cell['type']} with {len(driven)} outputs, which is not followed")
        return driven[0]

    def _instance(self, cell: Any) -> _Word:
        """What a module of one operation makes of its inputs."""
        inner, stages = _Reader(self.netlist, cell["type"], self.forms), set()
        made = self._made(cell)
        for port, bits in cell["connections"].items():
            if port != made:
                value, stage = self.modular(bits)
                stages.add(stage)
                inner.give(port, inner.ports[port], _Word(value, len(bits), stage))
        inner.follow_all()
        value, _ = inner.modular(inner.ports[made])
        return _Word(value, len(inner.ports[made]), _same(stages - {None}))

    def follow_all(self) -> None:
        """Each cell after those that it reads."""
        for name, cell in self.cells.items():
            if cell["type"] == "$dff":
                continue
            stack = [name]
            while stack:
                current = stack[-1]
                if current in self.words:
                    stack.pop()
                    continue
                if missing := self._read_by(current) - self.words.keys():
                    if len(stack) > len(self.cells):
                        raise InvalidInput("the Verilog has a loop")
                    stack += missing
                    continue
                self.words[current] = self._follow(self.cells[current])
                stack.pop()

    def _read_by(self, name: str) -> set[str]:
        cell = self.cells[name]
        read = [
            b for port, bits in cell["connections"].items() if cell["port_directions"][port] == "input" for b in bits
        ]
        return {self.driver[bit][0] for bit, _ in map(self._source, read) if bit in self.driver}

    def _source(self, bit: Bit) -> tuple[Bit, int]:
        """Where a bit comes from, and through how many registers."""
        count = 0
        while bit in self.register:
            bit, count = self.register[bit], count + 1
        return bit, count

    def _follow(self, cell: Any) -> _Word:
        bits, kind = cell["connections"], cell["type"]
        if kind in self.netlist.modules:
            return self._instance(cell)
        number = {key: int(text, 2) for key, text in cell["parameters"].items()}
        width = number.get("Y_WIDTH", number.get("WIDTH", 1))
        sides = []
        for side in ("A", "B"):
            if side in bits and kind != "$pmux":
                modular = kind in ("$add", "$sub", "$neg", "$not", "$mux") and len(bits[side]) >= width
                signed = bool(number.get(f"{side}_SIGNED", 0))
                sides.append(self.modular(bits[side]) if modular else self.exact(bits[side], signed=signed))
        if kind in ("$mux", "$pmux"):
            return self._chosen(cell, width)
        stages = {stage for _, stage in sides if stage is not None}
        return _Word(self._computed(kind, [value for value, _ in sides], number), width, _same(stages))

    def _computed(self, kind: str, sides: list[Value], number: Mapping[str, int]) -> Value:
        forms, first, second = self.forms, sides[0], sides[-1]
        match kind:
            case "$add":
                return forms.sum([(first, 1), (second, 1)])
            case "$sub":
                return forms.sum([(first, 1), (second, -1)])
            case "$neg":
                return forms.sum([(first, -1)])
            case "$not":
                return forms.sum([(first, -1)], -1)
            case "$mul":
                return product(forms, first, second)
            case "$reduce_or":
                return self._function(("any",), lambda x: x != 0, first, most=1)
            case "$reduce_and":
                full = (1 << number["A_WIDTH"]) - 1
                return self._function(("all", full), lambda x: x == full, first, most=1)
            case "$logic_not":
                return self._function(("none",), lambda x: x == 0, first, most=1)
            case "$eq":
                return self._function(("equal",), lambda x, y: x == y, first, second, most=1)
            case _:
                operation: Any = {"$and": np.bitwise_and, "$or": np.bitwise_or, "$xor": np.bitwise_xor}[kind]
                most = (1 << number["Y_WIDTH"]) - 1
                return self._function((kind,), lambda x, y: operation(x, y) & most, first, second, most=most)

    def _chosen(self, cell: Any, width: int) -> _Word:
        """A multiplexer: of `B` where `S`, else `A`; of many the first whose bit of `S` is set."""
        bits = cell["connections"]
        value, stage = self.modular(bits["A"])
        stages = {stage}
        for i, bit in reversed(list(enumerate(bits["S"]))):
            key, at = self.exact([bit], signed=False)
            other, stage = self.modular(bits["B"][i * width : (i + 1) * width])
            stages |= {at, stage}
            value = select(self.forms, ("set",), lambda k: k != 0, key, other, value)
        return _Word(value, width, _same(stages - {None}))

    def _function(self, name: tuple[Any, ...], function: Any, *values: Value, most: int) -> Value:
        found = self.forms.apply(name, function, *values)
        return self.forms.opaque(name, values, 0, most) if found is None else found

    def modular(self, bits: Sequence[Bit]) -> tuple[Value, int | None]:
        """An integer that has these bits, modulo two to their number."""
        return self._joined(bits, exact=False)

    def exact(self, bits: Sequence[Bit], *, signed: bool) -> tuple[Value, int | None]:
        """The integer that these bits are."""
        value, stage = self._joined(bits, exact=not signed)
        return (self._wrapped(value, len(bits)) if signed else value), stage

    def _joined(self, bits: Sequence[Bit], *, exact: bool) -> tuple[Value, int | None]:
        """The number of bits, an integer that has them or the one from zero up that they are.

        Bits at the end that only extend it, by its sign or by zeros, say which integer it is.
        """
        sources = [self._source(bit) for bit in bits]
        known = len(bits)
        while known > 1 and sources[known - 1] == sources[known - 2]:
            known -= 1
        signed = known < len(bits) and sources[-1][0] not in ("0", "1", "x")
        if not signed:
            known = len(bits)
            while known and sources[known - 1][0] == "0":
                known -= 1
        total, stage = self._together(sources[:known])
        if signed and not exact:
            return self._wrapped(total, known), stage
        if signed:  # its sign's bits count upwards
            return self._masked(self._wrapped(total, known), len(bits)), stage
        return (self._masked(total, known) if exact or known < len(bits) else total), stage

    def _together(self, sources: Sequence[tuple[Bit, int]]) -> tuple[Value, int | None]:
        """An integer that has these bits, each behind so many registers."""
        parts: list[tuple[Value, int]] = []
        constant, position, stages = 0, 0, set()
        while position < len(sources):
            source, registers = sources[position]
            if isinstance(source, str):
                constant += int(source == "1") << position
                position += 1
                continue
            if source not in self.driver:
                raise InvalidInput(f"bit {source} of the Verilog is driven by nothing")
            name, first = self.driver[source]
            word, length = self.words[name], 1
            for other, behind in sources[position + 1 :]:
                if behind != registers or self.driver.get(other) != (name, first + length):
                    break
                length += 1
            if word.stage is not None:
                stages.add(word.stage + registers)
            value = self.floor(word.value, first)
            if position + length < len(sources):
                value = self._masked(value, length)
            parts.append((value, 1 << position))
            position += length
        return self.forms.sum(parts, constant), _same(stages)

    def floor(self, value: Value, shift: int) -> Value:
        if not shift:
            return value
        found = self.forms.apply(("floor", shift), lambda x: x >> shift, value)
        lo, hi = self.forms.bounds(value)
        return self.forms.opaque(("floor", shift), [value], lo >> shift, hi >> shift) if found is None else found

    def _masked(self, value: Value, length: int) -> Value:
        lo, hi = self.forms.bounds(value)
        most = (1 << length) - 1
        if lo >= 0 and hi <= most:
            return value
        return self._function(("mask", length), lambda x: x & most, value, most=most)

    def _wrapped(self, value: Value, length: int) -> Value:
        lo, hi = self.forms.bounds(value)
        half = 1 << (length - 1)
        if lo >= -half and hi < half:
            return value

        def wrapped(x: Codes) -> Codes:
            return ((x + half) & (2 * half - 1)) - half

        found = self.forms.apply(("wrap", length), wrapped, value)
        return self.forms.opaque(("wrap", length), [value], -half, half - 1) if found is None else found


def _same(stages: set[Any]) -> int | None:
    """The one number of registers before a cell's inputs.

    Raises:
        InvalidInput: where there are several: it would mix samples.
    """
    if len(stages) > 1:
        raise InvalidInput(f"the Verilog mixes samples: values after {sorted(stages)} registers meet")
    return next(iter(stages), None)
