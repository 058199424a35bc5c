"""What a scheme or a network costs: the axes of every plot.

Rates are relative to 32-bit floats (HMQ paper, Eq. 7 and 10). Biases are not part of R_w; their bits
are reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Linear
from hmq_fpga.ir.scheme import Scheme

FLOAT_BITS = 32
Holds = Literal["format", "source", "nothing"]


def weight_bits(scheme: Scheme) -> int:
    """Bits of all weights, biases not counted."""
    return sum(t.bits for t in scheme.of_kind("weight"))


def weight_rate(scheme: Scheme) -> float:
    """R_w: bits of the float weights over bits of the quantized ones (Eq. 7); infinite where no weight has any."""
    bits = weight_bits(scheme)
    return FLOAT_BITS * sum(t.size for t in scheme.of_kind("weight")) / bits if bits else math.inf


@dataclass(frozen=True, kw_only=True)
class Step:
    """One tensor of a network, as far as memory is concerned.

    Attributes:
        name: of the tensor.
        sources: names of the tensors that it is made from.
        size: values of one sample.
        holds: `format` for a tensor with a format of its own, `source` for one that has its source's (such as a
            pooled one), `nothing` for sums on their way to a quantizer.
    """

    name: str
    sources: Sequence[str]
    size: int
    holds: Holds


def moments(steps: Sequence[Step]) -> list[dict[str, int]]:
    """What has to be held whenever a tensor with a format has just been made.

    That is the tensor itself, and every earlier one that something later still reads. In a plain chain it is the
    tensor alone, as in the paper's Eq. 10-11; in a residual block the shortcut's tensor counts as well.

    Returns:
        for each such moment, how many values are held in the format of which tensor.
    """
    last_read = {source: i for i, step in enumerate(steps) for source in step.sources}
    owners: dict[str, str | None] = {}
    found = []
    for i, step in enumerate(steps):
        match step.holds:
            case "format":
                owners[step.name] = step.name
                held: dict[str, int] = {}
                for other in steps[: i + 1]:
                    owner = owners[other.name]
                    if owner and (other is step or last_read.get(other.name, -1) > i):
                        held[owner] = held.get(owner, 0) + other.size
                found.append(held)
            case "source":
                owners[step.name] = owners[step.sources[0]]
            case "nothing":
                owners[step.name] = None
    return found


def activation_rate(held: Sequence[Mapping[str, int]], formats: Mapping[str, Fixed]) -> float:
    """R_a: bits of the most float values held at once over those of the costliest quantized ones (Eq. 10).

    Args:
        held: from `moments`.
        formats: by tensor name.
    """
    bits = (sum(formats[name].width * size for name, size in tensors.items()) for tensors in held)
    return FLOAT_BITS * max(sum(tensors.values()) for tensors in held) / max(bits)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of one linear op.

    Attributes:
        name: the op.
        macs: multiplications for one sample.
        weight_bits: bits of its weights, by their own widths where they have some.
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


def ebops(net: QNet) -> int:
    """Effective bit operations of all linear ops; see `LayerCost`."""
    return sum(layer.ebops for layer in layer_costs(net))


def layer_costs(net: QNet, scheme: Scheme | None = None) -> tuple[LayerCost, ...]:
    """Cost of each linear op, in network order.

    Args:
        net: the network.
        scheme: that it was made with, which alone knows widths of single weights; without it all have the format's.
    """
    bits = {t.name: t.bits for t in scheme.of_kind("weight")} if scheme else {}
    return tuple(_layer_cost(net, op, bits.get(f"{op.name}.weight")) for op in net.linears)


def _layer_cost(net: QNet, op: Linear, bits: int | None) -> LayerCost:
    tensor, input_width = net.tensors[op.name], net.formats[op.source].width
    macs = op.macs(tensor)
    if bits is None:
        bits = op.weight.size * op.weight_format.width
    return LayerCost(
        name=op.name,
        macs=macs,
        weight_bits=bits,
        bias_bits=op.bias.size * net.bias_format(op).width,
        zero_weights=float(np.mean(op.weight == 0)),
        bops=bits * tensor.positions * input_width,
        ebops=_significant_bits(op.weight) * tensor.positions * input_width,
    )


def _significant_bits(codes: Codes) -> int:
    """Bits of all magnitudes together, each from its most to its least significant one; none for zero."""
    values, counts = np.unique(np.abs(codes), return_counts=True)
    return sum(
        count * (value // max(value & -value, 1)).bit_length()
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
    )
