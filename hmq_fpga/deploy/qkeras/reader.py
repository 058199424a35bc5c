"""QKeras to QNet: the integers that a model of power-of-two quantizers computes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hmq_fpga.deploy.qkeras.model import float_type, significant_bits
from hmq_fpga.deploy.qkeras.versions import floatx, import_keras, quantizer_attribute, quiet
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.fixed import MAX_FRAC, MAX_WIDTH, Fixed, Reals
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
    TensorType,
    Upsample,
)

_MERGES = {"Add": Add, "Subtract": Subtract, "Multiply": Multiply, "Maximum": Maximum, "Minimum": Minimum}
_CONSTANT_BITS = 16  # of one that is read, if its quantizer tells of no format
_PROBES = 64  # samples on which the model is compared with what was read
_FINAL = ("softmax", "sigmoid", "tanh")  # left out at the end


def from_qkeras(model: Any, input_formats: Mapping[str, Fixed] | None = None) -> QNet:
    """The network of a QKeras model's integers: its values are those that the model predicts.

    Constants are what their quantizers make of them, whatever those are, if that takes few bits. Activations are
    `quantized_bits` and `quantized_relu` with `alpha` 1; a value that no quantizer follows stays exact. A softmax,
    sigmoid or tanh at the end is left out, as everywhere in this package. QKeras quantizes `x` as `x + (q - x)` in
    floats, which is not exact where an input is many times its quantizer's range.

    Args:
        model: a functional or sequential model, channels last, each layer used once.
        input_formats: of the inputs that are not read by a quantizer alone, by their layers' names; what is fed is then
            rounded to that format first.

    Raises:
        ToolMissing: where QKeras is not installed.
        UnsupportedLayer: naming the layer that has no exact integers, or is none that is read.
        InvalidInput: where an input has no format, or the model's float type is too narrow for its own sums.
    """
    import_keras()
    reader = _Reader(model, input_formats or {})
    with quiet():
        net = reader.net()
        dtype = str(model.layers[-1].dtype)
        if dtype == "float32" and float_type(net) != dtype:
            op = max(net.ops, key=lambda op: significant_bits(net, op))
            raise InvalidInput(
                f"layer {op.name!r}: needs {significant_bits(net, op)} bits, and the model's float32 is exact to 24: "
                "build it in float64, or with fewer bits"
            )
        reader.compare(net)
    return net


class _Reader:
    """A model being read, from its outputs to its inputs."""

    def __init__(self, model: Any, input_formats: Mapping[str, Fixed]) -> None:
        self._model, self._given = model, input_formats
        self._ops: list[Op] = []
        self._tensors: dict[str, TensorType] = {}
        self._left_out: set[str] = set()
        self._made: dict[str, str] = {}  # by layer, the op that makes its tensor
        self._inputs = [_maker(tensor) for tensor in model.inputs]
        self._outputs = [_maker(tensor) for tensor in model.outputs]

    def net(self) -> QNet:
        if unknown := sorted(set(self._given) - {layer.name for layer in self._inputs}):
            names = ", ".join(layer.name for layer in self._inputs)
            raise InvalidInput(f"input_formats: the model has no input {unknown[0]!r}, but {names}")
        for layer in self._inputs:
            self._input(layer)
        outputs = tuple(self._read(layer) for layer in self._outputs)
        return QNet(tuple(self._ops), outputs)

    def compare(self, net: QNet) -> None:
        """See that the layers compute the integers that were read, on random codes and on the ends of the inputs.

        Raises:
            UnsupportedLayer: naming the first layer that does not.
        """
        rng = np.random.default_rng(0)
        values: list[Reals] = []
        for op in net.inputs:
            codes = rng.integers(op.format.lo, op.format.hi + 1, (_PROBES, *op.shape))
            codes[0], codes[1] = op.format.lo, op.format.hi
            values.append(op.format.decode(codes))
        rows = values if len(values) == 1 else [np.concatenate([value.reshape(_PROBES, -1) for value in values], 1)]
        expected = reference.trace(net, rows[0])
        known = self._made.keys() - self._left_out
        layers = [layer for layer in self._model.layers if layer.name in known]
        fed = [value.astype(str(layer.dtype)) for value, layer in zip(values, self._inputs, strict=True)]
        outputs = {layer.name: layer.output for layer in layers}
        computed = import_keras().Model(self._model.inputs, outputs)(fed if len(fed) > 1 else fed[0])
        for layer in layers:
            made = self._made[layer.name]
            read = net.formats[made].decode(expected[made])
            if not np.array_equal(np.asarray(computed[layer.name], np.float64).reshape(read.shape), read):
                raise _unread(layer, "computes other values than the integers that were read of it")

    def _input(self, layer: Any) -> None:
        """An input's op: of the format that is given, or of the quantizer that reads it."""
        shape = tuple(_one(layer.output).shape)[1:]
        name = _op_name(layer.name.removesuffix("_values"))
        if (format_ := self._given.get(layer.name)) is not None:
            self._made[layer.name] = self._add(Input(name=name, shape=shape, format=format_))
            return
        readers = [other for other in self._model.layers if other is not layer and layer in _sources(other)]
        if [type(reader).__name__ for reader in readers] != ["QActivation"]:
            raise InvalidInput(
                f"input {layer.name!r}: is not read by one QActivation alone: give its format, as in "
                f"input_formats={{{layer.name!r}: Fixed(signed=True, width=16, frac=10)}}"
            )
        quantizer = getattr(readers[0], quantizer_attribute())
        made = self._add(Input(name=name, shape=shape, format=_format_of(readers[0], quantizer)))
        self._made[readers[0].name] = self._without_lowest(readers[0], quantizer, made)

    def _read(self, layer: Any) -> str:
        """The op that makes a layer's tensor."""
        pending = [layer]
        while pending:
            layer = pending[-1]
            if layer.name in self._made:
                pending.pop()
            elif waiting := [source for source in _sources(layer) if source.name not in self._made]:
                pending += waiting[::-1]
            else:
                self._made[layer.name] = self._layer(layer, [self._made[source.name] for source in _sources(layer)])
        return self._made[layer.name]

    def _layer(self, layer: Any, sources: Sequence[str]) -> str:
        kind, name = type(layer).__name__, _op_name(layer.name)
        config, first = layer.get_config(), sources[0]
        if config.get("data_format") == "channels_first":
            raise _unread(layer, "has its channels first; build it with channels last")
        shape = self._tensors[first].shape
        match kind:
            case "QActivation":
                return self._activated(layer, getattr(layer, quantizer_attribute()), first, name)
            case "Activation" | "ReLU" | "Softmax":
                return self._plain_activation(layer, first, name)
            case "Dropout" | "SpatialDropout1D" | "SpatialDropout2D" | "GaussianNoise":
                return first
            case "QDense" | "Dense":
                return self._linear(layer, first, Dense)
            case "QConv1D" | "QConv2D" | "Conv1D" | "Conv2D":
                windows = _windows(layer, config, shape)
                return self._linear(layer, first, Conv, **windows, groups=config.get("groups", 1))
            case "QDepthwiseConv2D" | "DepthwiseConv1D" | "DepthwiseConv2D":
                if config["depth_multiplier"] != 1:
                    raise _unread(layer, "has a depth multiplier, which is not read")
                return self._linear(layer, first, DepthwiseConv, **_windows(layer, config, shape))
            case "BatchNormalization":
                return self._scale(layer, config, first, name)
            case "MaxPooling1D" | "MaxPooling2D" | "AveragePooling1D" | "AveragePooling2D":
                windows = _windows(layer, config, shape, "pool_size")
                if np.any(windows.pop("padding")):
                    raise _unread(layer, "pads; only pooling that does not is read")
                op = MaxPool if kind.startswith("Max") else AvgPool
                return self._add(op(name=name, source=first, window=windows.pop("window"), stride=windows["stride"]))
            case "GlobalMaxPooling1D" | "GlobalMaxPooling2D" | "GlobalAveragePooling1D" | "GlobalAveragePooling2D":
                op = MaxPool if "Max" in kind else AvgPool
                flat = "" if config.get("keepdims") else "_windows"
                pooled = self._add(op(name=f"{name}{flat}", source=first, window=shape[:-1], stride=shape[:-1]))
                return self._add(Flatten(name=name, source=pooled)) if flat else pooled
            case "LeakyReLU":
                slope = float(config.get("alpha", config.get("negative_slope")))
                shift = -math.frexp(slope)[1] + 1
                if slope != 2.0**-shift:
                    raise _unread(layer, f"has the slope {slope}, which is no power of two")
                return self._add(LeakyRelu(name=name, source=first, shift=shift))
            case "ZeroPadding1D" | "ZeroPadding2D":
                padding = config["padding"]
                pairs: Any = (padding,) if kind == "ZeroPadding1D" else padding
                return self._add(Pad(name=name, source=first, padding=tuple((int(a), int(b)) for a, b in pairs)))
            case "UpSampling1D" | "UpSampling2D":
                if config.get("interpolation", "nearest") != "nearest":
                    raise _unread(layer, "interpolates; only the nearest neighbour is read")
                return self._add(Upsample(name=name, source=first, factor=_sizes(config["size"])))
            case "Flatten":
                return self._add(Flatten(name=name, source=first))
            case "Reshape" | "Permute":
                index = np.arange(math.prod(shape)).reshape(shape)
                moved = tuple(_one(layer.output).shape)[1:]
                index = index.transpose([d - 1 for d in config["dims"]]) if kind == "Permute" else index.reshape(moved)
                return self._add(Gather(name=name, source=first, index=index))
            case "Concatenate":
                if config["axis"] not in (-1, len(shape)):
                    raise _unread(layer, "joins along another dimension than the channels")
                return self._chain(Concat, sources, name)
            case "Add" | "Subtract" | "Multiply" | "Maximum" | "Minimum":
                return self._chain(_MERGES[kind], sources, name)
            case "Table":  # of this package
                table, source = layer.get_config(), self._tensors[first].format
                if (table["first"], table["frac"]) != (source.lo, source.frac):
                    raise _unread(layer, "is the table of another format than its source's")
                values = np.array(table["values"])
                format_ = _constant_format(layer, values, None)
                return self._add(Table(name=name, source=first, values=format_.encode(values), format=format_))
            case "Gather":  # of this package
                moved = layer.get_config()
                fill = self._tensors[first].format.encode(moved["fill"])
                return self._add(Gather(name=name, source=first, index=np.array(moved["index"]), fill=int(fill)))
            case _:
                raise _unread(layer, "is not read: see from_qkeras for what is")

    def _add(self, op: Op) -> str:
        """One more op; a name that is taken is made another."""
        while op.name in self._tensors:
            op = replace(op, name=f"{op.name}_")
        op.check()
        self._tensors[op.name] = op.result([self._tensors[name] for name in op.reads])
        self._ops.append(op)
        return op.name

    def _chain(self, op: Any, sources: Sequence[str], name: str) -> str:
        """Two by two, as Keras does."""
        made = sources[0]
        for number, source in enumerate(sources[1:], 2):
            last = number == len(sources)
            made = self._add(op(name=name if last else f"{name}_{number}", sources=(made, source)))
        return made

    def _linear(self, layer: Any, source: str, op: type[Dense | Conv | DepthwiseConv], **fields: Any) -> str:
        """Products with constants, and the activation that the layer has of its own."""
        kernel, *biases = layer.weights
        quantizers = layer.get_quantizers() if hasattr(layer, "get_quantizers") else [None, None]
        real = _quantized(layer, quantizers[0], kernel)
        if op is DepthwiseConv:
            real = real[..., 0]
        bias = _quantized(layer, quantizers[1], biases[0]) if biases else np.zeros(real.shape[-1])
        name = _op_name(layer.name)
        constants = self._constants(layer, source, real, _constant_format(layer, real, quantizers[0]), bias)
        made = self._add(op(name=name, source=source, **constants, **fields))
        activation = layer.activation
        if activation is None or getattr(activation, "__name__", "") == "linear":
            return made
        return self._activated(layer, activation, made, f"{name}_activation")

    def _scale(self, layer: Any, config: Mapping[str, Any], source: str, name: str) -> str:
        """A normalization by numbers of few bits."""
        shape = self._tensors[source].shape
        if _sizes(config["axis"]) not in ((-1,), (len(shape),)):
            raise _unread(layer, "normalizes along another dimension than the channels")
        values = [np.asarray(value, np.float64) for value in layer.get_weights()]
        one, zero = np.ones(shape[-1]), np.zeros(shape[-1])
        gamma = values.pop(0) if config["scale"] else one
        beta = values.pop(0) if config["center"] else zero
        mean, variance = values
        factor = gamma / np.sqrt(variance + config["epsilon"])
        offset = beta - mean * factor
        constants = self._constants(layer, source, factor, _constant_format(layer, factor, None), offset)
        return self._add(Scale(name=name, source=source, **constants))

    def _constants(self, layer: Any, source: str, weight: Reals, format_: Fixed, bias: Reals) -> dict[str, Any]:
        """Fields of a linear op, whose weights have more fractional bits where its bias needs them."""
        read = self._tensors[source].format.frac
        finer = max(0, _fraction(bias) - format_.frac - read)
        if format_.width + finer > MAX_WIDTH:
            raise _unread(layer, "has a bias that is on no grid of few bits: give it a quantizer")
        format_ = replace(format_, width=format_.width + finer, frac=format_.frac + finer)
        on_grid = (bias * 2.0 ** (format_.frac + read)).astype(np.int64)
        return {"weight": format_.encode(weight), "weight_format": format_, "bias": on_grid}

    def _activated(self, layer: Any, activation: Any, source: str, name: str) -> str:
        """What follows a quantizer, or a function of Keras that is exact."""
        called = getattr(activation, "__name__", type(activation).__name__)
        if called == "linear":
            return source
        if called == "relu":
            return self._relu(source, name)
        made = self._add(Quantize(name=name, source=source, format=_format_of(layer, activation)))
        return self._without_lowest(layer, activation, made)

    def _plain_activation(self, layer: Any, source: str, name: str) -> str:
        called = getattr(getattr(layer, "activation", None), "__name__", type(layer).__name__.lower())
        if called in _FINAL and layer in self._outputs:
            self._left_out.add(layer.name)
            return source
        config = layer.get_config()
        if called not in ("linear", "relu") or config.get("max_value") or config.get("threshold"):
            raise _unread(layer, f"({called}) has no exact integers here: give it a quantizer of few bits")
        if config.get("negative_slope"):
            raise _unread(layer, "has a negative slope: use a LeakyReLU of a power of two")
        return source if called == "linear" else self._relu(source, name)

    def _relu(self, source: str, name: str) -> str:
        """Zero or more, on the source's grid."""
        read = self._tensors[source].format
        if not read.signed:
            return source
        return self._add(Quantize(name=name, source=source, format=Fixed.enclosing(0, read.hi, read.frac)))

    def _without_lowest(self, layer: Any, quantizer: Any, made: str) -> str:
        """As a symmetric quantizer has it, whose lowest code is the opposite of the highest."""
        format_ = self._tensors[made].format
        if not (format_.signed and quantizer.get_config().get("symmetric")):
            return made
        if format_.width > MAX_TABLE_BITS:
            raise _unread(layer, f"is symmetric, which is read up to {MAX_TABLE_BITS} bits: set symmetric=0")
        codes = np.maximum(np.arange(format_.lo, format_.hi + 1), -format_.hi)
        return self._add(Table(name=f"{made}_symmetric", source=made, values=codes, format=format_))


