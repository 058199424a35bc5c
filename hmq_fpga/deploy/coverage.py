"""What a comparison has seen: which ends, saturations, ties and table entries of each tensor its samples reached.

A fault in a type shows only where a sample needs what the type lost, as line coverage says of lines. Interval
arithmetic on the actual weights tells which events no input can reach, and `bounds` tells it of more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    AvgPool,
    Conv,
    Dense,
    DepthwiseConv,
    Elementwise,
    Input,
    LeakyRelu,
    Linear,
    Op,
    Quantize,
    Ranges,
    Scale,
    Table,
)

State = Literal["data", "made", "layer", "unreachable", "missed"]
EVENTS: Mapping[str, str] = {
    "low": "the smallest code of a quantizer; of an exact sum a negative value that needs all bits of its format",
    "high": "the largest code of a quantizer; of an exact sum a positive value that needs all bits of its format",
    "below": "a value that saturates at the smallest code",
    "above": "a value that saturates at the largest code",
    "tie_down": "half-way between two codes, the lower one even",
    "tie_up": "half-way between two codes, the upper one even",
    "zero": "the code zero",
    "entries": "every entry of a table that an input can reach",
}
_VALUES = 1 << 22  # of all tensors at a time
_MAX_SHIFT = 20  # of a quantizer whose ties are looked for
Seen = dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class TensorCoverage:
    """What is known of one tensor.

    Attributes:
        tensor: the op that makes it.
        kind: the op's.
        events: the state of each event: `data` or `made` say which samples reached it first, `layer` that none did,
            but codes that the layer was given by itself.
        reached: smallest and largest code among all samples.
        possible: bounds of its codes that hold for all inputs, though no input may reach them.
    """

    tensor: str
    kind: str
    events: Mapping[str, State]
    reached: tuple[int, int]
    possible: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """One entry of `parity.json`'s `coverage`."""
        return {
            "tensor": self.tensor,
            "kind": self.kind,
            "events": dict(self.events),
            "reached": list(self.reached),
            "possible": list(self.possible),
        }


@dataclass(frozen=True)
class Coverage:
    """What a comparison has seen of a network, tensor by tensor."""

    tensors: Sequence[TensorCoverage]

    def count(self, *states: State) -> int:
        """How many events are in one of these states."""
        return sum(state in states for t in self.tensors for state in t.events.values())

    @property
    def missed(self) -> list[tuple[str, str]]:
        """Tensor and event of what was neither reached nor shown to be unreachable."""
        return [(t.tensor, event) for t in self.tensors for event, state in t.events.items() if state == "missed"]

    def to_json(self) -> dict[str, Any]:
        """The entry `coverage` of `parity.json`."""
        states: tuple[State, ...] = ("data", "made", "layer", "unreachable", "missed")
        return {**{state: self.count(state) for state in states}, "tensors": [t.to_json() for t in self.tensors]}


