"""QNet to QKeras: the same integers, as floats on their grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.parity import to_codes
from hmq_fpga.deploy.qkeras.config import hls4ml_config
from hmq_fpga.deploy.qkeras.names import check_distinct, layer_name, mixes_channels, padding_name, values_name
from hmq_fpga.deploy.qkeras.versions import custom_objects, floatx, import_keras, plain_batch_norm, quiet
from hmq_fpga.ir.errors import InvalidInput, assert_never
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Computed,
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
    Merge,
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

BATCH = 1024  # samples at a time
MODEL, CONFIG = "model.keras", "hls4ml_config.json"
FloatType = Literal["float32", "float64"]
_FLOAT32_BITS = 24  # of its significand


def to_qkeras(net: QNet) -> Any:
    """The QKeras model of a network: real inputs `(batch, *input shape)` to real outputs, channels last.

    Several inputs it takes as a list (see `QNet.split_inputs`), and several outputs it gives as one. A layer has the
    name of its op (see `layer_name`); a padding that is neither `valid` nor `same` is one more layer, `<op>_padding`.
    Groups and dilation are zeros among the weights, and so are the other channels of a depthwise convolution that
    TensorFlow lacks. Where float32 cannot hold every sum the model is float64 (see `float_type`).

    Raises:
        ToolMissing: where QKeras is not installed.
        InvalidInput: where not even float64 is exact, or QKeras has no such quantizer; names the op.
    """
    keras = import_keras()
    dtype = float_type(net)
    with quiet(), floatx(dtype):
        model = _as_written(_connected)(net, keras, dtype)
        for op in net.linears:
            model.get_layer(op.name).set_weights(_constants(net, op))
    return model


def save(model: Any, path: Path) -> None:
    """Write a QKeras model to a `.keras` file, which `load` reads.

    So does `keras.models.load_model` with QKeras's objects. Thresholds below one, float64 models, tables and moved
    values then take this package's `small` as well: with Keras 2 the package must be installed, with Keras 3 that
    module imported.
    """
    import_keras()
    with quiet():
        model.save(path)


def load(path: Path) -> Any:
    """The model of a `.keras` file, ready to run.

    Raises:
        ToolMissing: where QKeras is not installed.
        InvalidInput: where the file is none, damaged, or of another Keras.
    """
    keras = import_keras()
    try:
        with ZipFile(path) as archive:
            version = str(json.loads(archive.read("metadata.json"))["keras_version"])
    except (OSError, BadZipFile, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path}: not a Keras model: {error}") from error
    if version.split(".")[0] != keras.__version__.split(".")[0]:
        raise InvalidInput(f"{path}: of Keras {version}, which Keras {keras.__version__} cannot read: export it again")
    try:
        with quiet():
            return _as_written(keras.models.load_model)(path, custom_objects=custom_objects())
    except Exception as error:  # from a damaged archive anything may come
        raise InvalidInput(f"{path}: not a model of QKeras: {str(error).splitlines()[0]}") from error


def export(net: QNet, folder: Path) -> None:
    """Write a network's `model.keras`, and beside it `hls4ml_config.json` for hls4ml's own Keras conversion.

    See `hls4ml_config` for how to go on from there; for a network that it refuses there is none.

    Raises:
        ToolMissing: where QKeras is not installed.
        InvalidInput: see `to_qkeras`.
    """
    model = to_qkeras(net)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / MODEL)
    with suppress(InvalidInput):
        (folder / CONFIG).write_text(json.dumps(hls4ml_config(net), indent=1) + "\n")


def _as_written(function: Any) -> Any:
    """A function in which AutoGraph does not rewrite the source of QKeras's layers, where only shapes are asked for."""
    import tensorflow

    return tensorflow.autograph.experimental.do_not_convert(function)


def float_type(net: QNet) -> FloatType:
    """The float type whose significand holds every sum and every quantizer's arithmetic exactly.

    Raises:
        InvalidInput: where float64 does not, naming the op.
    """
    bits = {op.name: significant_bits(net, op) for op in net.ops}
    worst = max(bits, key=lambda name: bits[name])
    if bits[worst] > 53:
        raise InvalidInput(
            f"op {worst!r}: its sums need {bits[worst]} bits and float64 is exact up to 53: use fewer bits or terms"
        )
    return "float32" if bits[worst] <= _FLOAT32_BITS else "float64"


