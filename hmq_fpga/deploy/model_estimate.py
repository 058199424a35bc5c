"""LUTs of a fully unrolled network from its integers alone: a fitted formula, for searches that need many calls.

It predicts the tracer's own figure (`RtlProject.trace_resources`), which takes seconds to minutes, in
milliseconds. A product with constant weights is a tree of additions: as many as its weights have nonzero signed
digits, less one, each about as wide as the sum it makes, and the fewer the more of them the outputs can share.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np

from hmq_fpga.deploy.report import Resources
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import Conv2d, Dense, Flatten, Input, Linear, MaxPool2d, Op, QNet, Quantize

# log(LUTs per addition): a constant, then the coefficients of the logarithms of the input's bits, the mean bits
# of the sums, the outputs, the inputs, and the digits per weight; fitted by benchmarks/lut_model.py
_FIT = (-0.7532, 0.2701, 0.9845, -0.0776, -0.1241, -0.2448)


def estimate(net: QNet) -> Resources:
    """LUTs of the fully unrolled network as the tracer would count them, to some 10 %."""
    return Resources(
        stage="model",
        tool="hmq_fpga",
        lut=round(sum(_luts(net, op) for op in net.ops)),
        dsp=0,
        bram=0,
        ii=1,
        notes="a formula fitted to the tracer's figures; fully unrolled distributed arithmetic",
    )


def signed_digits(codes: Codes) -> Codes:
    """Nonzero digits of each code in non-adjacent form: the bits in which `n` and `3 n` differ."""
    magnitude = np.abs(codes)
    differing = np.ascontiguousarray(magnitude ^ (3 * magnitude))[..., None].view(np.uint8)
    digits: Codes = np.unpackbits(differing, axis=-1).sum(axis=-1, dtype=np.int64)
    return digits


@dataclass(frozen=True)
class _Ranges:
    """Smallest and largest code of each channel of a tensor, arrays `(channels,)`; and which channels are needed."""

    lo: Codes
    hi: Codes

    @property
    def varies(self) -> npt.NDArray[np.bool_]:
        return self.lo < self.hi

    @property
    def bits(self) -> Reals:
        """Bits that hold the range of each channel."""
        return np.log2((self.hi - self.lo).astype(np.float64) + 1)


def _ranges(net: QNet) -> dict[str, _Ranges]:
    ranges: dict[str, _Ranges] = {}
    for op in net.ops:
        ranges[op.name] = _range(net, op, ranges)
    return ranges


def _range(net: QNet, op: Op, ranges: Mapping[str, _Ranges]) -> _Ranges:
    match op:
        case Input():
            channels = op.shape[-1]
            return _Ranges(np.full(channels, op.format.lo), np.full(channels, op.format.hi))
        case Dense() | Conv2d():
            source = ranges[op.source]
            weight = op.weight.reshape(-1, *op.weight.shape[-2:])
            positive, negative = np.maximum(weight, 0).sum(axis=0), np.minimum(weight, 0).sum(axis=0)
            padded = isinstance(op, Conv2d) and bool(np.any(op.padding))
            lo, hi = (np.minimum(source.lo, 0), np.maximum(source.hi, 0)) if padded else (source.lo, source.hi)
            return _Ranges(lo @ positive + hi @ negative + op.bias, hi @ positive + lo @ negative + op.bias)
        case Quantize():
            source, frac = ranges[op.source], net.formats[op.source].frac
            return _Ranges(op.format.requantize(source.lo, frac), op.format.requantize(source.hi, frac))
        case MaxPool2d():
            return ranges[op.source]
        case Flatten():
            source, (height, width, _) = ranges[op.source], _image(net.shapes[op.source])
            return _Ranges(np.tile(source.lo, height * width), np.tile(source.hi, height * width))
        case _:
            assert_never(op)
