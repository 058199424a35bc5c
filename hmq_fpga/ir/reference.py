"""Exact integer execution of a QNet: the golden model that every back end must equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import Conv2d, Dense, Flatten, Input, MaxPool2d, Op, Padding, Pair, QNet, Quantize

BATCH = 1024  # samples at a time: bounds the memory of the convolutions' windows


def run(net: QNet, x: np.ndarray[Any, Any]) -> Codes:
    """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`, channels last."""
    codes = net.encode(x)
    batches = [_execute(net, codes[i : i + BATCH])[net.output.name] for i in range(0, len(codes), BATCH)]
    return np.concatenate(batches) if batches else np.empty((0, *net.shapes[net.output.name]), np.int64)


def trace(net: QNet, x: np.ndarray[Any, Any]) -> dict[str, Codes]:
    """Codes of every tensor by op name, for real inputs `(batch, *input shape)`, channels last."""
    return _execute(net, net.encode(x))


def _execute(net: QNet, input_codes: Codes) -> dict[str, Codes]:
    tensors: dict[str, Codes] = {net.input.name: input_codes}
    for op in net.ops[1:]:
        tensors[op.name] = _apply(net, op, tensors)
    return tensors


def _apply(net: QNet, op: Op, tensors: Mapping[str, Codes]) -> Codes:
    match op:
        case Input():
            return tensors[op.name]
        case Quantize():
            return op.format.requantize(tensors[op.source], net.formats[op.source].frac)
        case Dense():
            return _matmul(tensors[op.source], op.weight, net.partial_sum_bits(op)) + op.bias
        case Conv2d():
            windows = _windows(_pad(tensors[op.source], op.padding), op.weight.shape[:2], op.stride)
            columns = windows.reshape(*windows.shape[:3], -1)
            return _matmul(columns, op.weight.reshape(-1, op.weight.shape[-1]), net.partial_sum_bits(op)) + op.bias
        case MaxPool2d():
            pooled: Codes = _windows(tensors[op.source], op.window, op.stride).max(axis=(3, 4))
            return pooled
        case Flatten():
            x = tensors[op.source]
            return x.reshape(len(x), -1)
        case _:
            assert_never(op)


def _matmul(x: Codes, weight: Codes, partial_sum_bits: int) -> Codes:
    """Integer matrix product; through float64 BLAS (30 times faster) where no partial sum can round."""
    if partial_sum_bits <= 53:
        return (x.astype(np.float64) @ weight.astype(np.float64)).astype(np.int64)
    return x @ weight


def _pad(x: Codes, padding: Padding) -> Codes:
    return np.pad(x, ((0, 0), *padding, (0, 0)))


def _windows(x: Codes, window: Pair | tuple[int, ...], stride: Pair) -> Codes:
    """`(batch, h, w, c)` to `(batch, rows, columns, kh, kw, c)`."""
    views = sliding_window_view(x, (window[0], window[1]), (1, 2))[:, :: stride[0], :: stride[1]]  # type: ignore[call-overload]
    return np.moveaxis(views, 3, -1)