@dataclass(frozen=True, eq=False)
class QKerasSimulator:
    """A network's QKeras model as a simulator: the one given, such as a loaded one, or a fresh one."""

    net: QNet
    given: Any = None
    name: ClassVar[str] = "qkeras"

    @classmethod
    def load(cls, net: QNet, folder: Path) -> QKerasSimulator:
        """The model that `export` wrote to `folder`, as a simulator of the network that it was made from.

        Raises:
            ToolMissing: where QKeras is not installed.
            InvalidInput: when there is none, or it has not the network's tensors.
        """
        model = load(folder / MODEL)
        shapes = {layer.name: tuple(layer.output.shape)[1:] for layer in model.layers}
        for op in net.ops:
            if shapes.get(layer_name(op)) != net.shapes[op.name]:
                raise InvalidInput(f"{folder / MODEL}: not of this network, it has no such tensor as {op.name!r}")
        return cls(net, model)

    @cached_property
    def model(self) -> Any:
        """The Keras model."""
        return self.given or to_qkeras(self.net)

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`."""
        outputs = self.model.outputs  # those of the model, whatever their layers are called
        return self.net.join(self._run(x, dict(zip(self.net.outputs, outputs, strict=True))))

    def trace(self, x: npt.NDArray[np.float32]) -> dict[str, Codes]:
        """Codes of every tensor by op name, for real inputs `(batch, *input shape)`."""
        return self._run(x, {op.name: self.model.get_layer(layer_name(op)).output for op in self.net.ops})

    def takes(self, codes: Mapping[str, Codes]) -> Mapping[str, Codes]:
        """All: each layer can be called by itself."""
        return codes

    def layers(self, given: Mapping[str, Codes]) -> dict[str, Codes]:
        """What each op's layers make of given codes of its sources."""
        keras, made, tensors = import_keras(), {}, {}
        for op in self.net.ops:
            if isinstance(op, Input):
                tensors[op.name] = made[op.name] = given[op.name]
                continue
            read = dict.fromkeys(op.reads)
            inputs = [self.model.get_layer(layer_name(self.net[name])).output for name in read]
            layer = keras.Model(_one_or_list(inputs), self.model.get_layer(layer_name(op)).output)
            values = [self.net.formats[name].decode(tensors[name]) for name in read]
            made[op.name] = to_codes(np.asarray(layer(_one_or_list(values))), self.net.formats[op.name], op.name)
            tensors[op.name] = given.get(op.name, made[op.name])
        return made

    def _run(self, x: npt.NDArray[np.float32], outputs: Mapping[str, Any]) -> dict[str, Codes]:
        """Codes of Keras tensors, each that of an op."""
        inputs = [
            _within_range(op, part) for op, part in zip(self.net.inputs, self.net.split_inputs(x).values(), strict=True)
        ]
        model = import_keras().Model(self.model.input, dict(outputs))
        batches = [model(_one_or_list([part[i : i + BATCH] for part in inputs])) for i in range(0, len(x), BATCH)]
        return {
            name: to_codes(np.concatenate([b[name] for b in batches]), self.net.formats[name], name) for name in outputs
        }


def _within_range(op: Input, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Values without those beyond twice the threshold, which saturate alike.

    QKeras quantizes as x + (q - x), which rounds where |x| is many times |q|.
    """
    bound = 2.0 ** (op.format.threshold_log2 + 1)
    return np.clip(x, -bound, bound)


def _one_or_list(values: list[Any]) -> Any:
    """What Keras takes for, and gives as, the inputs or outputs of a model."""
    return values if len(values) > 1 else values[0]


def significant_bits(net: QNet, op: Op) -> int:
    """Bits of the largest number that the float computation of `op` meets, on the finest grid that it meets."""
    match op:
        case Input():
            return op.format.width
        case Quantize():  # x + (q - x) on the finer of the two grids
            source = net.formats[op.source]
            return max(op.format.width, source.width + max(0, op.format.frac - source.frac))
        case Dense() | Conv() | DepthwiseConv():
            return net.partial_sum_bits(op)
        case Scale():  # in float32 TensorFlow takes the reciprocal root of a variance of one, by eights, for 0.9999999
            return max(net.partial_sum_bits(op), _FLOAT32_BITS + 1)
        case AvgPool() | LeakyRelu() | Table() | Add() | Subtract() | Multiply():
            return net.formats[op.name].width
        case MaxPool() | Pad() | Upsample() | Flatten() | Gather() | Maximum() | Minimum() | Concat():
            return 0
        case _:
            assert_never(op)


def _connected(net: QNet, keras: Any, dtype: FloatType) -> Any:
    """The Keras model of all ops, without their constants."""
    names = [*map(values_name, net.inputs), *map(layer_name, net.ops), *map(padding_name, _padded(net))]
    check_distinct(names, "Keras")
    inputs = {op.name: keras.Input(op.shape, dtype=dtype, name=values_name(op)) for op in net.inputs}
    tensors: dict[str, Any] = {}
    for op in net.ops:
        tensors[op.name] = (
            _activation(op, dtype)(inputs[op.name]) if isinstance(op, Input) else _apply(net, op, tensors, keras, dtype)
        )
    return keras.Model(_one_or_list([*inputs.values()]), _one_or_list([tensors[name] for name in net.outputs]))


def _apply(net: QNet, op: Computed, tensors: dict[str, Any], keras: Any, dtype: FloatType) -> Any:
    """The Keras tensor of an op."""
    sources = [tensors[name] for name in op.reads]
    layer = _layer(net, op, keras, dtype)
    if isinstance(op, Merge):
        return layer(sources)
    if isinstance(op, Conv | DepthwiseConv) and op in _padded(net):
        return layer(_zero_padding(keras, op.padding, padding_name(op))(*sources))
    return layer(*sources)


def _layer(net: QNet, op: Computed, keras: Any, dtype: FloatType) -> Any:
    """The Keras layer of an op, but for padding before a convolution."""
    import qkeras

    layers = keras.layers
    match op:
        case Quantize():
            return _activation(op, dtype, relu=net.formats[op.source].signed and not op.format.signed)
        case Dense():
            return qkeras.QDense(op.weight.shape[1], name=op.name, **_quantizers(net, op, "kernel", dtype))
        case Conv():
            kind = qkeras.QConv1D if len(op.stride) == 1 else qkeras.QConv2D
            windows = {"padding": _padding_mode(op, net.shapes[op.source]) or "valid", "strides": op.stride}
            quantizers = _quantizers(net, op, "kernel", dtype)
            return kind(op.weight.shape[-1], op.kernel, name=op.name, **windows, **quantizers)
        case DepthwiseConv():
            windows = {"padding": _padding_mode(op, net.shapes[op.source]) or "valid", "strides": op.stride}
            if len(op.stride) == 1:  # QKeras has none: the values are on their grids anyway
                return layers.DepthwiseConv1D(op.kernel, name=op.name, **windows)
            if mixes_channels(op):
                quantizers = _quantizers(net, op, "kernel", dtype)
                return qkeras.QConv2D(op.weight.shape[-1], op.kernel, name=op.name, **windows, **quantizers)
            quantizers = _quantizers(net, op, "depthwise", dtype)
            return qkeras.QDepthwiseConv2D(op.kernel, name=op.name, **windows, **quantizers)
        case Scale():
            return layers.BatchNormalization(epsilon=0, name=op.name, **plain_batch_norm())
        case MaxPool():
            return getattr(layers, f"MaxPooling{len(op.window)}D")(op.window, op.stride, name=op.name)
        case AvgPool():
            return getattr(layers, f"AveragePooling{len(op.window)}D")(op.window, op.stride, name=op.name)
        case Table():
            source = net.formats[op.source]
            values = op.format.decode(op.values).tolist()
            return _small().Table(values, first=source.lo, frac=source.frac, name=op.name)
        case Gather():
            fill = op.fill * net.formats[op.source].step
            return _small().Gather(op.index.tolist(), fill=fill, name=op.name)
        case LeakyRelu():
            return layers.LeakyReLU(2.0**-op.shift, name=op.name)
        case Pad():
            return _zero_padding(keras, op.padding, op.name)
        case Upsample():
            return getattr(layers, f"UpSampling{len(op.factor)}D")(_per_dimension(op.factor), name=op.name)
        case Flatten():
            return layers.Flatten(name=op.name)
        case Add() | Subtract() | Maximum() | Minimum() | Multiply():
            return getattr(layers, type(op).__name__)(name=op.name)
        case Concat():
            return layers.Concatenate(name=op.name)
        case _:
            assert_never(op)


def _padded(net: QNet) -> list[Op]:
    """The convolutions that a layer of their own pads for."""
    windows = [op for op in net.ops if isinstance(op, Conv | DepthwiseConv)]
    return [op for op in windows if _padding_mode(op, net.shapes[op.source]) is None]


def _zero_padding(keras: Any, padding: Padding, name: str) -> Any:
    return getattr(keras.layers, f"ZeroPadding{len(padding)}D")(_per_dimension(padding), name=name)


def _per_dimension(values: tuple[Any, ...]) -> Any:
    """Keras takes the one value of one dimension without a tuple around it."""
    return values if len(values) > 1 else values[0]


def _constants(net: QNet, op: Linear) -> list[npt.NDArray[np.float64]]:
    """The weights of an op's Keras layer."""
    bias = net.bias_format(op).decode(op.bias)
    weight = op.weight_format.decode(op.full_weight if isinstance(op, Conv | DepthwiseConv) else op.weight)
    match op:
        case DepthwiseConv():
            return [weight[..., None] * np.eye(len(bias)) if mixes_channels(op) else weight[..., None], bias]
        case Scale():
            return [weight, bias, np.zeros_like(bias), np.ones_like(bias)]  # mean 0, variance 1
        case _:
            return [weight, bias]


def _activation(op: Input | Quantize, dtype: FloatType, *, relu: bool = False) -> Any:
    width, integer = op.format.width, op.format.threshold_log2
    if op.format.signed and width == 1:
        raise InvalidInput(f"op {op.name!r}: QKeras has no signed format of one bit: use two bits or an unsigned one")
    # quantized_relu computes in float32 whatever the model's type; quantized_bits is the same function
    relu = relu and dtype == "float32"
    bits = f"quantized_bits({width},{integer},0,{int(op.format.signed)},1)"
    text = f"quantized_relu({width},{integer})" if relu else bits
    return _qkeras(integer, dtype).QActivation(text, name=layer_name(op))


def _quantizers(net: QNet, op: Linear, weight: str, dtype: FloatType) -> dict[str, Any]:
    return {
        f"{weight}_quantizer": _constant_quantizer(op.weight_format, dtype),
        "bias_quantizer": _constant_quantizer(net.bias_format(op), dtype),
        f"{weight}_initializer": "zeros",
    }


def _constant_quantizer(format: Fixed, dtype: FloatType) -> Any:
    """The quantizer of constants: of one signed bit, `{-step, 0}`, which QKeras takes for ±1, it has two."""
    width = max(format.width, 1 + format.signed)
    integer = width - format.signed - format.frac
    quantizer = _qkeras(integer, dtype).quantized_bits
    return quantizer(width, integer, symmetric=0, keep_negative=int(format.signed), alpha=1)


def _qkeras(integer: int, dtype: FloatType) -> Any:
    """The module whose classes can compute `2**integer` in a type: QKeras, where that can, or `small`."""
    import qkeras

    if 0 <= integer <= 30 and dtype == "float32":
        return qkeras
    return _small()


def _small() -> Any:
    from hmq_fpga.deploy.qkeras import small

    return small


def _padding_mode(op: Conv | DepthwiseConv, source: Shape) -> str | None:
    """The name that Keras has for a convolution's padding, if any."""
    if not np.any(op.padding):
        return "valid"
    same = tuple(
        (total // 2, total - total // 2)
        for n, k, s in zip(source, op.kernel, op.stride, strict=False)
        for total in [max((-(-n // s) - 1) * s + k - n, 0)]
    )
    return "same" if op.padding == same else None