class Tally:
    """The events of a network, and which of them samples have reached."""

    def __init__(self, net: QNet) -> None:
        self.net = net
        self._sets: dict[str, set[str]] = {op.name: set() for op in net.ops}
        self._first: dict[tuple[str, str], State] = {}
        self._entries: dict[str, set[int]] = {op.name: set() for op in net.ops}
        self._range: dict[str, tuple[int, int]] = {}
        self._ranges: dict[str, Ranges] = dict(net.ranges)
        self._possible: dict[str, set[str]] = {op.name: _possible(net, op, net.ranges) for op in net.ops}

    def narrow(self, tensor: str, ranges: Ranges) -> None:
        """Take in that a tensor's channels hold less than interval arithmetic says."""
        known = self._ranges[tensor]
        self._ranges[tensor] = Ranges(np.maximum(known.lo, ranges.lo), np.minimum(known.hi, ranges.hi))
        for op in self.net.ops:
            if op.name == tensor or tensor in op.reads:
                self._possible[op.name] = _possible(self.net, op, self._ranges)

    @property
    def wanted(self) -> set[tuple[str, str]]:
        """Tensor and event of what can be and was not reached yet."""
        return {(name, event) for name, events in self._possible.items() for event in events - self._sets[name]}

    def add(self, x: npt.NDArray[np.float32], state: State) -> npt.NDArray[np.int64]:
        """Count samples `(batch, *input_shape)`; the indices of a few of them that reach all that is new in them."""
        new: list[int] = []
        step = max(_VALUES // sum(int(np.prod(shape)) for shape in self.net.shapes.values()), 1)
        for start in range(0, len(x), step):
            new += [start + i for i in self._add(x[start : start + step], state)]
        return np.array(new, np.int64)

    def _add(self, x: npt.NDArray[np.float32], state: State) -> list[int]:
        new: list[int] = []
        parts, tensors = self.net.split_inputs(x), reference.trace(self.net, x)
        for op in self.net.ops:
            codes = tensors[op.name]
            lo, hi = self._range.get(op.name, (int(codes.min()), int(codes.max())))
            self._range[op.name] = min(lo, int(codes.min())), max(hi, int(codes.max()))
            seen = _input_events(op, parts[op.name]) if isinstance(op, Input) else _events(self.net, op, tensors)
            for event in seen.keys() - self._sets[op.name]:
                hits = seen[event].reshape(len(x), -1).any(axis=1)
                if hits.any():
                    new.append(int(hits.argmax()))
                    self._reach(op.name, event, state)
            if isinstance(op, Table):
                new += self._read(op, tensors[op.source], state)
        return sorted(set(new))

    def _read(self, op: Table, codes: Codes, state: State) -> list[int]:
        """The entries of a table that samples read: the first sample of each new one."""
        values, first = np.unique(codes, return_index=True)
        new = [at // codes[0].size for v, at in zip(values, first, strict=True) if int(v) not in self._entries[op.name]]
        self._entries[op.name].update(values.tolist())
        if self._entries[op.name] >= readable(self.net, op):
            self._reach(op.name, "entries", state)
        return new

    def _reach(self, tensor: str, event: str, state: State) -> None:
        self._sets[tensor].add(event)
        self._first.setdefault((tensor, event), state)

    def seen_in_layers(self, given: Mapping[str, Codes], made: Mapping[str, Codes]) -> set[tuple[str, str]]:
        """Tensor and event of what layers reach by themselves, each by codes that its sources were given.

        Args:
            given: codes by op; of what is not given, what was made is read.
            made: what all ops make of them.
        """
        read, seen = {**made, **given}, set()
        for op in self.net.ops:
            if isinstance(op, Table) and set(np.unique(read[op.source]).tolist()) >= readable(self.net, op):
                seen.add((op.name, "entries"))
            elif not isinstance(op, Input):
                hits = _events(self.net, op, {**read, op.name: made[op.name]})
                seen |= {(op.name, event) for event, where in hits.items() if where.any()}
        return seen

    def add_layers(self, seen: set[tuple[str, str]]) -> None:
        """Count what no sample reached and layers did by themselves."""
        for tensor, event in seen & self.wanted:
            self._reach(tensor, event, "layer")

    def coverage(self) -> Coverage:
        """The state of all events."""
        rows = []
        for op in self.net.ops:
            possible, ranges = self._possible[op.name], self._ranges[op.name]
            events: dict[str, State] = {}
            for event in all_events(self.net, op):
                missed: State = "missed" if event in possible else "unreachable"
                events[event] = self._first.get((op.name, event), missed)
            if events:
                rows.append(
                    TensorCoverage(
                        tensor=op.name,
                        kind=type(op).__name__,
                        events=events,
                        reached=self._range[op.name],
                        possible=(int(ranges.lo.min()), int(ranges.hi.max())),
                    )
                )
        return Coverage(rows)


def all_events(net: QNet, op: Op) -> tuple[str, ...]:
    """The events of an op's tensor, whether or not they can be; none where it only moves values or chooses."""
    match op:
        case Input() | Quantize():
            return ("low", "high", "below", "above", "tie_down", "tie_up", "zero")
        case Table():
            return ("entries",)
        case _ if _sums(op):
            return ("low", "high", "zero") if net.formats[op.name].signed else ("high", "zero")
        case _:
            return ()


def readable(net: QNet, op: Table) -> set[int]:
    """The codes of its source that can be, by interval arithmetic."""
    ranges = net.ranges[op.source]
    spans = {(int(lo), int(hi)) for lo, hi in zip(ranges.lo, ranges.hi, strict=True)}
    return {code for lo, hi in spans for code in range(lo, hi + 1)}


def first_level(net: QNet, op: Op, event: str, sign: int) -> int | None:
    """The code, times `sign`, from which a quantizer's source or an exact sum has an event at its end; None if none."""
    if _sums(op):
        format = net.formats[op.name]
        return (format.hi >> 1) + 1 if sign > 0 else 1 - (format.lo >> 1)
    if not isinstance(op, Quantize):
        return None
    frac = net.formats[op.source].frac
    shift = frac - op.format.frac
    if not 0 <= shift <= _MAX_SHIFT:
        return None
    end = op.format.hi if sign > 0 else op.format.lo
    codes = np.arange((end - 2) << shift, (end + 2 << shift) + 1)
    hits = codes[quantizer_events(op.format, codes, frac)[event]] * sign
    return int(hits.min())


def _sums(op: Op) -> bool:
    """Whether its tensor's format is made to hold its largest values."""
    return isinstance(op, Dense | Conv | DepthwiseConv | Scale | AvgPool | LeakyRelu | Elementwise)


def _events(net: QNet, op: Op, tensors: Mapping[str, Codes]) -> Seen:
    """Where the tensors' values are events of an op's, each of its tensor's shape."""
    if isinstance(op, Quantize):
        return quantizer_events(op.format, tensors[op.source], net.formats[op.source].frac)
    return sum_events(net.formats[op.name], tensors[op.name]) if _sums(op) else {}


def quantizer_events(format: Fixed, codes: Codes, frac: int) -> Seen:
    """Which codes with fraction `frac` are events of a quantizer to `format`."""
    unbounded = Fixed(signed=True, width=MAX_WIDTH, frac=format.frac).requantize(codes, frac)
    shift = frac - format.frac
    tie, odd = np.zeros(codes.shape, bool), np.zeros(codes.shape, bool)
    if 0 < shift < MAX_WIDTH:
        floor = codes >> shift
        tie = (codes - (floor << shift) == 1 << (shift - 1)) & (floor >= format.lo) & (floor < format.hi)
        odd = floor % 2 == 1
    return _quantized(format, unbounded, tie, odd)


def sum_events(format: Fixed, codes: Codes) -> Seen:
    """Which codes of an exact sum are events: those that one bit less could not hold."""
    return {"low": codes < format.lo >> 1, "high": codes > format.hi >> 1, "zero": codes == 0}


def _input_events(op: Input, values: npt.NDArray[np.floating[Any]]) -> Seen:
    scaled = values.astype(np.float64) * 2.0**op.format.frac
    floor = np.floor(scaled)
    tie = (scaled - floor == 0.5) & (floor >= op.format.lo) & (floor < op.format.hi)
    return _quantized(op.format, np.rint(scaled), tie, floor % 2 == 1)


def _quantized(
    format: Fixed, rounded: npt.NDArray[Any], tie: npt.NDArray[np.bool_], odd: npt.NDArray[np.bool_]
) -> Seen:
    return {
        "low": rounded <= format.lo,
        "high": rounded >= format.hi,
        "below": rounded < format.lo,
        "above": rounded > format.hi,
        "tie_down": tie & ~odd,
        "tie_up": tie & odd,
        "zero": np.clip(rounded, format.lo, format.hi) == 0,
    }


def _possible(net: QNet, op: Op, ranges: Mapping[str, Ranges]) -> set[str]:
    """The events of an op that the ranges of its sources and of its sums do not exclude."""
    match op:
        case Input():
            return set(all_events(net, op))
        case Table():
            return {"entries"}
        case Quantize():
            source = net.formats[op.source]
            shift = max(source.frac - op.format.frac, 0)
            if max(shift, shift + op.format.width - MAX_WIDTH + _MAX_SHIFT) > _MAX_SHIFT:
                return set(all_events(net, op))
            levels = [code << shift for code in (op.format.lo, op.format.hi, 0)]
            codes = _candidates(net, op.source, ranges, levels, 2 << shift)
            seen = quantizer_events(op.format, codes, source.frac)
        case _ if _sums(op):
            seen = sum_events(net.formats[op.name], _candidates(net, op.name, ranges, [0], 0))
        case _:
            return set()
    return {event for event, hits in seen.items() if hits.any()}


def _candidates(net: QNet, tensor: str, ranges: Mapping[str, Ranges], levels: Iterable[int], reach: int) -> Codes:
    """Codes within `reach` of levels, and of the bounds, that a tensor's channels can have by their ranges.

    The sums of a linear op whose weights are all multiples of a power of two are that far apart.
    """
    known, one, steps = ranges[tensor], net.ranges[tensor].lo, _steps(net, net[tensor])
    sides = (side.tolist() for side in (known.lo, known.hi, one, steps))
    found = [np.empty(0, np.int64)]
    for lo, hi, anchor, step in {*zip(*sides, strict=True)}:
        for level in {*levels, lo, hi}:
            first = anchor + -(-(max(lo, level - reach - step) - anchor) // step) * step
            found.append(np.arange(first, min(hi, level + reach + step) + 1, step))
    return np.concatenate(found)


def _steps(net: QNet, op: Op) -> Codes:
    """A power of two for each channel, by multiples of which its codes differ from the lower bound of its range."""
    if not isinstance(op, Linear):
        return np.ones(net.shapes[op.name][-1], np.int64)
    source = net.ranges[op.source]
    padded = isinstance(op, Conv | DepthwiseConv) and np.any(op.padding)
    varies = (source.with_zero() if padded else source).varies
    matrix = op.matrix
    if matrix.shape[0] % len(varies) == 0 and not isinstance(op, DepthwiseConv | Scale):
        matrix = matrix * np.tile(varies, matrix.shape[0] // len(varies))[:, None]
    combined: Codes = np.bitwise_or.reduce(matrix, axis=0)
    return np.where(combined == 0, 1, combined & -combined)