def _format_of(layer: Any, quantizer: Any) -> Fixed:
    """The format of a quantizer of activations.

    Raises:
        UnsupportedLayer: where it is none of a power of two.
    """
    kind, config = type(quantizer).__name__, quantizer.get_config() if hasattr(quantizer, "get_config") else {}
    if kind not in ("quantized_bits", "quantized_relu"):
        raise _unread(layer, f"has the quantizer {kind}; quantized_bits and quantized_relu are read")
    bits, integer = int(config["bits"]), int(config["integer"])
    odd = {
        "alpha": config.get("alpha") not in (None, 1),
        "use_stochastic_rounding": config.get("use_stochastic_rounding"),
        "qnoise_factor": config.get("qnoise_factor", 1) != 1,
        "use_sigmoid": config.get("use_sigmoid"),
        "negative_slope": config.get("negative_slope"),
        "relu_upper_bound": config.get("relu_upper_bound") and not quantizer.is_quantized_clip,
    }
    if found := [name for name, is_set in odd.items() if is_set]:
        raise _unread(layer, f"has a {kind} with {found[0]} set, whose values are not those of a format")
    signed = kind == "quantized_bits" and bool(config["keep_negative"])
    if signed and bits == 1:
        raise _unread(layer, "has a quantized_bits of one bit and a sign, which is ±1: use two bits")
    return Fixed(signed=signed, width=bits, frac=bits - signed - integer)


