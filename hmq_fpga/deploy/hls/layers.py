"""QNet's ops as hls4ml's layers: one dictionary per op, as `ModelGraph.from_layer_list` takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmq_fpga.deploy.hls.lower import View, makers
from hmq_fpga.deploy.hls.types import expected_types, held_format
from hmq_fpga.ir.errors import InvalidInput, assert_never
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    MAX_TABLE_BITS,
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
    Linear,
    Maximum,
    MaxPool,
    Minimum,
    Multiply,
    Op,
    Pad,
    Padding,
    Quantize,
    Scale,
    Shape,
    Subtract,
    Table,
    Upsample,
)

Layer = dict[str, Any]
# Attributes of hls4ml's layers: it files a layer's result among them, by the layer's name
ATTRIBUTES = frozenset(
    [
        "accum_t",
        "activ_param",
        "activation",
        "algorithm",
        "align_corners",
        "axis",
        "bias",
        "bias_data",
        "bias_t",
        "class_name",
        "config_cpp",
        "conv_implementation",
        "count_pad",
        "data_format",
        "depth_multiplier",
        "depthwise_data",
        "factor",
        "filt_height",
        "filt_width",
        "function_cpp",
        "gather_fill",
        "gather_index",
        "implementation",
        "in_height",
        "in_width",
        "include_header",
        "index",
        "index_t",
        "input_shape",
        "inputs",
        "line_buffer_codegen",
        "n_chan",
        "n_elem1",
        "n_elem2",
        "n_elem3",
        "n_filt",
        "n_in",
        "n_out",
        "n_partitions",
        "name",
        "op",
        "out_height",
        "out_width",
        "outputs",
        "pad_bottom",
        "pad_left",
        "pad_right",
        "pad_top",
        "parallelization_factor",
        "param_t",
        "pool_height",
        "pool_op",
        "pool_width",
        "precision",
        "result_t",
        "reuse_factor",
        "scale",
        "scale_data",
        "scale_t",
        "strategy",
        "size",
        "stride_height",
        "stride_width",
        "table",
        "table_data",
        "table_size",
        "table_t",
        "target_cycles",
        "target_shape",
        "trace",
        "type",
        "use_beta",
        "use_gamma",
        "weight",
        "weight_data",
        "weight_t",
    ]
)
_OWN = ("clone_", "repack_", "zp1d_", "zp2d_")  # of the layers that hls4ml adds


def ports(net: QNet) -> tuple[str, ...]:
    """The ops of a lowered network whose layers make the outputs, in their order."""
    made_by = makers(net)
    return tuple(made_by[name] for name in net.outputs)


def layer_names(net: QNet) -> dict[str, str]:
    """Names of hls4ml's layers by op: the op's own, unless hls4ml would take it for another's.

    hls4ml does not tell capitals, a layer with the name of one of its `ATTRIBUTES` would lose that, it reserves
    `input`, layers of its own have a layer's name behind a prefix, and the input's name becomes a variable's in C++.
    """
    names: dict[str, str] = {}
    taken = {"input", *ATTRIBUTES}
    for op in net.ops:
        name = f"{op.name}_values" if isinstance(op, Input) else op.name
        while name.lower() in taken or name.lower().startswith(_OWN):
            name = f"op_{name}"
        names[op.name] = name
        taken.add(name.lower())
    return names


def layer_list(net: QNet) -> list[Layer]:
    """hls4ml's layers of a lowered network, the inputs first; see `ports` for the outputs."""
    names, made_by = layer_names(net), makers(net)
    layers: list[Layer] = []
    for op in net.ops:
        if made_by[op.name] != op.name:
            continue
        inputs = [names[made_by[source]] for source in op.reads]
        layers.append({"name": names[op.name], "inputs": inputs, "data_format": "channels_last", **_fields(net, op)})
    return layers


