"""Hypothesis strategies for formats and small networks."""

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes, Fixed, Reals
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
    Minimum,
    Multiply,
    Op,
    Pad,
    Quantize,
    Scale,
    Subtract,
    Table,
    Upsample,
)

BITS = st.integers(1, 8)
THRESHOLDS_LOG2 = st.integers(-10, 6)
EITHER = st.booleans()
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def formats(draw, *, signed=EITHER, bits=BITS, thresholds_log2=THRESHOLDS_LOG2) -> Fixed:
    """Formats that a scheme may hold."""
    return Fixed.from_threshold(signed=draw(signed), bits=draw(bits), threshold_log2=draw(thresholds_log2))


@st.composite
def qnets(draw, *, images=EITHER, bits=BITS, thresholds_log2=THRESHOLDS_LOG2) -> QNet:
    """Networks as a search leaves them, over all ops: whatever a layer with weights or a merge reads is quantized.

    Args:
        images: whether there are spatial dimensions, one or two.
    """
    return _Drawing(draw, bits, thresholds_log2).net(draw(images))


class _Drawing:
    """A network in the making."""

    def __init__(self, draw, bits, thresholds_log2) -> None:
        self.draw, self.bits, self.thresholds_log2 = draw, bits, thresholds_log2
        self.rng = np.random.default_rng(draw(SEEDS))
        self.ops: list[Op] = []
        self.outputs: tuple[str, ...] = ()

    def net(self, image: bool) -> QNet:
        sizes = self.draw(st.lists(st.integers(2, 6), min_size=1, max_size=2)) if image else []
        shape = (*sizes, self.draw(st.integers(1, 3 if image else 8)))
        self.ops.append(Input(name="x", shape=shape, format=self.format()))
        trunks = []
        if image:
            for _ in range(self.draw(st.integers(1, 3))):
                self.block()
            trunks = [self.last]
            self.move()
            self.add(Flatten)
        for i in range(layers := self.draw(st.integers(1, 3))):
            if not i and not image and self.draw(st.integers(0, 3)) == 0:
                self.scale()
                self.quantize()
            self.linear(Dense, (self.shape[0], self.draw(st.integers(1, 8))))
            if i < layers - 1:
                self.quantize()
                self.function()
        if self.draw(st.integers(0, 3)) == 0:
            self.heads(self.draw(st.lists(st.sampled_from([*trunks, self.ops[-1].source]), min_size=1, max_size=2)))
        return QNet(tuple(self.ops), self.outputs)

    def heads(self, trunks: list[str]) -> None:
        """More outputs, of these tensors."""
        outputs, shapes = [self.last], [self.shape_of(trunk) for trunk in trunks]
        for trunk, (*sizes, channels) in zip(trunks, shapes, strict=True):
            windows = {"stride": (1,) * len(sizes), "padding": ((0, 0),) * len(sizes)} if sizes else {}
            shape = (*(1 for _ in sizes), channels, self.draw(st.integers(1, 4)))
            self.linear(Conv if sizes else Dense, shape, source=trunk, **windows)
            outputs.append(self.last)
        self.outputs = tuple(outputs)
        try:
            QNet(tuple(self.ops), self.outputs)
        except InvalidInput as error:
            assert "on one grid exceed" in str(error)
            reject()

    @property
    def last(self) -> str:
        return self.ops[-1].name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shape_of(self.last)

    def shape_of(self, name: str) -> tuple[int, ...]:
        known = [op.name for op in self.ops].index(name)
        return QNet(tuple(self.ops)).shapes[name] if known else self.ops[0].shape

    def format_of(self, name: str) -> Fixed:
        return QNet(tuple(self.ops)).formats[name]

    def format(self, signed: bool | None = None) -> Fixed:
        sign = EITHER if signed is None else st.just(signed)
        return self.draw(formats(signed=sign, bits=self.bits, thresholds_log2=self.thresholds_log2))

    def add(self, op: type[Op], **values) -> None:
        name = f"{op.__name__.lower()}{len(self.ops)}"
        read = {} if {"source", "sources"} & values.keys() else {"source": self.last}
        self.ops.append(op(name=name, **read, **values))

    def quantize(self) -> None:
        self.add(Quantize, format=self.format())

    def linear(self, op: type[Op], shape: tuple[int, ...], **values) -> None:
        format_ = self.format(signed=True)
        biases = _biases(self.rng, shape[-1])
        self.add(op, weight=_codes(self.rng, format_, shape), weight_format=format_, bias=biases, **values)

    def scale(self) -> None:
        self.linear(Scale, (self.shape[-1],))

    def block(self) -> None:
        """A layer with weights or a pair of branches, what may follow it, and a quantizer."""
        kind = self.draw(st.sampled_from(["conv", "conv", "depthwise", "scale", "elementwise", "concat"]))
        match kind:
            case "conv":
                self.conv(self.kernel())
            case "depthwise":
                self.conv(self.kernel(), depthwise=True)
            case "scale":
                self.scale()
            case "elementwise":
                self.branches(self.draw(st.sampled_from([Add, Subtract, Maximum, Minimum, Multiply])))
            case "concat":
                self.branches(Concat)
        match self.draw(st.sampled_from(["", "leaky", "average", "max"])):
            case "leaky":
                self.add(LeakyRelu, shift=self.draw(st.integers(0, 4)))
            case "average":
                self.pool(AvgPool)
            case "max":
                self.pool(MaxPool)
        self.quantize()
        self.move()

    def branches(self, merge: type[Op]) -> None:
        trunk = self.last
        if merge is not Subtract and self.draw(st.integers(0, 3)) == 0:
            self.add(merge, sources=(trunk, trunk))
            return
        outputs = None if merge is Concat else self.shape[-1]
        self.conv(tuple(1 for _ in self.shape[:-1]), plain=True, outputs=outputs)
        self.quantize()
        self.add(merge, sources=(self.last, trunk) if self.draw(EITHER) else (trunk, self.last))

    def function(self) -> None:
        """A function of values that have a format, or of some of them."""
        match self.draw(st.sampled_from(["", "", "table", "square", "gather"])):
            case "table":
                self.table()
            case "square":
                self.add(Multiply, sources=(self.last, self.last))
                self.quantize()
            case "gather":
                self.gather()

    def table(self) -> None:
        """As often of any values as of a function that grows."""
        format_ = self.format()
        values = _codes(self.rng, format_, (1 << self.format_of(self.last).width,))
        self.add(Table, values=np.sort(values) if self.draw(EITHER) else values, format=format_)

    def gather(self) -> None:
        """As many dimensions, of any sizes; one value in five or so is the filling."""
        shape = tuple(self.draw(st.integers(1, 5)) for _ in self.shape)
        held = self.format_of(self.last)
        index = self.rng.integers(-(np.prod(self.shape) // 4), np.prod(self.shape), shape)
        fill = self.draw(st.sampled_from([0, held.lo, held.hi]))
        self.add(Gather, index=np.maximum(index, -1), fill=fill)

    def move(self) -> None:
        """What moves values that have a format, or gives them another one."""
        match self.draw(st.sampled_from(["", "", "max", "pad", "up", "function"])):
            case "function":
                self.function()
            case "max":
                self.pool(MaxPool)
            case "pad":
                self.add(Pad, padding=self.padding(len(self.shape) - 1))
            case "up" if max(self.shape) < 8:
                self.add(Upsample, factor=tuple(self.draw(st.integers(1, 2)) for _ in self.shape[:-1]))

    def kernel(self) -> tuple[int, ...]:
        return tuple(self.draw(st.integers(1, min(n, 3))) for n in self.shape[:-1])

    def padding(self, dims: int) -> tuple[tuple[int, int], ...]:
        return tuple(self.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in range(dims))

    def conv(self, kernel, *, depthwise: bool = False, plain: bool = False, outputs: int | None = None) -> None:
        dims, channels = len(kernel), self.shape[-1]
        stride = [self.draw(st.integers(1, 2)) for _ in kernel]
        if plain:
            stride = [1] * dims
        windows = {"stride": tuple(stride), "padding": tuple((0, 0) for _ in kernel) if plain else self.padding(dims)}
        if self.draw(EITHER):
            fits = [[d for d in (1, 2) if (k - 1) * d < n] for k, n in zip(kernel, self.shape, strict=False)]
            windows["dilation"] = tuple(self.draw(st.sampled_from(steps)) for steps in fits)
        if depthwise:
            self.linear(DepthwiseConv, (*kernel, channels), **windows)
            return
        outputs = outputs or self.draw(st.integers(1, 4))
        groups = self.draw(st.sampled_from(_common_divisors(channels, outputs)))
        self.linear(Conv, (*kernel, channels // groups, outputs), groups=groups, **windows)

    def pool(self, op: type[Op]) -> None:
        sizes = (1, 2, 3) if op is MaxPool else (1, 2)
        window = tuple(self.draw(st.sampled_from([n for n in sizes if n <= size])) for size in self.shape[:-1])
        stride = tuple(self.draw(st.integers(1, 3)) for _ in window)
        self.add(op, window=window, stride=stride)


def _common_divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, 1 + min(numbers)) if not any(number % n for number in numbers)]


def _codes(rng: np.random.Generator, format_: Fixed, shape: tuple[int, ...]) -> Codes:
    """Codes of a format, a quarter of them zero and the end levels frequent."""
    codes = rng.integers(format_.lo, format_.hi, shape, endpoint=True)
    kind = rng.integers(0, 8, shape)
    return np.select([kind < 2, kind == 2, kind == 3], [0, format_.lo, format_.hi], codes)


def _biases(rng: np.random.Generator, outputs: int) -> Codes:
    """Biases on the accumulator's grid, from none to as large as 16-bit products."""
    largest = rng.choice([0, 3, 200, 20_000])
    return rng.integers(-largest, largest, outputs, endpoint=True)


def inputs(net: QNet, samples: int, seed: int) -> Reals:
    """Inputs `(samples, *input shape)`, channels last: on the grid, half-way between codes, and beyond the range."""
    rng = np.random.default_rng(seed)
    format_ = net.input.format
    shape = (samples, *net.input.shape)
    halves = rng.integers(4 * format_.lo - 4, 4 * format_.hi + 4, shape, endpoint=True) / 2
    anywhere = rng.normal(scale=format_.hi + 1, size=shape)
    return np.where(rng.integers(0, 2, shape) == 0, halves, anywhere) * format_.step
