"""A network as hls4ml's layers compute it exactly: the same values, some of them made in another way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hmq_fpga.deploy.settings import IoType
from hmq_fpga.ir.errors import assert_never
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Gather,
    Input,
    LeakyRelu,
    Maximum,
    MaxPool,
    Merge,
    Minimum,
    Multiply,
    Op,
    Pad,
    Padding,
    Quantize,
    Scale,
    Shape,
    Subtract,
    Table,
    TensorType,
    Upsample,
)

_NO_ZEROS: Mapping[int, Padding] = {1: ((0, 0),), 2: ((0, 0), (0, 0))}
MAX_READERS = 7  # of one stream: hls4ml's copies of it


class View(Gather):
    """Values in their order under another shape: between arrays hls4ml's Reshape, which takes no hardware."""


@dataclass(frozen=True)
class Lowered:
    """A network made of another.

    Attributes:
        net: whose every op is a layer of hls4ml's.
        held: by op of the other network, the op of `net` that holds its values, in their order, maybe in another shape.
    """

    net: QNet
    held: Mapping[str, str]


def lowered(net: QNet, io_type: IoType) -> Lowered:
    """What hls4ml is given of a network.

    Dilation and groups are zeros of a convolution's weight, a dense layer of several positions is a convolution by one,
    and beyond three dimensions all positions are one dimension. What only gives values another shape is left out until
    an op needs that shape: a quantizer of a flattened image is one of the image, as hls4ml's streams need it. Streams
    have no layer for windows that overlap, or lines that are left out: there, the windows are put side by side before.
    """
    return _Lowering(net, io_type).made()


def is_copy(net: QNet, op: Op) -> bool:
    """Whether an op leaves every value and its place as they are; hls4ml drops such layers, or their copies cost."""
    match op:
        case Quantize():
            return op.format == net.formats[op.source]
        case Scale():
            return _is_by_one(op)
        case Flatten():
            return len(net.shapes[op.source]) == 1
        case Gather():
            return keeps_order(net, op) and op.index.shape == net.shapes[op.source]
        case _:
            return False


def keeps_order(net: QNet, op: Gather) -> bool:
    """Whether it gives all values of its source, in their order."""
    return bool(np.array_equal(op.index.ravel(), np.arange(math.prod(net.shapes[op.source]))))


def makers(net: QNet) -> dict[str, str]:
    """By op of a lowered network, the op whose layer makes its tensor: itself, or what it scales by one."""
    found: dict[str, str] = {}
    for op in net.ops:
        found[op.name] = found[op.source] if isinstance(op, Scale) and is_copy(net, op) else op.name
    return found


