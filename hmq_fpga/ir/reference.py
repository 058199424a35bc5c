"""Exact integer execution of a QNet: the golden model that every back end must equal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Input, Op, Window

VALUES = 1 << 20  # that a batch holds of the largest tensor, or of the windows of a convolution: they stay in caches


def run(net: QNet, x: np.ndarray[Any, Any]) -> Codes:
    """Output codes `(batch, *output_shape)` for real inputs `(batch, *input_shape)`, channels last."""
    batches = [net.join(tensors) for tensors in traces(net, x)]
    return np.concatenate(batches) if batches else np.empty((0, *net.output_shape), np.int64)


def traces(net: QNet, x: np.ndarray[Any, Any]) -> Iterator[dict[str, Codes]]:
    """The same as `trace`, of as many samples at a time as `VALUES` holds."""
    batch = max(VALUES // max(_values(net, op) for op in net.ops), 1)
    codes = net.encode(x)
    return (_execute(net, codes[i : i + batch]) for i in range(0, len(codes), batch))


def trace(net: QNet, x: np.ndarray[Any, Any]) -> dict[str, Codes]:
    """Codes of every tensor by op name, for real inputs `(batch, *input_shape)`, channels last."""
    return _execute(net, net.encode(x))


def layers(net: QNet, given: Mapping[str, Codes]) -> dict[str, Codes]:
    """What each op by itself makes of given codes of its sources, by op name.

    Args:
        net: the network.
        given: codes `(batch, *shape)` by op name, those of every input among them. They need be nobody's results; a
            tensor that is not given is what was made.
    """
    made: dict[str, Codes] = {}
    tensors: dict[str, Codes] = {}
    for op in net.ops:
        sources = [tensors[name] for name in op.reads]
        made[op.name] = given[op.name] if isinstance(op, Input) else op.run(net.sources(op), sources)
        tensors[op.name] = given.get(op.name, made[op.name])
    return made


def _values(net: QNet, op: Op) -> int:
    """Values of a tensor for one sample, or of the windows that it is computed from."""
    tensor = net.tensors[op.name]
    if isinstance(op, Window):
        return tensor.positions * math.prod(op.kernel) * net.shapes[op.source][-1]
    return math.prod(tensor.shape)


def _execute(net: QNet, codes: Codes) -> dict[str, Codes]:
    return layers(net, net.split_inputs(codes))
