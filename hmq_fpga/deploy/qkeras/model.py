"""QNet to QKeras: the same integers, as floats on their grids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, assert_never

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.parity import to_codes
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes, Fixed
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
    Linear,
    MaxPool,
    Op,
    Outputs,
    Pad,
    QNet,
    Quantize,
    Scale,
    Shape,
    Upsample,
    kernel_of,
    sources_of,
)

BATCH = 1024  # samples at a time
FloatType = Literal["float32", "float64"]
_FLOAT32_BITS = 24  # of its significand


def tensorflow() -> Any:
    """TensorFlow, imported without noise and without the rewrites by which oneDNN changes the arithmetic.

    That is decided when it is first imported, so nothing in the package imports it in another way.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with quiet():
        import qkeras  # noqa: F401
        import tensorflow
    return tensorflow


def to_qkeras(net: QNet) -> Any:
    """The QKeras model of a network: real inputs `(batch, *input shape)` to real outputs, channels last.

    Of a network with several outputs it gives a list of them. A layer has the name of its op (see `layer_name`); a
    padding that is neither `valid` nor `same` is one more layer, `<op>_padding`. Where float32 cannot hold every sum
    the model is float64 (see `float_type`): set `tf.keras.backend.set_floatx("float64")` before loading such a model
    from a file.

    Raises:
        InvalidInput: where not even float64 is exact, or QKeras has no such quantizer; names the op.
    """
    dtype = float_type(net)
    with _floatx(dtype) as keras, quiet():
        # AutoGraph would rewrite the source of QKeras's layers, a second's work, where only shapes are asked for
        model = tensorflow().autograph.experimental.do_not_convert(_connected)(net, keras, dtype)
        for op in net.linears:
            model.get_layer(op.name).set_weights(_constants(net, op))
    return model


def save(model: Any, path: Path) -> None:
    """Write a QKeras model to a `.keras` file; `tf.keras.models.load_model` reads it, with QKeras installed.

    Thresholds below one take this package as well (see `qkeras_small`): it must be installed, not imported.
    """
    with quiet():
        model.save(path)


