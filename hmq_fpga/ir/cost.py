"""What a scheme or a network costs: the axes of every plot.

Rates are relative to 32-bit floats (HMQ paper, Eq. 7 and 10). Biases are not part of R_w; their bits
are reported beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import Conv2d, Dense, Linear, QNet
from hmq_fpga.ir.scheme import Scheme

FLOAT_BITS = 32


def weight_bits(scheme: Scheme) -> int:
    """Bits of all weights, biases not counted."""
    return sum(t.format.width * t.size for t in scheme.of_kind("weight"))


def weight_rate(scheme: Scheme) -> float:
    """R_w: bits of the float weights over bits of the quantized ones (Eq. 7)."""
    return FLOAT_BITS * sum(t.size for t in scheme.of_kind("weight")) / weight_bits(scheme)


def activation_rate(scheme: Scheme) -> float:
    """R_a: float bits of the largest activation tensor over bits of the costliest quantized one (Eq. 10)."""
    tensors = scheme.of_kind("activation", "input")
    return FLOAT_BITS * max(t.size for t in tensors) / max(t.format.width * t.size for t in tensors)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of one linear op.

    Attributes:
        name: the op.
        macs: multiplications for one sample.
        weight_bits: bits of its weight codes.
        bias_bits: bits of its bias codes.
        zero_weights: share of weight codes that are zero.
        bops: bit operations, MACs x weight bits x activation bits.
        ebops: effective bit operations: for each multiplication the bits between a weight's most and
            least significant ones, times the activation bits. Comparable only between networks of the
            same granularity and unrolling.
    """

    name: str
    macs: int
    weight_bits: int
    bias_bits: int
    zero_weights: float
    bops: int
    ebops: int


def layer_costs(net: QNet) -> tuple[LayerCost, ...]:
    """Cost of each linear op, in network order."""
    return tuple(_layer_cost(net, op) for op in net.linears)


def _layer_cost(net: QNet, op: Linear) -> LayerCost:
    uses = _uses_per_weight(net, op)
    input_width = net.formats[op.source].width
    return LayerCost(
        name=op.name,
        macs=op.weight.size * uses,
        weight_bits=op.weight.size * op.weight_format.width,
        bias_bits=op.bias.size * net.bias_format(op).width,
        zero_weights=float(np.mean(op.weight == 0)),
        bops=op.weight.size * uses * op.weight_format.width * input_width,
        ebops=_significant_bits(op.weight) * uses * input_width,
    )


def _uses_per_weight(net: QNet, op: Linear) -> int:
    """How often each weight multiplies, for one sample: once per output position."""
    match op:
        case Dense() | Conv2d():
            return int(np.prod(net.shapes[op.name][:-1], dtype=int))


def _significant_bits(codes: Codes) -> int:
    """Bits of all magnitudes together, each from its most to its least significant one; none for zero."""
    values, counts = np.unique(np.abs(codes), return_counts=True)
    return sum(
        count * (value // max(value & -value, 1)).bit_length()
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
    )
