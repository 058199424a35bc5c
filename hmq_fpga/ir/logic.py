"""LUTs of a fully unrolled network from its integers alone: a fitted formula, for searches that need many calls.

It predicts the tracer's own figure, which takes seconds to minutes, in milliseconds. A product with constant weights
is a tree of additions: as many as its weights have nonzero signed digits, less one, each about as wide as the sum it
makes, and the fewer the more of them the outputs can share. What never changes or is never read costs
nothing; so the range of each channel is followed through the network.

The other ops are the tracer's own counts of them alone, of formats from one to twelve bits: a product is three quarters
of a LUT for each pair of its factors' bits, a maximum one and a half for each bit. A table is a LUT for each bit of its
value up to six bits of its code, and twice as many for each further one; the tracer's figure is 0.7 … 1 of that for a
function that grows, and up to 1.5 for a value of one bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hmq_fpga.ir.errors import assert_never
from hmq_fpga.ir.fixed import Codes, Reals
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
    Ranges,
    Scale,
    Subtract,
    Table,
    Upsample,
)

# log(LUTs per addition): a constant, then the coefficients of the logarithms of the mean bits of the inputs and of
# the sums, the number of outputs and inputs, and the digits per weight; fitted by benchmarks/lut_model.py
FIT = (-1.7516, -0.1328, 1.6480, 0.0007, -0.1920, -0.4355)

Mask = npt.NDArray[np.bool_]


def luts(net: QNet, fit: Sequence[float] = FIT) -> float:
    """LUTs of the fully unrolled network, as the tracer would count them.

    On 42 trained networks that were left out of the fit: ratio to the tracer 0.96 … 1.27 (5th to 95th percentile),
    median 1.04; on 80 random ones 0.86 … 1.17, median 0.97.
    """
    ranges = net.ranges
    read = {op.name: np.zeros(net.shapes[op.name][-1], dtype=bool) for op in net.ops}
    for name in net.outputs:
        read[name][:] = True
    total = 0.0
    for op in reversed(net.ops):
        live = read[op.name] & ranges[op.name].varies
        total += _luts(net, op, ranges, live, fit)
        for source, mask in zip(op.reads, _reads(net, op, live), strict=True):
            read[source] |= mask
    return total


def signed_digits(codes: Codes) -> Codes:
    """Nonzero digits of each code in non-adjacent form: the bits in which `n` and `3 n` differ."""
    magnitude = np.abs(codes)
    differing = np.ascontiguousarray(magnitude ^ (3 * magnitude))[..., None].view(np.uint8)
    digits: Codes = np.unpackbits(differing, axis=-1).sum(axis=-1, dtype=np.int64)
    return digits


def _product_luts(weight: Codes, input_bits: Reals, sum_bits: Reals, fit: Sequence[float]) -> float:
    """One product with the weight codes `(n, m)`, and the biases."""
    biases = 0.15 * float(np.maximum(sum_bits - 1, 0).sum())
    digits = signed_digits(weight)
    additions = np.maximum(digits.sum(axis=0) - 1, 0)
    if not additions.any():
        return biases
    rows, columns = digits.any(axis=1), digits.any(axis=0)
    inputs, outputs = np.count_nonzero(rows), np.count_nonzero(columns)
    mean_bits = input_bits[rows].mean(), np.average(sum_bits, weights=additions)
    logs = np.log([*mean_bits, outputs, inputs, digits.sum() / (inputs * outputs)])
    return float(additions.sum() * np.exp(fit[0] + logs @ np.array(fit[1:]))) + biases


def _luts(net: QNet, op: Op, ranges: Mapping[str, Ranges], live: Mask, fit: Sequence[float]) -> float:
    """LUTs of the channels `live` of an op at all its positions."""
    positions = net.tensors[op.name].positions
    result = ranges[op.name]
    match op:
        case Dense() | Conv():
            source, windows = ranges[op.source], _windows(op)
            weight = op.matrix[:, live] * np.tile(source.varies, windows)[:, None]
            return positions * _product_luts(weight, np.tile(source.bits, windows), result.bits[live], fit)
        case DepthwiseConv() | Scale() | AvgPool():
            weight, source = _terms(op, len(live)), ranges[op.source]
            return positions * sum(
                _product_luts(weight[:, [c]], np.full(len(weight), source.bits[c]), result.bits[[c]], fit)
                for c in np.flatnonzero(live)
            )
        case Quantize():
            source = ranges[op.source]
            dropped = max(net.formats[op.source].frac - op.format.frac, 0)
            rounded = np.log2(np.maximum(source.hi[live], 0) / 2.0**dropped + 1)  # bits right of the sign
            rectifies, saturates = source.lo[live] < 0, rounded > op.format.width
            gates = 0.5 * rounded * rectifies + 0.5 * op.format.width * saturates + 0.3 * (dropped > 0)
            return positions * float(gates.sum())
        case MaxPool():
            comparisons = math.prod(op.window) - 1
            return positions * comparisons * 1.5 * float(result.bits[live].sum())  # a difference, a choice
        case LeakyRelu():
            return positions * 0.5 * float(result.bits[live].sum())
        case Table():
            tables = 2.0 ** np.maximum(ranges[op.source].bits[live] - 6, 0)
            return positions * float((tables * result.bits[live]).sum())
        case Add() | Subtract():
            return positions * float(result.bits[live].sum())
        case Maximum() | Minimum():
            return positions * 1.5 * float(result.bits[live].sum())
        case Multiply():
            first, second = (ranges[name].bits[live] for name in op.sources)
            return positions * 0.75 * float((first * second).sum())
        case Input() | Pad() | Upsample() | Flatten() | Gather() | Concat():
            return 0.0
        case _:
            assert_never(op)


def _reads(net: QNet, op: Op, live: Mask) -> list[Mask]:
    """Channels of each source that the channels `live` of an op depend on."""
    match op:
        case Input():
            return []
        case Dense():
            return [(op.weight[:, live] != 0).any(axis=1)]
        case Conv():
            return [(op.by_channel[..., live] != 0).any(axis=(0, 2))]
        case DepthwiseConv() | Scale():
            return [live & (op.matrix != 0).any(axis=0)]
        case Flatten():
            return [live.reshape(-1, net.shapes[op.source][-1]).any(axis=0)]
        case Concat():
            return np.split(live, [net.shapes[op.sources[0]][-1]])
        case Gather():
            index, channels = op.index[..., live], net.shapes[op.source][-1]
            return [np.isin(np.arange(channels), index[index >= 0] % channels)]
        case Quantize() | LeakyRelu() | Table() | MaxPool() | AvgPool() | Pad() | Upsample():
            return [live]
        case Add() | Subtract() | Maximum() | Minimum() | Multiply():
            return [live, live]
        case _:
            assert_never(op)


def _terms(op: DepthwiseConv | Scale | AvgPool, channels: int) -> Codes:
    """Weights `(terms, channels)` of an op that treats each channel for itself."""
    return np.ones((math.prod(op.window), channels), np.int64) if isinstance(op, AvgPool) else op.matrix


def _windows(op: Dense | Conv) -> int:
    """How often the input channels repeat among the terms of a sum."""
    return math.prod(op.kernel) if isinstance(op, Conv) else 1
