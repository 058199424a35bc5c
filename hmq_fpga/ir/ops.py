"""The closed set of operations; each one owns its law.

An operation is a record. Beside its fields stands what follows from them: which tensors it reads, what its fields
must satisfy, the shape and the format of its result, the range of each channel, the integers that it computes and
how many products that takes. Everything is channels-last and integer; shapes leave out the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed, Reals

Shape = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]  # zeros before and after, for each spatial dimension

_BIAS = Fixed(signed=True, width=MAX_WIDTH, frac=0)  # with it, no sum of a linear op exceeds int64
_MAX_SHIFT = 16  # of a leaky ReLU
MAX_TABLE_BITS = 12  # of a code that a table is looked up by


@dataclass(frozen=True)
class TensorType:
    """What is known of a tensor before any sample: its shape, without the batch, and the format of its codes."""

    shape: Shape
    format: Fixed

    @property
    def positions(self) -> int:
        """How many there are of each channel."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest code of each channel of a tensor, arrays `(channels,)`."""

    lo: Codes
    hi: Codes

    @property
    def varies(self) -> npt.NDArray[np.bool_]:
        """Channels that are not constant."""
        varies: npt.NDArray[np.bool_] = self.lo < self.hi
        return varies

    @property
    def bits(self) -> Reals:
        """Bits that tell the codes of a channel apart."""
        bits: Reals = np.ceil(np.log2(self.hi - self.lo + 1.0))
        return bits

    def with_zero(self) -> Ranges:
        """The same, widened to hold zero."""
        return Ranges(np.minimum(self.lo, 0), np.maximum(self.hi, 0))

    def weighted(self, weight: Codes, bias: Codes | int = 0) -> Ranges:
        """Of `x @ weight + bias`, with weight codes `(channels, outputs)`."""
        positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
        return Ranges(self.lo @ positive + self.hi @ negative + bias, self.hi @ positive + self.lo @ negative + bias)

    def scaled(self, weight: Codes, bias: Codes | int = 0) -> Ranges:
        """Of `x` summed with the weight codes `(terms, channels)` of each channel."""
        positive, negative = np.maximum(weight, 0).sum(axis=0), np.minimum(weight, 0).sum(axis=0)
        return Ranges(self.lo * positive + self.hi * negative + bias, self.hi * positive + self.lo * negative + bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Op(ABC):
    """The law of an operation, whose tensor has its name.

    Wherever sources are asked for, they come in the order of `reads`.
    """

    name: str

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors that it reads."""

    @abstractmethod
    def check(self) -> None:
        """Raise `InvalidInput` where its own fields do not fit together."""

    @abstractmethod
    def result(self, sources: Sequence[TensorType]) -> TensorType:
        """Shape and format of its tensor; raises `InvalidInput` where it cannot read the sources."""

    @abstractmethod
    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        """What its tensor's channels can hold, from what those of its sources can."""

    @abstractmethod
    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        """Its tensor's codes `(batch, *shape)` from those of its sources: the golden model."""

    @abstractmethod
    def macs(self, result: TensorType) -> int:
        """Products that it computes for one sample."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Input(_Op):
    """An input of the network, quantized to `format`.

    Its shape is `(features,)`, `(length, channels)` or `(height, width, channels)`.
    """

    shape: Shape
    format: Fixed

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def check(self) -> None:
        if len(self.shape) not in (1, 2, 3) or min(self.shape) < 1:
            raise InvalidInput(
                f"input shape {self.shape} is none of (features,), (length, channels), (height, width, channels)"
            )

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        return TensorType(self.shape, self.format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        channels = self.shape[-1]
        return Ranges(np.full(channels, self.format.lo), np.full(channels, self.format.hi))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        raise ValueError(f"op {self.name!r}: an input's codes are given, not computed")

    def macs(self, result: TensorType) -> int:
        return 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Unary(_Op):
    """An operation on one tensor, without products unless it says so."""

    source: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    def macs(self, result: TensorType) -> int:
        return 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize(_Unary):
    """Round and saturate to `format`; an unsigned format clips at zero and so contains the ReLU."""

    format: Fixed

    def check(self) -> None:
        pass

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        return TensorType(sources[0].shape, self.format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        frac = sources[0].format.frac
        return Ranges(self.format.requantize(ranges[0].lo, frac), self.format.requantize(ranges[0].hi, frac))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return self.format.requantize(codes[0], sources[0].format.frac)


# --- operations with weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Linear(_Unary):
    """Sums of products with constant codes, exact: the result's format is the accumulator's."""

    weight: Codes
    weight_format: Fixed
    bias: Codes

    @property
    def matrix(self) -> Codes:
        """The weight codes as `(terms of one sum, outputs)`."""
        return self.weight.reshape(-1, self.weight.shape[-1])

    def check(self) -> None:
        if self.weight.dtype != np.int64 or self.bias.dtype != np.int64:
            raise InvalidInput("weight and bias codes are int64")
        fits = self.weight.ndim in self._dims() and 0 not in self.weight.shape
        if not fits or self.bias.shape != self.weight.shape[-1:]:
            shapes = f"weight {self.weight.shape} and bias {self.bias.shape}"
            raise InvalidInput(f"{shapes} do not fit a {type(self).__name__}")
        if not self.weight_format.contains(self.weight):
            raise InvalidInput(f"a weight code is outside {self.weight_format}")
        if not _BIAS.contains(self.bias):
            raise InvalidInput(f"a bias code exceeds {_BIAS.width} bits")

    def macs(self, result: TensorType) -> int:
        """Once per output position with each weight."""
        return self.weight.size * result.positions

    @abstractmethod
    def _dims(self) -> tuple[int, ...]:
        """How many dimensions the weight may have."""

    def _require_channels(self, source: Shape, channels: int) -> None:
        if source[-1] != channels:
            raise InvalidInput(f"reads {source}, but its weight {self.weight.shape} takes {channels}")

    def _accumulator(self, source: Fixed) -> Fixed:
        """Interval arithmetic per output on the actual weights: the narrowest format that is exact.

        Zero padding is covered, since every term's interval contains zero.
        """
        if source.width + self.weight_format.width + int(self.weight.size).bit_length() > MAX_WIDTH:
            raise InvalidInput(f"its sums of {source} times {self.weight_format} may exceed {MAX_WIDTH} bits")
        sums = Ranges(np.array(source.lo), np.array(source.hi)).scaled(self.matrix, self.bias)
        return Fixed.enclosing(int(sums.lo.min()), int(sums.hi.max()), source.frac + self.weight_format.frac)

    def partial_sum_bits(self, source: Fixed) -> int:
        """Bits that hold the magnitude of any partial sum, whatever the order of summation.

        A float computation is exact if this fits its significand: 24 bits in float32, 53 in float64.
        """
        largest = np.abs(self.matrix).sum(axis=0) * max(source.hi, -source.lo) + np.abs(self.bias)
        return int(largest.max()).bit_length()

    def _sums(self, terms: Codes, source: Fixed) -> Codes:
        """`terms @ matrix + bias`."""
        return _matmul(terms, self.matrix, self.partial_sum_bits(source)) + self.bias


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense(_Linear):
    """`(…, n) @ weight + bias`, with weight codes `(n, m)` and bias codes `(m,)`."""

    def _dims(self) -> tuple[int, ...]:
        return (2,)

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        shape = sources[0].shape
        self._require_channels(shape, self.weight.shape[0])
        return TensorType((*shape[:-1], self.weight.shape[1]), self._accumulator(sources[0].format))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return ranges[0].weighted(self.weight, self.bias)

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return self._sums(codes[0], sources[0].format)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(_Linear):
    """`x * weight + bias` per channel, with weight codes `(c,)` and bias codes `(c,)`: a BatchNorm not folded."""

    def _dims(self) -> tuple[int, ...]:
        return (1,)

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        self._require_channels(sources[0].shape, self.weight.shape[0])
        return TensorType(sources[0].shape, self._accumulator(sources[0].format))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return ranges[0].scaled(self.matrix, self.bias)

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        scaled: Codes = codes[0] * self.weight + self.bias
        return scaled


@dataclass(frozen=True, kw_only=True, eq=False)
class _Convolution(_Linear):
    """A weight is multiplied at each position of a window.

    Attributes:
        stride: from window to window, in each spatial dimension.
        padding: zeros around every channel.
        dilation: from weight to weight in a window, in each spatial dimension; empty: one everywhere.
    """

    stride: Shape
    padding: Padding
    dilation: Shape = ()

    @property
    def kernel(self) -> Shape:
        """How far a window reaches in each spatial dimension."""
        weights = self._weights_along()
        return tuple((n - 1) * step + 1 for n, step in zip(weights, self.dilation or (1,) * len(weights), strict=True))

    @cached_property
    def full_weight(self) -> Codes:
        """The weight codes with the zeros that dilation and groups leave between them."""
        return self._dilated(self.weight)

    @property
    def matrix(self) -> Codes:
        return self.full_weight.reshape(-1, self.weight.shape[-1])

    def check(self) -> None:
        super().check()
        if self.dilation and (len(self.dilation) != len(self._weights_along()) or min(self.dilation) < 1):
            raise InvalidInput(f"dilation {self.dilation} is out of range")
        _check_stride(self.stride, self.kernel)
        _check_padding(self.padding)
        if len(self.padding) != len(self.kernel):
            raise InvalidInput(f"padding {self.padding} is out of range")

    @abstractmethod
    def _weights_along(self) -> Shape:
        """How many weights stand in a window, in each spatial dimension."""

    def _dilated(self, weight: Codes) -> Codes:
        if not self.dilation:
            return weight
        full = np.zeros((*self.kernel, *weight.shape[len(self.kernel) :]), np.int64)
        full[tuple(slice(None, None, step) for step in self.dilation)] = weight
        return full

    def _positions(self, source: Shape, channels: int) -> Shape:
        spatial = _spatial(source, len(self.kernel))
        self._require_channels(source, channels)
        return _windows(_padded(spatial, self.padding), self.kernel, self.stride)

    def _columns(self, x: Codes) -> Codes:
        return _columns(_pad(x, self.padding), self.kernel, self.stride)

    def _padded_ranges(self, ranges: Ranges) -> Ranges:
        return ranges.with_zero() if np.any(self.padding) else ranges


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(_Convolution):
    """Cross-correlation over one or two spatial dimensions.

    Reads `(*spatial, c)` with weight codes `(*weights, c / groups, m)` and bias codes `(m,)`; the outputs of a group
    read the channels of that group, in order.
    """

    groups: int = 1

    @cached_property
    def full_weight(self) -> Codes:
        """The weight codes as `(*kernel, c, m)`, with the zeros that dilation and groups leave between them."""
        weight = self._dilated(self.weight)
        *window, channels, outputs = weight.shape
        if self.groups == 1:
            return weight
        full = np.zeros((*window, self.groups, channels, self.groups, outputs // self.groups), np.int64)
        for group, part in enumerate(np.split(weight, self.groups, axis=-1)):
            full[..., group, :, group, :] = part
        return full.reshape(*window, self.groups * channels, outputs)

    @property
    def by_channel(self) -> Codes:
        """The weight codes as `(window positions, channels, outputs)`."""
        return self.full_weight.reshape(-1, *self.full_weight.shape[-2:])

    def check(self) -> None:
        super().check()
        if self.groups < 1 or self.weight.shape[-1] % self.groups:
            raise InvalidInput(f"{self.weight.shape[-1]} outputs are not {self.groups} groups")

    def _dims(self) -> tuple[int, ...]:
        return (3, 4)

    def _weights_along(self) -> Shape:
        return self.weight.shape[:-2]

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        positions = self._positions(sources[0].shape, self.weight.shape[-2] * self.groups)
        return TensorType((*positions, self.weight.shape[-1]), self._accumulator(sources[0].format))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        read = self._padded_ranges(ranges[0])
        windows = math.prod(self.kernel)
        return Ranges(np.tile(read.lo, windows), np.tile(read.hi, windows)).weighted(self.matrix, self.bias)

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        columns = self._columns(codes[0])
        return self._sums(columns.reshape(*columns.shape[:-2], -1), sources[0].format)


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthwiseConv(_Convolution):
    """Cross-correlation of each channel with a kernel of its own.

    Reads `(*spatial, c)` with weight codes `(*weights, c)` and bias codes `(c,)`.
    """

    def _dims(self) -> tuple[int, ...]:
        return (2, 3)

    def _weights_along(self) -> Shape:
        return self.weight.shape[:-1]

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        channels = self.weight.shape[-1]
        positions = self._positions(sources[0].shape, channels)
        return TensorType((*positions, channels), self._accumulator(sources[0].format))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return self._padded_ranges(ranges[0]).scaled(self.matrix, self.bias)

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        sums: Codes = np.einsum("...kc,kc->...c", self._columns(codes[0]), self.matrix) + self.bias
        return sums


# --- pooling and elementwise functions -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool(_Unary):
    window: Shape
    stride: Shape

    @property
    def kernel(self) -> Shape:
        """How many positions it reads at once, in each spatial dimension."""
        return self.window

    def check(self) -> None:
        _check_stride(self.stride, self.window)
        if min(self.window) < 1 or len(self.window) not in (1, 2):
            raise InvalidInput(f"window {self.window} is out of range")

    def _shape(self, source: Shape) -> Shape:
        return (*_windows(_spatial(source, len(self.window)), self.window, self.stride), source[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class MaxPool(_Pool):
    """Maximum over windows; windows that do not fit are dropped."""

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        return TensorType(self._shape(sources[0].shape), sources[0].format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return ranges[0]

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        largest: Codes = _columns(codes[0], self.window, self.stride).max(axis=-2)
        return largest


@dataclass(frozen=True, kw_only=True, eq=False)
class AvgPool(_Pool):
    """Mean over windows of a power of two of values: their exact sum, with as many more fractional bits."""

    def check(self) -> None:
        super().check()
        if math.prod(self.window).bit_count() != 1:
            raise InvalidInput(f"a mean over {self.window} values is exact only for powers of two")

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        source, values = sources[0].format, math.prod(self.window)
        frac = source.frac + values.bit_length() - 1
        return TensorType(self._shape(sources[0].shape), Fixed.enclosing(source.lo * values, source.hi * values, frac))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        values = math.prod(self.window)
        return Ranges(ranges[0].lo * values, ranges[0].hi * values)

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        sums: Codes = _columns(codes[0], self.window, self.stride).sum(axis=-2)
        return sums


@dataclass(frozen=True, kw_only=True, eq=False)
class LeakyRelu(_Unary):
    """`x` where it is not negative, else `x * 2**-shift`: exact, with `shift` more fractional bits."""

    shift: int

    def check(self) -> None:
        if not 0 <= self.shift <= _MAX_SHIFT:
            raise InvalidInput(f"slope 2**-{self.shift} is outside 2**-{_MAX_SHIFT} … 1")

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        source = sources[0].format
        format_ = Fixed.enclosing(source.lo, source.hi << self.shift, source.frac + self.shift)
        return TensorType(sources[0].shape, format_)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return Ranges(self._codes(ranges[0].lo), self._codes(ranges[0].hi))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return self._codes(codes[0])

    def _codes(self, x: Codes) -> Codes:
        return np.where(x < 0, x, x << self.shift)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table(_Unary):
    """Any function of one value: `values` holds the result's code for each code of the source, in ascending order."""

    values: Codes
    format: Fixed

    def check(self) -> None:
        if self.values.dtype != np.int64 or self.values.ndim != 1 or len(self.values).bit_count() != 1:
            raise InvalidInput("a table's values are int64, in one dimension, and a power of two of them")
        if len(self.values) > 1 << MAX_TABLE_BITS:
            raise InvalidInput(f"a table of {len(self.values)} values exceeds {MAX_TABLE_BITS} bits")
        if not self.format.contains(self.values):
            raise InvalidInput(f"a value of the table is outside {self.format}")

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        if len(self.values) != 1 << sources[0].format.width:
            raise InvalidInput(f"a table of {len(self.values)} values is read by {sources[0].format}")
        return TensorType(sources[0].shape, self.format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        first = sources[0].format.lo
        read = [self.values[lo - first : hi - first + 1] for lo, hi in zip(ranges[0].lo, ranges[0].hi, strict=True)]
        return Ranges(np.array([values.min() for values in read]), np.array([values.max() for values in read]))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        found: Codes = self.values[codes[0] - sources[0].format.lo]
        return found


# --- operations that only move values --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Pad(_Unary):
    """Zeros around every channel."""

    padding: Padding

    def check(self) -> None:
        _check_padding(self.padding)

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        shape = sources[0].shape
        return TensorType((*_padded(_spatial(shape, len(self.padding)), self.padding), shape[-1]), sources[0].format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return ranges[0].with_zero() if np.any(self.padding) else ranges[0]

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return _pad(codes[0], self.padding)


@dataclass(frozen=True, kw_only=True, eq=False)
class Upsample(_Unary):
    """Every value repeated `factor` times along each spatial dimension: nearest-neighbour interpolation."""

    factor: Shape

    def check(self) -> None:
        if min(self.factor) < 1 or len(self.factor) not in (1, 2):
            raise InvalidInput(f"factor {self.factor} is out of range")

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        shape = sources[0].shape
        spatial = _spatial(shape, len(self.factor))
        larger = tuple(n * k for n, k in zip(spatial, self.factor, strict=True))
        return TensorType((*larger, shape[-1]), sources[0].format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return ranges[0]

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        x = codes[0]
        for axis, factor in enumerate(self.factor, 1):
            x = x.repeat(factor, axis)
        return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten(_Unary):
    """`(*spatial, c)` to one dimension, in that order."""

    def check(self) -> None:
        pass

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        return TensorType((math.prod(sources[0].shape),), sources[0].format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        positions = sources[0].positions
        return Ranges(np.tile(ranges[0].lo, positions), np.tile(ranges[0].hi, positions))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return codes[0].reshape(len(codes[0]), math.prod(sources[0].shape))


@dataclass(frozen=True, kw_only=True, eq=False)
class Gather(_Unary):
    """Values moved, repeated or left out.

    `index`, of the result's shape, says which of the source's values, counted in a row, stands at a place; -1: none of
    them, but the code `fill`.
    """

    index: Codes
    fill: int = 0

    def check(self) -> None:
        if self.index.dtype != np.int64 or 0 in self.index.shape or not self.index.ndim or self.index.min() < -1:
            raise InvalidInput("a gather's index is int64, of at least one value, and -1 or more")

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        source = sources[0]
        if self.index.max() >= math.prod(source.shape):
            raise InvalidInput(f"reads value {self.index.max()} of {source.shape}")
        if not source.format.contains(np.array(self.fill)):
            raise InvalidInput(f"its fill {self.fill} is outside {source.format}")
        return TensorType(self.index.shape, source.format)

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        index = self.index.reshape(-1, self.index.shape[-1])
        channel, filled = index % len(ranges[0].lo), index < 0
        lo, hi = (np.where(filled, self.fill, side[channel]) for side in (ranges[0].lo, ranges[0].hi))
        return Ranges(lo.min(axis=0), hi.max(axis=0))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        values = codes[0].reshape(len(codes[0]), math.prod(sources[0].shape))[:, self.index]
        values[:, self.index < 0] = self.fill
        return values


# --- operations on two tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Merge(_Op):
    sources: tuple[str, str]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.sources

    def check(self) -> None:
        if len(self.sources) != 2:
            raise InvalidInput(f"merges two tensors, not {self.sources}")

    def macs(self, result: TensorType) -> int:
        return 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Elementwise(_Merge):
    """Of two tensors of one shape, value by value, exact: on the finer of their grids, unless it says otherwise."""

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        first, second = sources
        if first.shape != second.shape:
            raise InvalidInput(f"cannot merge {first.shape} and {second.shape}")
        frac, los, his = _on_one_grid([source.format for source in sources])
        lo, hi = self._bounds(*(np.array(side) for side in (*los, *his)))
        return TensorType(first.shape, Fixed.enclosing(int(lo), int(hi), frac))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        los, his = aligned(sources, [r.lo for r in ranges]), aligned(sources, [r.hi for r in ranges])
        return Ranges(*self._bounds(*los, *his))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return self._apply(*aligned(sources, codes))

    @abstractmethod
    def _apply(self, first: Codes, second: Codes) -> Codes:
        """On codes of one grid."""

    def _bounds(self, lo: Codes, other_lo: Codes, hi: Codes, other_hi: Codes) -> tuple[Codes, Codes]:
        """Smallest and largest result; the function grows with both."""
        return self._apply(lo, other_lo), self._apply(hi, other_hi)


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(_Elementwise):
    """Sum."""

    def _apply(self, first: Codes, second: Codes) -> Codes:
        return first + second


@dataclass(frozen=True, kw_only=True, eq=False)
class Subtract(_Elementwise):
    """First minus second."""

    def _apply(self, first: Codes, second: Codes) -> Codes:
        return first - second

    def _bounds(self, lo: Codes, other_lo: Codes, hi: Codes, other_hi: Codes) -> tuple[Codes, Codes]:
        return lo - other_hi, hi - other_lo


@dataclass(frozen=True, kw_only=True, eq=False)
class Maximum(_Elementwise):
    """The larger of the two."""

    def _apply(self, first: Codes, second: Codes) -> Codes:
        return np.maximum(first, second)


@dataclass(frozen=True, kw_only=True, eq=False)
class Minimum(_Elementwise):
    """The smaller of the two."""

    def _apply(self, first: Codes, second: Codes) -> Codes:
        return np.minimum(first, second)


@dataclass(frozen=True, kw_only=True, eq=False)
class Multiply(_Elementwise):
    """Product, whose step is the product of the steps; of a tensor with itself, the square."""

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        first, second = (source.format for source in sources)
        if sources[0].shape != sources[1].shape:
            raise InvalidInput(f"cannot merge {sources[0].shape} and {sources[1].shape}")
        if first.width + second.width > MAX_WIDTH:
            raise InvalidInput(f"products of {first} and {second} exceed {MAX_WIDTH} bits")
        lo, hi = self._bounds(*(np.array(side) for side in (first.lo, second.lo, first.hi, second.hi)))
        return TensorType(sources[0].shape, Fixed.enclosing(int(lo), int(hi), first.frac + second.frac))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        return Ranges(*self._bounds(ranges[0].lo, ranges[1].lo, ranges[0].hi, ranges[1].hi))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return self._apply(*codes)

    def macs(self, result: TensorType) -> int:
        return math.prod(result.shape)

    def _apply(self, first: Codes, second: Codes) -> Codes:
        return first * second

    def _bounds(self, lo: Codes, other_lo: Codes, hi: Codes, other_hi: Codes) -> tuple[Codes, Codes]:
        corners = np.stack([lo * other_lo, lo * other_hi, hi * other_lo, hi * other_hi])
        smallest, largest = corners.min(axis=0), corners.max(axis=0)
        if len(set(self.sources)) == 1:  # a product of two bounds is none of a square
            smallest = np.where((lo <= 0) & (hi >= 0), 0, np.minimum(lo * lo, hi * hi))
        return smallest, largest


@dataclass(frozen=True, kw_only=True, eq=False)
class Concat(_Merge):
    """Two tensors side by side along the channels, on the finer of their grids."""

    def result(self, sources: Sequence[TensorType]) -> TensorType:
        first, second = (source.shape for source in sources)
        if first[:-1] != second[:-1]:
            raise InvalidInput(f"cannot merge {first} and {second}")
        return TensorType((*first[:-1], first[-1] + second[-1]), common_format([source.format for source in sources]))

    def ranges(self, sources: Sequence[TensorType], ranges: Sequence[Ranges]) -> Ranges:
        los, his = aligned(sources, [r.lo for r in ranges]), aligned(sources, [r.hi for r in ranges])
        return Ranges(np.concatenate(los), np.concatenate(his))

    def run(self, sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
        return np.concatenate(aligned(sources, codes), axis=-1)


Linear = Dense | Conv | DepthwiseConv | Scale
Window = Conv | DepthwiseConv | MaxPool | AvgPool
Elementwise = Add | Subtract | Maximum | Minimum | Multiply
Merge = Elementwise | Concat
Computed = (
    Quantize
    | Dense
    | Conv
    | DepthwiseConv
    | Scale
    | LeakyRelu
    | Table
    | MaxPool
    | AvgPool
    | Pad
    | Upsample
    | Flatten
    | Gather
    | Add
    | Subtract
    | Maximum
    | Minimum
    | Multiply
    | Concat
)
Op = Input | Computed
OPS: Mapping[str, type[Op]] = {op.__name__: op for op in get_args(Op)}


def common_format(formats: Sequence[Fixed]) -> Fixed:
    """The narrowest format that holds the codes of all formats, on the finest of their grids."""
    frac, los, his = _on_one_grid(formats)
    return Fixed.enclosing(min(los), max(his), frac)


def aligned(sources: Sequence[TensorType], codes: Sequence[Codes]) -> list[Codes]:
    """Codes of several tensors on the finest of their grids."""
    frac = max(source.format.frac for source in sources)
    return [x << frac - source.format.frac for source, x in zip(sources, codes, strict=True)]


def joined(sources: Sequence[TensorType], codes: Sequence[Codes]) -> Codes:
    """Codes `(batch, *shape)` of one tensor as they are; of several all in a row, on the finest of their grids."""
    parts = aligned(sources, codes)
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def _on_one_grid(formats: Sequence[Fixed]) -> tuple[int, list[int], list[int]]:
    """The finest fraction, and the smallest and largest codes on its grid."""
    frac = max(f.frac for f in formats)
    if max(f.width + frac - f.frac for f in formats) >= MAX_WIDTH:
        raise InvalidInput(f"{' and '.join(map(str, formats))} on one grid exceed {MAX_WIDTH} bits")
    return frac, [f.lo << frac - f.frac for f in formats], [f.hi << frac - f.frac for f in formats]


def _check_stride(stride: Shape, window: Shape) -> None:
    if min(stride) < 1 or len(stride) != len(window):
        raise InvalidInput(f"stride {stride} does not fit a window of {window}")


def _check_padding(padding: Padding) -> None:
    if len(padding) not in (1, 2) or min(min(pair) for pair in padding) < 0:
        raise InvalidInput(f"padding {padding} is out of range")


def _spatial(source: Shape, dims: int) -> Shape:
    """All dimensions but the channels."""
    if len(source) != dims + 1:
        raise InvalidInput(f"reads {source}, but works on {dims} dimensions and channels")
    return source[:-1]


def _padded(spatial: Shape, padding: Padding) -> Shape:
    return tuple(n + sum(pair) for n, pair in zip(spatial, padding, strict=True))


def _windows(size: Shape, window: Shape, stride: Shape) -> Shape:
    """How many whole windows fit."""
    if any(n < k for n, k in zip(size, window, strict=True)):
        raise InvalidInput(f"its window {window} does not fit into {size}")
    return tuple((n - k) // s + 1 for n, k, s in zip(size, window, stride, strict=True))


def _matmul(x: Codes, weight: Codes, partial_sum_bits: int) -> Codes:
    """Integer matrix product; through float64 BLAS (30 times faster) where no partial sum can round."""
    if partial_sum_bits <= 53:
        return (x.astype(np.float64) @ weight.astype(np.float64)).astype(np.int64)
    return x @ weight


def _pad(x: Codes, padding: Padding) -> Codes:
    return np.pad(x, ((0, 0), *padding, (0, 0)))


def _columns(x: Codes, window: Shape, stride: Shape) -> Codes:
    """`(batch, *spatial, c)` to its windows, `(batch, *positions, values of a window, c)`."""
    axes = tuple(range(1, 1 + len(window)))
    steps = (slice(None), *(slice(None, None, step) for step in stride))
    views: npt.NDArray[Any] = sliding_window_view(x, window, axes)[steps]  # type: ignore[call-overload]
    views = np.moveaxis(views, 1 + len(window), -1)
    return views.reshape(*views.shape[: 1 + len(window)], math.prod(window), x.shape[-1])
