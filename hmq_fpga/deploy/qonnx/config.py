"""What hls4ml's own conversion of QONNX needs beside a model to keep its integers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hmq_fpga.deploy.hls.types import exact_type, held_format, precisions
from hmq_fpga.deploy.qkeras.names import check_distinct
from hmq_fpga.deploy.qonnx.graph import Names
from hmq_fpga.ir.errors import InvalidInput, assert_never
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
    Scale,
    Subtract,
    Table,
    Upsample,
)

_CONSTANTS = ("weight", "bias", "scale")  # whose types hls4ml takes from their quantizers


def hls4ml_config(net: QNet) -> dict[str, Any]:
    """The `hls_config` with which `hls4ml.converters.convert_from_onnx_model` gives a network's exact integers.

        model = onnx.load("model.onnx")
        config = json.loads(Path("hls4ml_config.json").read_text())
        project = hls4ml.converters.convert_from_onnx_model(model, hls_config=config, backend="Vitis")

    That is for `io_parallel`: hls4ml's streams have not all windows, and end without a result where one is missing.
    Left to itself hls4ml 1.3.0 truncates the input, and merges the quantizer of one of a tensor's readers into the
    layer that makes it. Types of constants it takes from their quantizers.

    Raises:
        InvalidInput: for an op that its conversion does not read, or not exactly, and where it would have two layers of
            one name; names the op.
    """
    for op in net.ops:
        if reason := _refusal(net, op):
            raise InvalidInput(f"op {op.name!r}: hls4ml's QONNX conversion {reason}")
    names = Names.of(net)
    check_distinct([*names.tensors.values(), *names.values.values(), *_made(net, names)], "hls4ml")
    read = [name for op in net.ops for name in op.reads]
    layers: dict[str, Any] = {}
    for op, types in zip(net.ops, precisions(net).values(), strict=True):
        inner = {role: kind for role, kind in types.items() if role not in _CONSTANTS}
        layers[names.tensors[op.name]] = {"Precision": inner}
        if isinstance(op, Input):
            layers[names.values[op.name]] = {"Precision": inner}
        elif isinstance(op, Dense | Scale):
            layers[names.products[op.name]] = {"Precision": _product_types(net, op, types, read.count(op.name))}
    model = {"Precision": {"default": "fixed<16,6>"}, "ReuseFactor": 1, "Strategy": "Latency"}
    return {"Model": model, "LayerName": layers}


def _product_types(net: QNet, op: Dense | Scale, types: dict[str, str], readers: int) -> dict[str, str]:
    """The types of a product before its bias.

    Where the result's type is open, hls4ml adds the bias in the same layer and rounds as the quantizer that follows it
    says. That is for a dense layer with one reader whose quantizer needs no bits that the sum has not; a scale's bias
    would lose its type.
    """
    if isinstance(op, Dense) and readers <= 1 and types["result"] == types["accum"]:
        return {"result": "auto", "accum": types["accum"]}
    unbiased = replace(op, bias=np.zeros_like(op.bias)).result(net.sources(op)).format
    exact = exact_type(replace(unbiased, width=max(unbiased.width, held_format({op.name: types}, op.name).width)))
    return {"result": exact, "accum": exact} if isinstance(op, Dense) else {"result": exact}


def _made(net: QNet, names: Names) -> list[str]:
    """Names of the layers that hls4ml makes of nodes."""
    made: list[str] = []
    for op in net.ops:
        name = names.tensors[op.name]
        match op:
            case Input() | Quantize():
                made.append(f"{name}_act")
            case Conv() | DepthwiseConv() | AvgPool():
                made += [f"{kind}{len(op.stride)}d_{name}" for kind in ("conv", "depthwiseconv")]
            case Dense() | Scale():
                made += [f"bn_{name}", f"bn_{names.products[op.name]}", f"dense_{names.products[op.name]}"]
            case _:
                pass
    return made


def _refusal(net: QNet, op: Op) -> str | None:
    """Why hls4ml 1.3.0 does not read an op, or not exactly; None where it does."""
    match op:
        case Table() | Gather():
            return f"has no {type(op).__name__}"
        case Input() | Quantize() if op.format.signed and op.format.width == 1:
            return "has no signed format of one bit"
        case Dense() if len(net.shapes[op.name]) > 3:
            return "has no dense layer over more than three dimensions"
        case Conv() if op.groups > 1:
            return "takes groups for those of a depthwise convolution"
        case Conv() | DepthwiseConv() if set(op.dilation) - {1}:
            return "has no dilation"
        case MaxPool() if len(op.window) == 1:
            return "takes channels for positions in a pooling of one dimension"
        case Upsample() if len(op.factor) == 1 or len({*op.factor}) > 1 or len({*net.shapes[op.name][:-1]}) > 1:
            return "takes height for width in an upsampling: it must be that of a square to a square"
        case Scale() if not op.weight.any():
            return "fails at a scale of zeros"
        case Add() if any(isinstance(net[name], Scale) for name in op.reads):
            return "moves scales from the terms of a sum to the sum"
        case Input() | Quantize() | Dense() | Conv() | DepthwiseConv() | Scale() | LeakyRelu() | MaxPool() | AvgPool():
            return None
        case Pad() | Upsample() | Flatten() | Concat() | Add() | Subtract() | Maximum() | Minimum() | Multiply():
            return None
        case _:
            assert_never(op)