def _quantized(layer: Any, quantizer: Any, variable: Any) -> Reals:
    """Constants as the layer computes with them."""
    if quantizer is None:
        return np.asarray(variable, np.float64)
    if quantizer.get_config().get("use_stochastic_rounding"):
        raise _unread(layer, "rounds its constants at random: set use_stochastic_rounding to False")
    with floatx(str(layer.dtype)):
        return np.asarray(quantizer(variable), np.float64)


def _constant_format(layer: Any, values: Reals, quantizer: Any) -> Fixed:
    """The format of constants: their quantizer's where it is one of powers of two, else the narrowest."""
    if type(quantizer).__name__ == "quantized_bits" and quantizer.alpha in (None, 1) and quantizer.bits > 1:
        return _format_of(layer, quantizer)
    frac = _fraction(values)
    scaled = np.abs(values).max() * 2.0**frac
    if scaled >= 2.0**_CONSTANT_BITS:
        raise _unread(layer, "has constants on no grid of few bits: give them a quantizer")
    codes = (values * 2.0**frac).astype(np.int64)
    return Fixed.enclosing(int(codes.min()), int(codes.max()), frac)


def _fraction(values: Reals) -> int:
    """Fractional bits of the coarsest grid that all values are on."""
    mantissa, exponent = np.frexp(values[values != 0])
    codes = np.abs(mantissa * 2.0**53).astype(np.int64)
    zeros = np.log2(codes & -codes).astype(np.int64)  # at the end of each
    return int((53 - exponent - zeros).max(initial=-MAX_FRAC)) if codes.size else 0


