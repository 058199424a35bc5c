"""A network's ops as nodes of an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.hls.layers import ATTRIBUTES, layer_names
from hmq_fpga.ir.errors import assert_never
from hmq_fpga.ir.fixed import Codes, Fixed
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

if TYPE_CHECKING:
    from onnx import ModelProto

IR_VERSION = 8
GENERAL, CHANNELS_LAST = "qonnx.custom_op.general", "qonnx.custom_op.channels_last"
_DOMAINS = {"": 13, GENERAL: 1, CHANNELS_LAST: 13}  # and their versions; nodes of the last are run as ONNX's of 13
_ELEMENTWISE = {Add: "Add", Subtract: "Sub", Maximum: "Max", Minimum: "Min", Multiply: "Mul"}

# What hls4ml's layers have beside those, where it reads QONNX
_ATTRIBUTES = ATTRIBUTES | frozenset(
    [
        "bias_precision",
        "bias_quantizer",
        "bitwidth",
        "depthwise_quantizer",
        "dilation_height",
        "dilation_width",
        "dilations",
        "group",
        "n_dim",
        "narrow",
        "pads",
        "quantizer",
        "rounding_mode",
        "scale_precision",
        "scale_quantizer",
        "signed",
        "use_bias",
        "value",
        "weight_quantizer",
        "zeropt",
    ]
)


@dataclass(frozen=True)
class Names:
    """What a graph calls its tensors and the nodes that make them, by op: names that hls4ml takes.

    Attributes:
        tensors: of the ops: their own where that can be, and `<op>_quantizer` of an input.
        values: of the inputs' real values, `<op>_values`.
        products: of dense layers and scales before the bias, `<op>_product`.
    """

    tensors: Mapping[str, str]
    values: Mapping[str, str]
    products: Mapping[str, str]

    @classmethod
    def of(cls, net: QNet) -> Names:
        """The names for a network."""
        taken = set(_ATTRIBUTES)
        names = {op: free_name(name, taken) for op, name in layer_names(net).items()}
        values = {op.name: names[op.name] for op in net.inputs}
        quantizers = {op.name: free_name(f"{op.name}_quantizer", taken) for op in net.inputs}
        linears = [op.name for op in net.ops if isinstance(op, Dense | Scale)]
        return cls(names | quantizers, values, {op: free_name(f"{op}_product", taken) for op in linears})

    def taken(self) -> set[str]:
        """What no other tensor may be called, in small letters."""
        mine = (*self.tensors.values(), *self.values.values(), *self.products.values(), *_ATTRIBUTES)
        return {name.lower() for name in mine}


def free_name(name: str, taken: set[str]) -> str:
    """The name, or one like it, that is not taken, in small letters or capitals; now it is."""
    while name.lower() in taken:
        name += "_"
    taken.add(name.lower())
    return name


class Graph:
    """The model of a network in the making."""

    def __init__(self, net: QNet) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self._helper, self._types, self._stored = helper, TensorProto, numpy_helper.from_array
        self._net, self._names = net, Names.of(net)
        self._taken = self._names.taken()
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._values: dict[str, Any] = {}

    def made(self) -> ModelProto:
        """The model of one sample."""
        for op in self._net.ops:
            self._add(op)
        inputs = [self._names.values[op.name] for op in self._net.inputs]
        outputs = [self._names.tensors[name] for name in self._net.outputs]
        put_in, put_out = ([self._values.pop(name) for name in names] for names in (inputs, outputs))
        values = [*self._values.values()]
        graph = self._helper.make_graph(self._nodes, "hmq_fpga", put_in, put_out, self._constants, value_info=values)
        domains = [self._helper.make_opsetid(domain, version) for domain, version in _DOMAINS.items()]
        model: ModelProto = self._helper.make_model(
            graph, producer_name="hmq-fpga", opset_imports=domains, ir_version=IR_VERSION
        )
        return model

    def _add(self, op: Op) -> None:
        match op:
            case Input():
                values = self._value(self._names.values[op.name], self._dims(op))
                self._quantize(self._names.tensors[op.name], values, op.format, self._dims(op))
            case Quantize():
                self._quantize(self._names.tensors[op.name], self._names.tensors[op.source], op.format, self._dims(op))
            case Dense() if len(shape := self._net.shapes[op.name]) in (2, 3):  # hls4ml's product has no positions
                window = (1,) * (len(shape) - 1)
                weight = self._weight(op, op.weight.T.reshape(len(op.bias), *window, -1))
                self._make(op, "Conv", weight, self._bias(op), group=1, **_windows(window, window))
            case Dense():
                self._linear(op, "MatMul")
            case Scale():
                self._linear(op, "Mul")
            case Conv():
                weight = self._weight(op, np.moveaxis(op.weight, -1, 0))
                windows = _windows(op.weight.shape[:-2], op.stride, op.padding, op.dilation)
                self._make(op, "Conv", weight, self._bias(op), group=op.groups, **windows)
            case DepthwiseConv():
                weight = self._weight(op, np.moveaxis(op.weight, -1, 0)[..., None])
                windows = _windows(op.weight.shape[:-1], op.stride, op.padding, op.dilation)
                self._make(op, "Conv", weight, self._bias(op), group=op.weight.shape[-1], **windows)
            case MaxPool():
                self._make(op, "MaxPool", **_windows(op.window, op.stride))
            case AvgPool():
                self._mean(op)
            case LeakyRelu():
                self._make(op, "LeakyRelu", alpha=2.0**-op.shift)
            case Table():
                self._look_up(op)
            case Pad():
                self._make(op, "Pad", self._constant(op, "pads", np.array(_pads(((0, 0), *op.padding, (0, 0))))))
            case Upsample():
                region = self._constant(op, "region", np.array([], np.float32))  # of no use to this mode
                scales = self._constant(op, "scales", np.array([1, *op.factor, 1], np.float32))
                places = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
                self._make(op, "Resize", region, scales, mode="nearest", **places)
            case Flatten():
                self._make(op, "Flatten")
            case Gather():
                self._gather(op)
            case Add() | Subtract() | Maximum() | Minimum() | Multiply():
                self._make(op, _ELEMENTWISE[type(op)])
            case Concat():
                self._make(op, "Concat", axis=len(self._net.shapes[op.name]))
            case _:
                assert_never(op)

    def _quantize(self, name: str, source: str, format_: Fixed, dims: Shape) -> str:
        """Round and saturate; to one signed bit, which QONNX takes for ±1, by way of the opposite number."""
        if format_.signed and format_.width == 1:
            opposite = self._node(self._free(f"{name}_opposite"), "Neg", [source], dims)
            clipped = self._quantize(self._free(f"{name}_clipped"), opposite, replace(format_, signed=False), dims)
            return self._node(name, "Neg", [clipped], dims)
        kind: dict[str, Any] = {"signed": int(format_.signed), "narrow": 0, "rounding_mode": "ROUND"}
        values = {"scale": format_.step, "zeropt": 0, "bitwidth": format_.width}
        constants = [self._stored_as(f"{name}_{key}", np.array(value, np.float32)) for key, value in values.items()]
        return self._node(name, "Quant", [source, *constants], dims, domain=GENERAL, **kind)

    def _linear(self, op: Dense | Scale, kind: str) -> None:
        reads = [self._names.tensors[op.source], self._weight(op, op.weight)]
        product = self._node(self._names.products[op.name], kind, reads, self._dims(op))
        self._node(self._names.tensors[op.name], "Add", [product, self._bias(op)], self._dims(op))

    def _weight(self, op: Linear, codes: Codes) -> str:
        return self._quantized_constant(op, "weight", codes, op.weight_format)

    def _bias(self, op: Linear) -> str:
        return self._quantized_constant(op, "bias", op.bias, self._net.bias_format(op))

    def _quantized_constant(self, op: Op, role: str, codes: Codes, format_: Fixed) -> str:
        """Constants, which stand on their grid, and a quantizer that says so; of one signed bit it has two."""
        values = self._constant(op, f"{role}_values", format_.decode(codes).astype(np.float32))
        wide = replace(format_, width=max(format_.width, 1 + format_.signed))
        return self._quantize(self._free(f"{op.name}_{role}"), values, wide, codes.shape)

    def _mean(self, op: AvgPool) -> None:
        """By a convolution: with channels last QONNX has no other pooling than that of maxima."""
        channels, values = self._net.shapes[op.name][-1], math.prod(op.window)
        share = Fixed(signed=False, width=1, frac=values.bit_length() - 1)
        weight = self._quantized_constant(op, "weight", np.ones((channels, *op.window, 1), np.int64), share)
        bias = self._quantized_constant(op, "bias", np.zeros(channels, np.int64), share)
        self._make(op, "Conv", weight, bias, group=channels, **_windows(op.window, op.stride))

    def _look_up(self, op: Table) -> None:
        """In a table, by the source's code less the first one."""
        source, dims = self._net.formats[op.source], self._dims(op)
        steps = self._constant(op, "steps", np.array(1 / source.step, np.float32))
        first = self._constant(op, "first", np.array(source.lo, np.float32))
        values = self._constant(op, "table_values", op.format.decode(op.values).astype(np.float32))
        code = self._node(self._free(f"{op.name}_code"), "Mul", [self._names.tensors[op.source], steps], dims)
        place = self._node(self._free(f"{op.name}_place"), "Sub", [code, first], dims)
        integer = self._types.INT64
        index = self._node(self._free(f"{op.name}_index"), "Cast", [place], dims, type_of=integer, to=integer)
        self._node(self._names.tensors[op.name], "Gather", [values, index], dims)

    def _gather(self, op: Gather) -> None:
        """From the source's values in a row, with the fill before them."""
        count = math.prod(self._net.shapes[op.source])
        fill = self._constant(op, "fill", np.array(op.fill * self._net.formats[op.source].step, np.float32))
        before = self._constant(op, "before", np.array([0, 1, 0, 0]))
        index = self._constant(op, "places", op.index + 1)
        row = self._node(self._free(f"{op.name}_row"), "Flatten", [self._names.tensors[op.source]], (1, count))
        filled = self._node(self._free(f"{op.name}_filled"), "Pad", [row, before, fill], (1, count + 1))
        self._node(self._names.tensors[op.name], "Gather", [filled, index], self._dims(op), axis=1)

    def _make(self, op: Op, kind: str, *constants: str, **attributes: Any) -> None:
        """The node of an op, which reads what the op reads and the constants."""
        reads = [*(self._names.tensors[name] for name in op.reads), *constants]
        self._node(self._names.tensors[op.name], kind, reads, self._dims(op), **attributes)

    def _node(
        self, name: str, kind: str, reads: Sequence[str], dims: Shape, type_of: int | None = None, **attributes: Any
    ) -> str:
        """A node and its tensor, both of one name."""
        self._nodes.append(self._helper.make_node(kind, reads, [name], name=name, **attributes))
        return self._value(name, dims, type_of)

    def _constant(self, op: Op, role: str, values: npt.NDArray[Any]) -> str:
        return self._stored_as(f"{op.name}_{role}", values)

    def _stored_as(self, name: str, values: npt.NDArray[Any]) -> str:
        name = self._free(name)
        self._constants.append(self._stored(values, name))
        return self._value(name, values.shape, self._constants[-1].data_type)  # hls4ml asks for its shape

    def _value(self, name: str, dims: Shape, type_of: int | None = None) -> str:
        self._values[name] = self._helper.make_tensor_value_info(name, type_of or self._types.FLOAT, dims)
        return name

    def _dims(self, op: Op) -> Shape:
        return (1, *self._net.shapes[op.name])

    def _free(self, name: str) -> str:
        return free_name(name, self._taken)


def _windows(window: Shape, stride: Shape, padding: Padding = (), dilation: Shape = ()) -> Mapping[str, Any]:
    """Attributes of a node whose channels are last, which ONNX itself has not."""
    pads = _pads(padding or ((0, 0),) * len(window))
    dilations = dilation or (1,) * len(window)
    sizes = {"kernel_shape": window, "strides": stride, "pads": pads, "dilations": dilations}
    return {"domain": CHANNELS_LAST, **sizes}


def _pads(padding: Padding) -> list[int]:
    """All of those before, then all of those after."""
    return [pair[side] for side in (0, 1) for pair in padding]
