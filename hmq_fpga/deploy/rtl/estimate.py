"""LUTs of a fully unrolled network from its integers alone: a fitted formula, for searches that need many calls.

It predicts the tracer's own figure (`RtlProject.trace_resources`), which takes seconds to minutes, in
milliseconds. A product with constant weights is a tree of additions: as many as its weights have nonzero signed
digits, less one, each about as wide as the sum it makes, and the fewer the more of them the outputs can share.
What never changes or is never read costs nothing; so the range of each channel is followed through the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.report import Resources
from hmq_fpga.ir.fixed import Codes, Reals
from hmq_fpga.ir.network import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Input,
    LeakyRelu,
    MaxPool,
    Op,
    Outputs,
    Pad,
    QNet,
    Quantize,
    Scale,
    Upsample,
    by_output,
    sources_of,
)

# log(LUTs per addition): a constant, then the coefficients of the logarithms of the mean bits of the inputs and of
# the sums, the number of outputs and inputs, and the digits per weight; fitted by benchmarks/lut_model.py
FIT = (-1.7516, -0.1328, 1.6480, 0.0007, -0.1920, -0.4355)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest code of each channel of a tensor, arrays `(channels,)`."""

    lo: Codes
    hi: Codes

    @property
    def varies(self) -> Mask:
        """Channels that are not constant."""
        varies: Mask = self.lo < self.hi
        return varies

    @property
    def bits(self) -> Reals:
        """Bits that tell the codes of a channel apart."""
        bits: Reals = np.ceil(np.log2(self.hi - self.lo + 1.0))
        return bits


def estimate(net: QNet) -> Resources:
    """LUTs of the fully unrolled network, as the tracer would count them.

    On 42 trained networks that were left out of the fit: ratio to the tracer 0.96 … 1.27 (5th to 95th percentile),
    median 1.04; on 80 random ones 0.86 … 1.17, median 0.97.
    """
    return Resources(
        stage="model",
        tool="hmq_fpga",
        lut=round(luts(net)),
        dsp=0,
        bram=0,
        ii=1,
        notes="a formula fitted to the tracer's figures; fully unrolled distributed arithmetic",
    )


def luts(net: QNet, fit: Sequence[float] = FIT) -> float:
    """What `estimate` rounds, for other coefficients as well."""
    ranges: dict[str, Ranges] = {}
    for op in net.ops:
        ranges[op.name] = _range(net, op, ranges)
    read = {op.name: np.zeros(net.shapes[op.name][-1], dtype=bool) for op in net.ops}
    read[net.output.name][:] = True
    total = 0.0
    for op in reversed(net.ops):
        live = read[op.name] & ranges[op.name].varies
        total += _luts(net, op, ranges, live, fit)
        for source, mask in zip(sources_of(op), _reads(net, op, live), strict=True):
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
    positions = int(np.prod(net.shapes[op.name][:-1], dtype=int))
    result = ranges[op.name]
    match op:
        case Dense() | Conv():
            source = ranges[op.source]
            windows = len(_by_channel(op))
            weight = by_output(op)[:, live] * np.tile(source.varies, windows)[:, None]
            return positions * _product_luts(weight, np.tile(source.bits, windows), result.bits[live], fit)
        case DepthwiseConv() | Scale() | AvgPool():
            weight, source = _by_output_or_ones(op, len(live)), ranges[op.source]
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
        case Add():
            return positions * float(result.bits[live].sum())
        case Input() | Pad() | Upsample() | Flatten() | Concat() | Outputs():
            return 0.0
        case _:
            assert_never(op)


def _range(net: QNet, op: Op, ranges: Mapping[str, Ranges]) -> Ranges:
    if isinstance(op, Input):
        return Ranges(np.full(op.shape[-1], op.format.lo), np.full(op.shape[-1], op.format.hi))
    lo, hi = ranges[sources_of(op)[0]].lo, ranges[sources_of(op)[0]].hi
    if isinstance(op, Conv | DepthwiseConv | Pad) and np.any(op.padding):
        lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
    match op:
        case Dense() | Conv():
            weight = _by_channel(op)
            positive, negative = np.maximum(weight, 0).sum(axis=0), np.minimum(weight, 0).sum(axis=0)
            return Ranges(lo @ positive + hi @ negative + op.bias, hi @ positive + lo @ negative + op.bias)
        case DepthwiseConv() | Scale() | AvgPool():
            weight = _by_output_or_ones(op, len(lo))
            positive, negative = np.maximum(weight, 0).sum(axis=0), np.minimum(weight, 0).sum(axis=0)
            bias = 0 if isinstance(op, AvgPool) else op.bias
            return Ranges(lo * positive + hi * negative + bias, hi * positive + lo * negative + bias)
        case Quantize():
            frac = net.formats[op.source].frac
            return Ranges(op.format.requantize(lo, frac), op.format.requantize(hi, frac))
        case LeakyRelu():
            return Ranges(*(np.where(x < 0, x, x << op.shift) for x in (lo, hi)))
        case MaxPool() | Pad() | Upsample():
            return Ranges(lo, hi)
        case Flatten():
            positions = int(np.prod(net.shapes[op.source][:-1], dtype=int))
            return Ranges(np.tile(lo, positions), np.tile(hi, positions))
        case Add() | Concat():
            frac = net.formats[op.name].frac
            first, second = (
                (ranges[name].lo << shift, ranges[name].hi << shift)
                for name in op.sources
                for shift in [frac - net.formats[name].frac]
            )
            if isinstance(op, Add):
                return Ranges(first[0] + second[0], first[1] + second[1])
            return Ranges(np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]]))
        case Outputs():
            sides = []
            for name in op.sources:
                shift = net.formats[op.name].frac - net.formats[name].frac
                positions = math.prod(net.shapes[name][:-1])
                sides.append([np.tile(side << shift, positions) for side in (ranges[name].lo, ranges[name].hi)])
            return Ranges(*map(np.concatenate, zip(*sides, strict=True)))
        case _:
            assert_never(op)


def _reads(net: QNet, op: Op, live: Mask) -> list[Mask]:
    """Channels of each source that the channels `live` of an op depend on."""
    match op:
        case Input():
            return []
        case Dense() | Conv():
            return [(_by_channel(op)[..., live] != 0).any(axis=(0, 2))]
        case DepthwiseConv() | Scale():
            return [live & (by_output(op) != 0).any(axis=0)]
        case Flatten():
            return [live.reshape(-1, net.shapes[op.source][-1]).any(axis=0)]
        case Concat():
            return np.split(live, [net.shapes[op.sources[0]][-1]])
        case Outputs():
            return [part.reshape(-1, part.shape[-1]).any(axis=0) for part in net.split(live[None]).values()]
        case _:
            return [live for _ in sources_of(op)]


def _by_output_or_ones(op: DepthwiseConv | Scale | AvgPool, channels: int) -> Codes:
    """Weights `(terms, channels)` of an op that treats each channel for itself."""
    return np.ones((math.prod(op.window), channels), np.int64) if isinstance(op, AvgPool) else by_output(op)


def _by_channel(op: Dense | Conv) -> Codes:
    """Weights as `(window positions, input channels, outputs)`."""
    return op.weight.reshape(-1, *op.weight.shape[-2:])