class _Lowering:
    """One network being lowered, op by op."""

    def __init__(self, net: QNet, io_type: IoType) -> None:
        self._net, self._streams = net, io_type == "io_stream"
        self._ops: dict[str, Op] = {}
        self._taken = {op.name for op in net.ops}
        self._tensors: dict[str, TensorType] = {}
        self._held: dict[str, str] = {}
        self._reshaped: dict[tuple[str, Shape, bool], str] = {}

    def made(self) -> Lowered:
        for op in self._net.ops:
            self._lower(op)
        outputs = self._ports()
        return Lowered(QNet(self._copied_in_turn(), outputs), self._held)

    def _lower(self, op: Op) -> None:
        if not isinstance(op, Scale) and is_copy(self._net, op):
            self._held[op.name] = self._held[op.reads[0]]
            return
        match op:
            case Input():
                self._add(op)
            case Flatten():
                self._held[op.name] = self._held[op.source]
            case Gather():
                if keeps_order(self._net, op):
                    self._held[op.name] = self._held[op.source]
                else:
                    self._add(replace(op, source=self._held[op.source], index=_carried(op.index)))
            case Quantize() | LeakyRelu() | Table():
                self._add(replace(op, source=self._held[op.source]))
            case Dense():
                self._dense(op)
            case Scale() if _is_by_one(op):  # whatever the channels are
                channels = self._tensors[self._held[op.source]].shape[-1]
                weight, bias = op.weight[:1].repeat(channels), op.bias[:1].repeat(channels)
                self._add(replace(op, source=self._held[op.source], weight=weight, bias=bias))
            case Scale():
                self._add(replace(op, source=self._by_channel(op.source)))
            case Conv():
                self._convolution(replace(op, weight=op.full_weight, dilation=(), groups=1))
            case DepthwiseConv():
                self._convolution(replace(op, weight=op.full_weight, dilation=()))
            case MaxPool() | AvgPool():
                self._pool(op)
            case Pad() | Upsample():
                self._add(replace(op, source=self._shaped(op.source)))
            case Concat():
                first, second = op.sources
                self._add(replace(op, sources=(self._shaped(first), self._shaped(second))))
            case Add() | Subtract() | Maximum() | Minimum() | Multiply():
                self._add(replace(op, sources=self._alike(op.sources)))
            case _:
                assert_never(op)

    def _add(self, op: Op) -> str:
        self._ops[op.name] = op
        self._tensors[op.name] = op.result([self._tensors[name] for name in op.reads])
        if op.name in self._net.shapes:
            self._held.setdefault(op.name, op.name)
        return op.name

    def _dense(self, op: Dense) -> None:
        if len(self._net.shapes[op.name]) == 1:
            self._add(replace(op, source=self._shaped(op.source, dense=True)))
            return
        source = self._by_channel(op.source)
        dims = len(self._tensors[source].shape) - 1
        self._add(
            Conv(
                name=op.name,
                source=source,
                weight=op.weight[(None,) * dims],
                weight_format=op.weight_format,
                bias=op.bias,
                stride=(1,) * dims,
                padding=_NO_ZEROS[dims],
            )
        )

    def _convolution(self, op: Conv | DepthwiseConv) -> None:
        source = self._shaped(op.source)
        if self._streams and op.kernel[0] == 1 < op.stride[0] and len(op.stride) == 2 and not _is_pointwise(op):
            # hls4ml's windows of one line take every line
            index = np.pad(_index(self._tensors[source].shape), (*op.padding, (0, 0)), constant_values=-1)
            source = self._gather(f"{op.name}_lines", source, index[:: op.stride[0]])
            op = replace(op, stride=(1, op.stride[1]), padding=_NO_ZEROS[2])
        if np.any(op.padding) and (self._streams or set(op.kernel) == {1}):
            # hls4ml's convolutions of one position put no zeros around, and its streams only around one reader's
            source = self._add(Pad(name=self._fresh(f"{op.name}_padding"), source=source, padding=op.padding))
            op = replace(op, padding=_NO_ZEROS[len(op.stride)])
        self._add(replace(op, source=source))

    def _pool(self, op: MaxPool | AvgPool) -> None:
        source = self._shaped(op.source)
        if self._streams and op.stride != op.window:
            index = _side_by_side(_index(self._tensors[source].shape), op.window, op.stride)
            source = self._gather(f"{op.name}_windows", source, index)
            op = replace(op, stride=op.window)
        self._add(replace(op, source=source))

    def _gather(self, name: str, source: str, index: Codes) -> str:
        return self._add(Gather(name=self._fresh(name), source=source, index=index))

    def _shaped(self, name: str, *, dense: bool = False) -> str:
        """The op that holds a tensor in its shape; a dense layer gathers it from a stream of any."""
        source, shape = self._held[name], _carried_shape(self._net.shapes[name])
        if self._tensors[source].shape == shape:
            return source
        flat = len(shape) == 1 and (dense or not self._streams)
        if (key := (source, shape, flat)) not in self._reshaped:
            new = self._fresh(f"{name}_flat" if len(shape) == 1 else f"{name}_shaped", prefer=name)
            if flat:
                self._add(Flatten(name=new, source=source))
            else:
                self._add((Gather if self._streams else View)(name=new, source=source, index=_index(shape)))
            self._reshaped[key] = new
        return self._reshaped[key]

    def _by_channel(self, name: str) -> str:
        """The op that holds a tensor with its channels, in however many positions."""
        source, shape = self._held[name], self._net.shapes[name]
        held = self._tensors[source].shape
        return source if held[-1] == shape[-1] and (len(held) > 1) == (len(shape) > 1) else self._shaped(name)

    def _alike(self, sources: tuple[str, str]) -> tuple[str, str]:
        """The ops that hold two tensors of one shape, in one shape."""
        first, second = (self._held[name] for name in sources)
        if self._tensors[first].shape == self._tensors[second].shape:
            return first, second
        return self._shaped(sources[0]), self._shaped(sources[1])

    def _fresh(self, name: str, prefer: str | None = None) -> str:
        """A name that no op has, of either network unless it is the preferred one."""
        if prefer is not None and prefer not in self._ops:
            return prefer
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _copy(self, name: str, source: str) -> str:
        """A layer of the same values: a variable of their own."""
        return self._gather(name, source, _index(self._tensors[source].shape))

    def _ports(self) -> tuple[str, ...]:
        """The outputs, each with a variable to itself, which is no input's."""
        read = {name for op in self._ops.values() for name in op.reads}
        outputs: list[str] = []
        taken = {op.name for op in self._net.inputs}
        for name in self._net.outputs:
            held = self._held[name]
            if held in read or self._maker(held) in taken:
                held = self._held[name] = self._copy(f"{name}_out", held)
            outputs.append(held)
            taken.add(self._maker(held))
        return tuple(outputs)

    def _maker(self, name: str) -> str:
        op = self._ops[name]
        return self._maker(op.source) if isinstance(op, Scale) and _is_by_one(op) else name

    def _copied_in_turn(self) -> tuple[Op, ...]:
        """The ops, no tensor of a stream read too often: beyond that, a copy is read."""
        left = Counter(name for op in self._ops.values() for name in op.reads)
        ops, self._ops = self._ops, {}
        at, uses = {name: name for name in ops}, Counter[str]()
        for op in ops.values():
            reads = []
            for name in op.reads:
                if self._streams and uses[name] == MAX_READERS - 1 and left[name] > 1:
                    at[name], uses[name] = self._copy(f"{name}_copy", at[name]), 0
                uses[name] += 1
                left[name] -= 1
                reads.append(at[name])
            self._ops[op.name] = _reading(op, reads)
        return tuple(self._ops.values())


