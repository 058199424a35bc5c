"""QNet's ops as hls4ml's layers: one dictionary per op, as `ModelGraph.from_layer_list` takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    Input,
    LeakyRelu,
    Linear,
    MaxPool,
    Op,
    Pad,
    Padding,
    Quantize,
    Scale,
    Shape,
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


def is_copy(net: QNet, op: Op) -> bool:
    """Whether an op leaves every value and its place as they are; hls4ml drops such layers, or their copies cost."""
    match op:
        case Quantize():
            return op.format == net.formats[op.source]
        case Scale():
            return bool((op.weight_format.decode(op.weight) == 1).all() and not op.bias.any())
        case Flatten():
            return len(net.shapes[op.source]) == 1
        case _:
            return False


def makers(net: QNet) -> dict[str, str]:
    """By op, the op whose layer makes its tensor: itself, or what it is a copy of."""
    found: dict[str, str] = {}
    for op in net.ops:
        found[op.name] = found[op.reads[0]] if is_copy(net, op) else op.name
    return found


def ports(net: QNet) -> tuple[str, ...]:
    """The ops whose layers make the outputs, in their order; a port has no shape, so what a flatten reads will do.

    Raises:
        InvalidInput: for an output that is the input's tensor, or that of another output.
    """
    made_by = makers(net)
    found: list[str] = []
    for output in net.outputs:
        name = made_by[output]
        while isinstance(op := net[name], Flatten):
            name = made_by[op.source]
        if name in found or isinstance(op, Input):
            kept = "input" if isinstance(op, Input) else f"output {net.outputs[found.index(name)]!r}"
            raise InvalidInput(f"op {output!r}: hls4ml has no second port for the values of the {kept}: leave it out")
        found.append(name)
    return tuple(found)


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


def _padding_name(names: dict[str, str], op: str) -> str:
    """Name of the layer of zeros before a convolution."""
    name = f"{names[op]}_padding"
    while name.lower() in {other.lower() for other in names.values()}:
        name = f"op_{name}"
    return name


def layer_list(net: QNet) -> list[Layer]:
    """hls4ml's layers of a network, the input first; see `ports` for the outputs."""
    names, made_by, put_out = layer_names(net), makers(net), ports(net)
    ops = [op for op in net.ops if made_by[op.name] == op.name]
    read = {made_by[source] for op in ops for source in op.reads}
    layers: list[Layer] = []
    for op in ops:
        if op.name not in read and op.name not in put_out:
            continue  # a flatten before an output
        inputs = [names[made_by[source]] for source in op.reads]
        if isinstance(op, Conv | DepthwiseConv) and _is_padded_before(op):
            shape = net.shapes[op.source]
            layers.append(_layer(_padding_name(names, op.name), inputs, **_zeros(op.padding, shape)))
            inputs = [layers[-1]["name"]]
        layers.append(_layer(names[op.name], inputs, **_fields(net, op)))
    return layers


def _layer(name: str, inputs: list[str], **fields: Any) -> Layer:
    return {"name": name, "inputs": inputs, "data_format": "channels_last", **fields}


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
        case Flatten():
            return {"class_name": "Reshape", "target_shape": list(shape)}
        case Add():
            return {"class_name": "Merge", "op": "add"}
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


def _convolution(net: QNet, op: Conv | DepthwiseConv) -> Layer:
    source, shape = net.shapes[op.source], net.shapes[op.name]
    sizes, padding = source[:-1], op.padding
    if _is_padded_before(op):
        sizes = tuple(n + sum(pair) for n, pair in zip(sizes, padding, strict=True))
        padding = tuple((0, 0) for _ in padding)
    channels = {"n_chan": source[-1], "n_filt": shape[-1]}
    windows = _named("filt_{}", op.kernel) | _named("stride_{}", op.stride)
    return channels | _named("in_{}", sizes) | _named("out_{}", shape[:-1]) | windows | _pads(padding)


def _is_padded_before(op: Conv | DepthwiseConv) -> bool:
    """Whether zeros take a layer of their own: hls4ml's convolutions of one position put none around."""
    return bool(np.any(op.padding)) and set(op.kernel) == {1}


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
