"""Channels that no sample activates, taken out of a network.

A channel after a ReLU that is zero for all of a training set (Hu et al., "Network Trimming", arXiv:1607.03250: an
average percentage of zeros of 100) is paid for in logic all the same, since some input may activate it. Without it the
network's outputs on these samples are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.ir import reference
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, Op, Quantize


def without_dead(net: QNet, batches: Iterable[np.ndarray[Any, Any]]) -> tuple[QNet, dict[str, int]]:
    """A network whose dead channels are zero for any input: what makes them is, and all weights that multiply them.

    Only those are taken that a `Dense` or `Conv` makes for one quantizer alone.

    Args:
        net: the network.
        batches: samples `(n, *input_shape)`, channels last.

    Returns:
        The network, and how many channels of each quantizer it lost.
    """
    makers = {op.name: maker for op in net.ops if isinstance(op, Quantize) and (maker := _maker(net, op))}
    alive = {name: np.zeros(net.shapes[name][-1], bool) for name in makers}
    for tensors in chain.from_iterable(reference.traces(net, x) for x in batches):
        for name in makers:
            alive[name] |= tensors[name].reshape(-1, len(alive[name])).any(axis=0)
    ops = {op.name: op for op in net.ops}
    for name, maker in makers.items():
        ops[maker.name] = replace(maker, weight=maker.weight * alive[name], bias=maker.bias * alive[name])
    silent = QNet(tuple(ops.values()), net.outputs)
    smaller = QNet(tuple(_unread(silent, op) for op in silent.ops), net.outputs)
    zero = {name: _zero(net, name) for name in makers}
    lost = {name: int((~alive[name] & ~zero[name]).sum()) for name in makers}
    return smaller, {name: count for name, count in lost.items() if count}


def _maker(net: QNet, op: Quantize) -> Dense | Conv | None:
    """What makes the sums of a quantizer, where nothing else reads them."""
    maker, readers = net[op.source], [other for other in net.ops if op.source in other.reads]
    return maker if isinstance(maker, Dense | Conv) and len(readers) == 1 else None


def _unread(net: QNet, op: Op) -> Op:
    """An op without weights that multiply a channel of zeros."""
    if not isinstance(op, Dense | Conv):
        return op
    return replace(op, weight=np.where(_zero(net, op.source)[:, None], 0, op.weight))


def _zero(net: QNet, tensor: str) -> npt.NDArray[np.bool_]:
    """Which channels are zero for any input, by interval arithmetic."""
    ranges = net.ranges[tensor]
    zero: npt.NDArray[np.bool_] = (ranges.lo == 0) & (ranges.hi == 0)
    return zero
