"""Exact integer execution of a QNet: the golden model that every back end must equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hmq_fpga.ir.fixed import Codes
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
    Merge,
    Op,
    Outputs,
    Pad,
    Padding,
    QNet,
    Quantize,
    Scale,
    Upsample,
    Window,
    by_output,
    kernel_of,
)

VALUES = 1 << 20  # that a batch holds of the largest tensor, or of the windows of a convolution: they stay in caches


def run(net: QNet, x: np.ndarray[Any, Any]) -> Codes:
    """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`, channels last."""
    batch = max(VALUES // max(_values(net, op) for op in net.ops), 1)
    codes = net.encode(x)
    batches = [_execute(net, codes[i : i + batch])[net.output.name] for i in range(0, len(codes), batch)]
    return np.concatenate(batches) if batches else np.empty((0, *net.shapes[net.output.name]), np.int64)


def _values(net: QNet, op: Op) -> int:
    """Values of a tensor for one sample, or of the windows that it is computed from."""
    *spatial, channels = net.shapes[op.name]
    if isinstance(op, Window):
        return math.prod(spatial) * math.prod(kernel_of(op)) * net.shapes[op.source][-1]
    return math.prod(spatial) * channels


def trace(net: QNet, x: np.ndarray[Any, Any]) -> dict[str, Codes]:
    """Codes of every tensor by op name, for real inputs `(batch, *input shape)`, channels last."""
    return _execute(net, net.encode(x))


def _execute(net: QNet, input_codes: Codes) -> dict[str, Codes]:
    tensors: dict[str, Codes] = {net.input.name: input_codes}
    for op in net.ops[1:]:
        tensors[op.name] = _apply(net, op, tensors)
    return tensors


def _apply(net: QNet, op: Op, tensors: Mapping[str, Codes]) -> Codes:
    if isinstance(op, Input):
        return tensors[op.name]
    if isinstance(op, Add | Concat | Outputs):
        return merge(net, op, tensors)
    x = tensors[op.source]
    result: Codes
    match op:
        case Quantize():
            return op.format.requantize(x, net.formats[op.source].frac)
        case Dense():
            return _matmul(x, op.weight, net.partial_sum_bits(op)) + op.bias
        case Conv():
            columns = _columns(_pad(x, op.padding), op)
            columns = columns.reshape(*columns.shape[:-2], -1)
            return _matmul(columns, by_output(op), net.partial_sum_bits(op)) + op.bias
        case DepthwiseConv():
            result = np.einsum("...kc,kc->...c", _columns(_pad(x, op.padding), op), by_output(op)) + op.bias
            return result
        case Scale():
            result = x * op.weight + op.bias
            return result
        case MaxPool():
            result = _columns(x, op).max(axis=-2)
            return result
        case AvgPool():  # the sum: the mean has more fractional bits
            result = _columns(x, op).sum(axis=-2)
            return result
        case LeakyRelu():
            return np.where(x < 0, x, x << op.shift)
        case Pad():
            return _pad(x, op.padding)
        case Upsample():
            for axis, factor in enumerate(op.factor, 1):
                x = x.repeat(factor, axis)
            return x
        case Flatten():
            return x.reshape(len(x), -1)
        case _:
            assert_never(op)


def merge(net: QNet, op: Merge | Outputs, tensors: Mapping[str, Codes]) -> Codes:
    """What an op makes of several tensors, `(batch, *shape)` by op name, on its grid."""
    frac = net.formats[op.name].frac
    sources = [tensors[name] << frac - net.formats[name].frac for name in op.sources]
    match op:
        case Add():
            return sources[0] + sources[1]
        case Concat():
            return np.concatenate(sources, axis=-1)
        case Outputs():
            return np.concatenate([source.reshape(len(source), -1) for source in sources], axis=-1)


def _matmul(x: Codes, weight: Codes, partial_sum_bits: int) -> Codes:
    """Integer matrix product; through float64 BLAS (30 times faster) where no partial sum can round."""
    if partial_sum_bits <= 53:
        return (x.astype(np.float64) @ weight.astype(np.float64)).astype(np.int64)
    return x @ weight


def _pad(x: Codes, padding: Padding) -> Codes:
    return np.pad(x, ((0, 0), *padding, (0, 0)))


def _columns(x: Codes, op: Window) -> Codes:
    """The windows of an op: `(batch, *spatial, c)` to `(batch, *positions, values of a window, c)`."""
    window = kernel_of(op)
    axes = tuple(range(1, 1 + len(window)))
    steps = (slice(None), *(slice(None, None, stride) for stride in op.stride))
    views = np.moveaxis(sliding_window_view(x, window, axes)[steps], 1 + len(window), -1)  # type: ignore[call-overload]
    return views.reshape(*views.shape[: 1 + len(window)], math.prod(window), x.shape[-1])