@contextmanager
def quiet() -> Iterator[None]:
    """No deprecation notices of QKeras's dependencies, nor Keras's that a quantizer is serialized as a constraint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*keras\.constraints\.serialize")
        yield


def layer_name(op: Op) -> str:
    """Name of the Keras layer that makes an op's tensor: the op's, or `<input>_quantizer` after `<input>_values`.

    (hls4ml reserves the name `input`.)
    """
    return f"{op.name}_quantizer" if isinstance(op, Input) else op.name


def float_type(net: QNet) -> FloatType:
    """The float type whose significand holds every sum and every quantizer's arithmetic exactly.

    Raises:
        InvalidInput: where float64 does not, naming the op.
    """
    bits = {op.name: _significant_bits(net, op) for op in net.ops}
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

    @cached_property
    def model(self) -> Any:
        """The Keras model."""
        return self.given or to_qkeras(self.net)

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`."""
        return self._run(x, self.net.outputs)[self.net.output.name]

    def trace(self, x: npt.NDArray[np.float32]) -> dict[str, Codes]:
        """Codes of every tensor by op name, for real inputs `(batch, *input shape)`."""
        return self._run(x, [op for op in self.net.ops if not isinstance(op, Outputs)])

    def _run(self, x: npt.NDArray[np.float32], ops: Sequence[Op]) -> dict[str, Codes]:
        # QKeras quantizes as x + (q - x), which rounds where |x| is many times |q|. Values beyond twice the
        # threshold saturate alike, so a clip there changes no code.
        bound = 2.0 ** (self.net.input.format.threshold_log2 + 1)
        x = np.clip(x, -bound, bound)
        with _floatx(float_type(self.net)) as keras:
            outputs = {op.name: self.model.get_layer(layer_name(op)).output for op in ops}
            model = keras.Model(self.model.input, outputs)
            batches = [model(x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
        codes = {
            op.name: to_codes(np.concatenate([b[op.name] for b in batches]), self.net.formats[op.name], op.name)
            for op in ops
        }
        if isinstance(self.net.output, Outputs):
            codes[self.net.output.name] = reference.merge(self.net, self.net.output, codes)
        return codes


def _significant_bits(net: QNet, op: Op) -> int:
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
        case AvgPool() | LeakyRelu() | Add():
            return net.formats[op.name].width
        case MaxPool() | Pad() | Upsample() | Flatten() | Concat() | Outputs():
            return 0
        case _:
            assert_never(op)


def _connected(net: QNet, keras: Any, dtype: FloatType) -> Any:
    """The Keras model of all ops, without their constants."""
    tensors: dict[str, Any] = {}
    source = keras.Input(net.input.shape, dtype=dtype, name=f"{net.input.name}_values")
    for op in net.ops:
        if not isinstance(op, Outputs):
            tensors[op.name] = _apply(net, op, tensors, source, keras, dtype)
    outputs = [tensors[op.name] for op in net.outputs]
    return keras.Model(source, outputs if len(outputs) > 1 else outputs[0])


def _apply(net: QNet, op: Op, tensors: dict[str, Any], inputs: Any, keras: Any, dtype: FloatType) -> Any:
    """The Keras tensor of an op."""
    if isinstance(op, Input):
        return _activation(op, _bits_text(op, op.format))(inputs)
    sources = [tensors[name] for name in sources_of(op)]
    layer = _layer(net, op, keras, dtype)
    if isinstance(op, Add | Concat):
        return layer(sources)
    if isinstance(op, Conv | DepthwiseConv) and _padding_name(op, net.shapes[op.source]) is None:
        dims = len(op.padding)
        padding = getattr(keras.layers, f"ZeroPadding{dims}D")(_per_dimension(op.padding), name=f"{op.name}_padding")
        return layer(padding(*sources))
    return layer(*sources)


def _layer(net: QNet, op: Op, keras: Any, dtype: FloatType) -> Any:
    """The Keras layer of an op, but for padding before a convolution."""
    import qkeras

    layers = keras.layers
    match op:
        case Quantize():
            relu = net.formats[op.source].signed and not op.format.signed
            # quantized_relu computes in float32 whatever the model's type; quantized_bits is the same function
            if relu and dtype == "float32":
                return _activation(op, f"quantized_relu({op.format.width},{op.format.threshold_log2})")
            return _activation(op, _bits_text(op, op.format))
        case Dense():
            return qkeras.QDense(op.weight.shape[1], name=op.name, **_quantizers(net, op, "kernel"))
        case Conv():
            kind = qkeras.QConv1D if len(op.stride) == 1 else qkeras.QConv2D
            windows = {"padding": _padding_name(op, net.shapes[op.source]) or "valid", "strides": op.stride}
            return kind(op.weight.shape[-1], kernel_of(op), name=op.name, **windows, **_quantizers(net, op, "kernel"))
        case DepthwiseConv():
            windows = {"padding": _padding_name(op, net.shapes[op.source]) or "valid", "strides": op.stride}
            if len(op.stride) == 1:  # QKeras has none: the values are on their grids anyway
                return layers.DepthwiseConv1D(kernel_of(op), name=op.name, **windows)
            if op.stride[0] != op.stride[1]:
                raise InvalidInput(f"op {op.name!r}: TensorFlow has no depthwise convolution of stride {op.stride}")
            quantizers = _quantizers(net, op, "depthwise")
            return qkeras.QDepthwiseConv2D(kernel_of(op), name=op.name, **windows, **quantizers)
        case Scale():
            return layers.BatchNormalization(epsilon=0, fused=False, name=op.name)
        case MaxPool():
            return getattr(layers, f"MaxPooling{len(op.window)}D")(op.window, op.stride, name=op.name)
        case AvgPool():
            return getattr(layers, f"AveragePooling{len(op.window)}D")(op.window, op.stride, name=op.name)
        case LeakyRelu():
            return layers.LeakyReLU(2.0**-op.shift, name=op.name)
        case Pad():
            return getattr(layers, f"ZeroPadding{len(op.padding)}D")(_per_dimension(op.padding), name=op.name)
        case Upsample():
            return getattr(layers, f"UpSampling{len(op.factor)}D")(_per_dimension(op.factor), name=op.name)
        case Flatten():
            return layers.Flatten(name=op.name)
        case Add():
            return layers.Add(name=op.name)
        case Concat():
            return layers.Concatenate(name=op.name)
        case _:
            raise AssertionError(f"no layer for {op}")


def _per_dimension(values: tuple[Any, ...]) -> Any:
    """Keras takes the one value of one dimension without a tuple around it."""
    return values if len(values) > 1 else values[0]


def _constants(net: QNet, op: Linear) -> list[npt.NDArray[np.float64]]:
    """The weights of an op's Keras layer."""
    weight, bias = op.weight_format.decode(op.weight), net.bias_format(op).decode(op.bias)
    match op:
        case DepthwiseConv():
            return [weight[..., None], bias]
        case Scale():
            return [weight, bias, np.zeros_like(bias), np.ones_like(bias)]  # mean 0, variance 1
        case _:
            return [weight, bias]


def _bits_text(op: Op, format: Fixed) -> str:
    if format.signed and format.width == 1:
        raise InvalidInput(f"op {op.name!r}: QKeras has no signed format of one bit: use two bits or an unsigned one")
    return f"quantized_bits({format.width},{format.threshold_log2},0,{int(format.signed)},1)"


def _activation(op: Op, text: str) -> Any:
    import qkeras

    layer = qkeras.QActivation(text, name=layer_name(op))
    if _is_computable(layer.quantizer.integer):
        return layer
    from hmq_fpga.deploy.qkeras import small as qkeras_small

    return qkeras_small.QActivation(text, name=layer_name(op))


def _quantizers(net: QNet, op: Linear, weight: str) -> dict[str, Any]:
    return {
        f"{weight}_quantizer": _constant_quantizer(op.weight_format),
        "bias_quantizer": _constant_quantizer(net.bias_format(op)),
        f"{weight}_initializer": "zeros",
    }


def _constant_quantizer(format: Fixed) -> Any:
    """The quantizer of constants: of one signed bit, `{-step, 0}`, which QKeras takes for ±1, it has two."""
    import qkeras

    from hmq_fpga.deploy.qkeras import small as qkeras_small

    width = max(format.width, 1 + format.signed)
    integer = width - format.signed - format.frac
    module = qkeras if _is_computable(integer) else qkeras_small
    return module.quantized_bits(width, integer, symmetric=0, keep_negative=int(format.signed), alpha=1)


def _is_computable(integer: int) -> bool:
    """Whether QKeras can compute `2**integer` on int32."""
    return 0 <= integer <= 30


def _padding_name(op: Conv | DepthwiseConv, source: Shape) -> str | None:
    """The name that Keras has for a convolution's padding, if any."""
    if not np.any(op.padding):
        return "valid"
    same = tuple(
        (total // 2, total - total // 2)
        for n, k, s in zip(source, kernel_of(op), op.stride, strict=False)
        for total in [max((-(-n // s) - 1) * s + k - n, 0)]
    )
    return "same" if op.padding == same else None


@contextmanager
def _floatx(dtype: FloatType) -> Iterator[Any]:
    """Keras, with `dtype` as its default type, which QKeras's quantizers cast to; restored afterwards."""
    keras = tensorflow().keras
    before = keras.backend.floatx()
    keras.backend.set_floatx(dtype)
    try:
        yield keras
    finally:
        keras.backend.set_floatx(before)