def _windows(layer: Any, config: Mapping[str, Any], shape: Shape, size: str = "kernel_size") -> dict[str, Any]:
    """Stride, padding and dilation of a layer that reads an image of a shape; of pooling the window too."""
    window, stride = _sizes(config[size]), _sizes(config["strides"])
    dilation = _sizes(config.get("dilation_rate", 1))
    dims = len(shape) - 1
    window, stride, dilation = (value * dims if len(value) < dims else value for value in (window, stride, dilation))
    reach = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
    match config["padding"]:
        case "valid":
            padding: Padding = ((0, 0),) * dims
        case "same":
            totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(shape, reach, stride, strict=False)]
            padding = tuple((total // 2, total - total // 2) for total in totals)
        case "causal":
            padding = ((reach[0] - 1, 0),)
        case other:
            raise _unread(layer, f"has the padding {other!r}")
    fields = {"stride": stride, "padding": padding}
    if size == "pool_size":
        return fields | {"window": window}
    return fields | ({"dilation": dilation} if set(dilation) != {1} else {})


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)


def _sources(layer: Any) -> list[Any]:
    """The layers whose tensors a layer reads.

    Raises:
        UnsupportedLayer: where it is used several times.
    """
    if type(layer).__name__ == "InputLayer":
        return []
    if len(layer._inbound_nodes) != 1:
        raise _unread(layer, "is used more than once, or never: give each use a layer of its own")
    read = layer.input
    return [_maker(tensor) for tensor in (read if isinstance(read, list | tuple) else [read])]


def _maker(tensor: Any) -> Any:
    """The layer that makes a tensor."""
    return tensor._keras_history[0]


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _op_name(name: str) -> str:
    """A name of a layer as an op's: letters, digits and underscores, a letter first."""
    return re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_0123456789") or "layer"


def _unread(layer: Any, what: str) -> UnsupportedLayer:
    return UnsupportedLayer(f"layer {layer.name!r} ({type(layer).__name__}) {what}")
