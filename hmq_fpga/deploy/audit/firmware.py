"""Faults of an hls4ml project, each in a copy of it that is compiled and run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.audit.fault import Fault, Meaning, type_cast, with_op
from hmq_fpga.deploy.hls.csim import Library
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Dense, Linear, Quantize, Table

_TYPE = re.compile(r"ap_u?fixed<[^>]*>")
_MOVED = re.compile(r"= data\[(\d+)\]")
_POOLING = re.compile(r"^struct (\w+) : nnet::pooling\w*_config \{$.*?^\};$", re.MULTILINE | re.DOTALL)
_WINDOW = re.compile(r"static const unsigned ((?:pool|stride)_(?:height|width)|pad_(?:top|left)) = (\d+);")


@dataclass(frozen=True, eq=False)
class _Copy:
    """A copy of a project, with hooks, and its library: with them a fault is compiled once for all comparisons."""

    project: HlsProject
    library: Library
    name: ClassVar[str] = HlsProject.name

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        return self.project.run(self.library, x)

    def takes(self, codes: Mapping[str, Codes]) -> Mapping[str, Codes]:
        return self.project.takes(codes)

    def layers(self, given: Mapping[str, Codes]) -> Mapping[str, Codes]:
        return self.project.run_layers(self.library, given)


class Firmware:
    """A project whose copies get faults.

    Attributes:
        net: the network.
        project: its project, which stays as it is.
        scratch: a folder for the copies.
    """

    def __init__(self, net: QNet, project: HlsProject, scratch: Path) -> None:
        self.net, self.project, self.scratch = net, project, scratch
        self.copies = 0

    def faults(self, rng: np.random.Generator) -> Iterator[Fault]:
        """Of constants, types and connections in turn, without end; constants need no compiler."""
        kinds: tuple[Callable[[np.random.Generator], Fault | None], ...] = (
            self._code,
            self._type,
            self._swap,
            self._type,
            self._moved,
            self._window,
            self._entry,
        )
        while True:
            for kind in kinds:
                if fault := kind(rng):
                    yield fault

    def _copy(self) -> HlsProject:
        self.copies += 1
        return self.project.hooked(self.scratch / f"copy{self.copies}")

    @cached_property
    def _compiled(self) -> tuple[HlsProject, Path]:
        project = self._copy()
        return project, project.build()

    def _weights(self, op: Linear | Table, letter: str) -> Path | None:
        """The file of an op's constants: hls4ml counts its layers as it counts their variables."""
        variable = next(t.variable for t in self.project.tensors if t.op == op.name)
        number = re.search(r"\d+", variable)
        path = self.project.folder / "firmware" / "weights" / f"{letter}{number[0] if number else ''}.txt"
        return path if path.exists() else None

    def _constants(self, kind: str, op: Linear, letter: str, values: Codes, change: str, meaning: QNet) -> Fault | None:
        format = op.weight_format if letter == "w" else self.net.bias_format(op)
        held = format.decode(getattr(op, "weight" if letter == "w" else "bias"))
        return self._of_file(kind, op, letter, held, format.decode(values), change, meaning)

    def _of_file(
        self,
        kind: str,
        op: Linear | Table,
        letter: str,
        held: npt.NDArray[np.float64],
        values: npt.NDArray[np.float64],
        change: str,
        meaning: QNet,
    ) -> Fault | None:
        """Other values in a file of constants; None where it holds those of the network in another order."""
        path = self._weights(op, letter)
        if path is None or not np.array_equal(np.array(path.read_text().split(","), np.float64), held.ravel()):
            return None
        text = ", ".join(f"{v:.17g}" for v in values.ravel())

        @contextmanager
        def simulator() -> Iterator[_Copy]:
            project, built = self._compiled
            file = project.folder / "firmware" / "weights" / path.name
            before = file.read_text()
            file.write_text(text)
            try:
                yield _Copy(project, project.library(built))
            finally:
                file.write_text(before)

        where = f"firmware/weights/{path.name}, {op.name}"
        return Fault(
            backend="hls", kind=kind, where=where, change=change, simulator=simulator, meaning=Meaning(net=meaning)
        )

    def _entry(self, rng: np.random.Generator) -> Fault | None:
        """One entry of a table, which hls4ml holds by the bits of what is read."""
        tables = [op for op in self.net.ops if isinstance(op, Table)]
        if not tables:
            return None
        op = tables[rng.integers(len(tables))]
        size = len(op.values)
        by_bits = (np.arange(size) - self.net.formats[op.source].lo) % size
        values = op.values.copy()
        at = int(rng.integers(size))
        was = int(values[at])
        values[at] = now = was + 1 if was < op.format.hi else was - 1
        held, planted = (op.format.decode(codes[by_bits]) for codes in (op.values, values))
        change = f"code [{at}] from {was} to {now}"
        return self._of_file("table entry", op, "table", held, planted, change, with_op(self.net, op, values=values))

    def _code(self, rng: np.random.Generator) -> Fault | None:
        op = self.net.linears[rng.integers(len(self.net.linears))]
        field, letter = ("weight", "w") if rng.random() < 0.7 else ("bias", "b")
        format = op.weight_format if letter == "w" else self.net.bias_format(op)
        values: Codes = getattr(op, field).copy()
        at = int(rng.integers(values.size))
        was = int(values.flat[at])
        now = was + 1 if was < format.hi else was - 1
        if not format.lo <= now <= format.hi:
            return None
        values.flat[at] = now
        index = list(map(int, np.unravel_index(at, values.shape)))
        change = f"code {index} from {was} to {now}"
        return self._constants(
            f"code of a {field}", op, letter, values, change, with_op(self.net, op, **{field: values})
        )

    def _swap(self, rng: np.random.Generator) -> Fault | None:
        op = self.net.linears[rng.integers(len(self.net.linears))]
        if not isinstance(op, Dense) or op.weight.shape[1] < 2:
            return None
        first, second = (int(i) for i in rng.choice(op.weight.shape[1], 2, replace=False))
        values = op.weight.copy()
        values[:, [first, second]] = values[:, [second, first]]
        change = f"outputs {first} and {second}"
        return self._constants("swapped channels", op, "w", values, change, with_op(self.net, op, weight=values))

    def _type(self, rng: np.random.Generator) -> Fault | None:
        tensors = [t for t in self.project.tensors if t.op in {op.name for op in self.net.ops}]
        tensor = tensors[rng.integers(len(tensors))]
        role = sorted(tensor.typedefs)[rng.integers(len(tensor.typedefs))]
        name = tensor.typedefs[role]
        defines = self.project.folder / "firmware" / "defines.h"
        line = next(line for line in defines.read_text().splitlines() if line.endswith(f" {name};"))
        found = _TYPE.search(line)
        if found is None:
            return None
        kind, was = "", found[0]
        kind, now = self._changed(was, rng)
        if now == was:
            return None
        changed = line.replace(was, now)

        def edit(folder: Path) -> None:
            path = folder / "firmware" / "defines.h"
            path.write_text(path.read_text().replace(line, changed))

        meaning = self._meaning(tensor.op, role, now)
        where = f"firmware/defines.h, {role} of {tensor.op}"
        return self._compiled_fault(kind, where, f"{was} to {now}", edit, meaning)

    def _changed(self, text: str, rng: np.random.Generator) -> tuple[str, str]:
        """A type with one thing changed."""
        kind, width, integer, *modes = re.findall(r"[\w-]+", text)
        w, i = int(width), int(integer)
        choices = [
            ("width", (kind, w - 1, i)),
            ("integer part", (kind, w, i - 1)),
            ("integer part", (kind, w, i + 1)),
            ("top bit", (kind, w - 1, i - 1)),
            ("sign", ("ap_fixed" if kind == "ap_ufixed" else "ap_ufixed", w, i)),
        ]
        if modes:
            choices += [("saturation mode", (kind, w, i))] * 2 + [("rounding mode", (kind, w, i))] * 2
        what, (kind, w, i) = choices[rng.integers(len(choices))]
        if w < 1:
            return what, text
        if what == "saturation mode":
            modes = [m.replace("AP_SAT", "AP_WRAP") for m in modes]
        if what == "rounding mode":
            other = ("AP_RND", "AP_TRN")[rng.integers(2)]
            modes = [m.replace("AP_RND_CONV", other) for m in modes]
        return what, f"{kind}<{','.join(map(str, (w, i, *modes)))}>"

    def _meaning(self, name: str, role: str, text: str) -> Meaning | None:
        """What a type in the place of another makes of the network, where that can be said."""
        op, frac = self.net[name], self.net.formats[name].frac
        if isinstance(op, Quantize) and role == "result":
            source = self.net.formats[op.source].frac
            return Meaning(net=self.net, casts={name: type_cast(text, source, before=True, target=frac)})
        cast = type_cast(text, frac, before=False, target=frac)
        if isinstance(op, Linear) and role == "accum" and not cast.shift:  # then taken into the result's type
            result = type_cast(self.project.types()[name]["result"], frac, before=False, target=frac)
            first, then = cast.function, result.function
            casts = {name: replace(result, name=f"{result.name} of {text}", function=lambda codes: then(first(codes)))}
            return Meaning(net=self.net, casts=casts)
        if isinstance(op, Linear) and role == "result" and cast.shift >= 0:
            return Meaning(net=self.net, casts={name: cast})
        if isinstance(op, Linear) and role in ("weight", "bias"):
            grid = (op.weight_format if role == "weight" else self.net.bias_format(op)).frac
            cast = type_cast(text, grid, before=False, target=grid)
            values = cast.function(getattr(op, role))
            values = values >> cast.shift if cast.shift >= 0 else values << -cast.shift
            held = Fixed.enclosing(int(min(values.min(), 0)), int(values.max()), grid)
            formats = {"weight_format": held} if role == "weight" else {}
            return Meaning(net=with_op(self.net, op, **{role: values}, **formats))
        return None

    def _moved(self, rng: np.random.Generator) -> Fault | None:
        """One value of a window taken from another place, where windows are written out."""
        path = self.project.folder / "firmware" / "nnet_utils" / "nnet_code_gen.h"
        matches = list(_MOVED.finditer(path.read_text())) if path.exists() else []
        if len({m[1] for m in matches}) < 2:
            return None
        match = matches[rng.integers(len(matches))]
        other = next(m[1] for m in rng.permutation(np.array(matches, dtype=object)) if m[1] != match[1])

        def edit(folder: Path) -> None:
            file = folder / "firmware" / "nnet_utils" / "nnet_code_gen.h"
            text = file.read_text()
            file.write_text(text[: match.start(1)] + other + text[match.end(1) :])

        change = f"place {match[1]} to {other}"
        return self._compiled_fault("window", "firmware/nnet_utils/nnet_code_gen.h", change, edit, None)

    def _window(self, rng: np.random.Generator) -> Fault | None:
        """A pooling window or stride smaller, or a padding larger, by one: nothing is read from beyond the data.

        Where values come as a stream, it would wait for others for ever.
        """
        firmware = self.project.folder / "firmware"
        if "hls::stream" in (firmware / f"{self.project.top}.h").read_text():
            return None
        text = (firmware / "parameters.h").read_text()
        found = [
            (pooling[1], pooling.start() + line.start(2), line[1], int(line[2]))
            for pooling in _POOLING.finditer(text)
            for line in _WINDOW.finditer(pooling[0])
        ]
        choices = [of for of in found if of[2].startswith("pad") or of[3] > 1]
        if not choices:
            return None
        config, at, name, was = choices[rng.integers(len(choices))]
        now = was + 1 if name.startswith("pad") else was - 1

        def edit(folder: Path) -> None:
            file = folder / "firmware" / "parameters.h"
            file.write_text(f"{text[:at]}{now}{text[at + len(str(was)) :]}")

        kind = {"pool": "pooling window", "stride": "stride", "pad": "padding"}[name.partition("_")[0]]
        return self._compiled_fault(kind, f"firmware/parameters.h, {name} of {config}", f"{was} to {now}", edit, None)

    def _compiled_fault(
        self, kind: str, where: str, change: str, edit: Callable[[Path], None], meaning: Meaning | None
    ) -> Fault:
        @contextmanager
        def simulator() -> Iterator[_Copy]:
            project = self._copy()
            try:
                edit(project.folder)
                yield _Copy(project, project.library(project.build()))
            finally:
                shutil.rmtree(project.folder)

        return Fault(backend="hls", kind=kind, where=where, change=change, simulator=simulator, meaning=meaning)