def _fields(net: QNet, op: Op) -> Layer:
    """The kind of an op's layer and what is particular to it."""
    shape = net.shapes[op.name]
    match op:
        case Input():
            return {"class_name": "InputLayer", "input_shape": list(shape)}
        case Quantize():  # saturation is at zero without it; a ReLU says so to who reads the code
            relu = net.formats[op.source].signed and not op.format.signed
            return {"class_name": "Activation", "activation": "relu" if relu else "linear"}
        case Dense():
            sizes = dict(zip(("n_in", "n_out"), op.weight.shape, strict=True))
            return {"class_name": "Dense", **sizes, **_constants(net, op, "weight")}
        case Conv():
            return {"class_name": f"Conv{len(op.stride)}D", **_convolution(net, op), **_constants(net, op, "weight")}
        case DepthwiseConv():
            kind = f"DepthwiseConv{len(op.stride)}D"
            return {"class_name": kind, **_convolution(net, op), **_constants(net, op, "depthwise")}
        case Scale():
            sizes = {"n_in": int(np.prod(shape)), "n_filt": shape[-1] if len(shape) > 1 else -1}
            return {"class_name": "BatchNormalization", **sizes, **_constants(net, op, "scale")}
        case MaxPool() | AvgPool():
            return _pool(op, net.shapes[op.source], shape)
        case LeakyRelu():
            return {"class_name": "LeakyReLU", "activation": "LeakyReLU", "activ_param": 2.0**-op.shift}
        case Pad():
            return _zeros(op.padding, net.shapes[op.source])
        case Upsample():
            sizes = _named("in_{}", net.shapes[op.source][:-1]) | _named("out_{}", shape[:-1])
            flat = {"in_height": 1, "out_height": 1}  # of one dimension
            kind = f"UpSampling{len(op.factor)}D"
            return {"class_name": kind, "algorithm": "nearest", "n_chan": shape[-1], **flat, **sizes}
        case Flatten() | View():
            return {"class_name": "Reshape", "target_shape": list(shape)}
        case Gather():
            return {"class_name": "HmqGather", "gather_index": op.index, "gather_fill": op.fill}
        case Table():
            values = op.format.decode(_held_values(net, op))
            size = {"n_in": int(np.prod(shape)), "table_size": len(values)}
            return {"class_name": "UnaryLUT", "activation": "unary_lut", "table_data": values, **size}
        case Add() | Subtract() | Maximum() | Minimum() | Multiply():
            return {"class_name": "Merge", "op": type(op).__name__.lower()}
        case Concat():
            return {"class_name": "Concatenate", "op": f"concatenate{len(shape)}d", "axis": -1}
        case _:
            assert_never(op)


def _constants(net: QNet, op: Linear, weight: str) -> Layer:
    """Real values of an op's constants; hls4ml's types of them are set by name."""
    values = op.weight_format.decode(op.weight)
    if isinstance(op, DepthwiseConv):  # one output of each channel
        values = values[..., None]
    return {f"{weight}_data": values, "bias_data": net.bias_format(op).decode(op.bias)}


def _held_values(net: QNet, op: Table) -> Codes:
    """The values of a table by the bits of the variable that it reads, whose width and step may not be its source's."""
    kind, source = held_format(expected_types(net), op.source), net.formats[op.source]
    if kind.width > MAX_TABLE_BITS:
        raise InvalidInput(f"op {op.name!r}: hls4ml has its source in {kind.width} bits: more than a table is for")
    codes = np.arange(1 << kind.width)
    if kind.signed:  # the upper half stands for the negative ones
        codes = np.where(codes > kind.hi, codes - (1 << kind.width), codes)
    codes = np.clip(codes << source.frac - kind.frac, source.lo, source.hi)
    values: Codes = op.values[codes - source.lo]
    return values


def _convolution(net: QNet, op: Conv | DepthwiseConv) -> Layer:
    source, shape = net.shapes[op.source], net.shapes[op.name]
    channels = {"n_chan": source[-1], "n_filt": shape[-1]}
    windows = _named("filt_{}", op.kernel) | _named("stride_{}", op.stride)
    return channels | _named("in_{}", source[:-1]) | _named("out_{}", shape[:-1]) | windows | _pads(op.padding)


def _pool(op: MaxPool | AvgPool, source: Shape, shape: Shape) -> Layer:
    dims, kind = len(op.window), "Max" if isinstance(op, MaxPool) else "Average"
    sizes = _named("in_{}", source[:-1]) | _named("out_{}", shape[:-1])
    if dims == 1:
        sizes = {"n_in": source[0], "n_out": shape[0]}
    windows = _named("pool_{}", op.window) | _named("stride_{}", op.stride) | _pads(((0, 0),) * dims)
    return {"class_name": f"{kind}Pooling{dims}D", "n_filt": shape[-1], **sizes, **windows}


def _zeros(padding: Padding, source: Shape) -> Layer:
    grown = tuple(n + sum(pair) for n, pair in zip(source[:-1], padding, strict=True))
    sizes = _named("in_{}", source[:-1]) | _named("out_{}", grown)
    return {"class_name": f"ZeroPadding{len(padding)}D", "n_chan": source[-1], **sizes, **_pads(padding)}


def _named(pattern: str, values: Shape) -> Layer:
    """Values of one or two spatial dimensions under hls4ml's names of those."""
    return {pattern.format(d): n for d, n in zip(("height", "width")[-len(values) :], values, strict=True)}


def _pads(padding: Padding) -> Layer:
    sides = (("top", "bottom"), ("left", "right"))[-len(padding) :]
    return {f"pad_{side}": n for pair, ns in zip(sides, padding, strict=True) for side, n in zip(pair, ns, strict=True)}