def _is_pointwise(op: Conv | DepthwiseConv) -> bool:
    """Whether hls4ml has a convolution of its own for it."""
    return isinstance(op, Conv) and set(op.kernel) == {1}


def _is_by_one(op: Scale) -> bool:
    return bool((op.weight_format.decode(op.weight) == 1).all() and not op.bias.any())


def _reading(op: Op, reads: Sequence[str]) -> Op:
    """An op that reads other tensors."""
    if isinstance(op, Input):
        return op
    if isinstance(op, Merge):
        return replace(op, sources=(reads[0], reads[1]))
    return replace(op, source=reads[0])


def _carried_shape(shape: Shape) -> Shape:
    """The shape that hls4ml has for one of any dimensions."""
    return shape if len(shape) <= 3 else (math.prod(shape[:-1]), shape[-1])


def _carried(index: Codes) -> Codes:
    return index.reshape(_carried_shape(index.shape))


def _index(shape: Shape) -> Codes:
    """Of every value itself."""
    return np.arange(math.prod(shape)).reshape(shape)


def _side_by_side(index: Codes, window: Shape, stride: Shape) -> Codes:
    """Of windows that overlap or leave values out, one after the other along each dimension."""
    for axis, (size, step) in enumerate(zip(window, stride, strict=True)):
        count = (index.shape[axis] - size) // step + 1
        index = index.take((np.arange(count)[:, None] * step + np.arange(size)).ravel(), axis)
    return index
