"""QKeras in the formats and types that its own classes fail at, and layers that neither it nor Keras has.

Importing this module imports TensorFlow.

QKeras 0.9.0 computes `2**integer` on int32, which fails for every negative `integer`, given as a number or a tensor,
eager or traced; so does `quantized_relu` of qkeras-v3. Scaling by a power of two is exact, so these classes let
QKeras quantize with `integer = 0` and scale around it. QKeras also casts to Keras's default type at each call, whatever
the model's type: these classes compute in the type of what they are given, so that a float64 model needs no setting.

The names and configurations of QKeras's are its own, which is what hls4ml reads. A `.keras` file records this module's
name, and Keras 2 imports it by itself where the model is loaded; Keras 3 finds these classes once it is imported.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import qkeras
import tensorflow as tf
from keras.saving import register_keras_serializable

from hmq_fpga.deploy.qkeras.versions import floatx, quantizer_attribute


@register_keras_serializable(package="hmq_fpga")
class quantized_bits(qkeras.quantized_bits):  # type: ignore[misc]
    """`qkeras.quantized_bits` for any `integer`, in float32 and float64."""

    def __call__(self, x: Any) -> Any:
        """Quantize `x`."""
        unit = qkeras.quantized_bits(self.bits, 0, self.symmetric, self.keep_negative, self.alpha)
        return _scaled(unit, 2.0**self.integer, x)


@register_keras_serializable(package="hmq_fpga")
class quantized_relu(qkeras.quantized_relu):  # type: ignore[misc]
    """`qkeras.quantized_relu` for any `integer`, in float32."""

    def __call__(self, x: Any) -> Any:
        """Clip at zero from below, and quantize `x`."""
        return _scaled(qkeras.quantized_relu(self.bits, 0), 2.0**self.integer, x)


@register_keras_serializable(package="hmq_fpga")
class QActivation(qkeras.QActivation):  # type: ignore[misc]
    """`qkeras.QActivation` of a quantizer such as `quantized_relu(4,-3)`, with any `integer`."""

    def __init__(self, activation: Any, **kwargs: Any) -> None:
        super().__init__(activation, **kwargs)
        given: Any = getattr(self, quantizer_attribute())
        cls: Any = quantized_relu if isinstance(given, qkeras.quantized_relu) else quantized_bits
        setattr(self, quantizer_attribute(), cls.from_config(given.get_config()))


@register_keras_serializable(package="hmq_fpga")
class Table(keras.layers.Layer):  # type: ignore[misc]
    """`values[i]` for a value of code `first + i`, whose step is `2**-frac`."""

    def __init__(self, values: Any, first: int, frac: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.values, self.first, self.frac = np.array(values), first, frac

    def call(self, x: Any) -> Any:
        """Look `x` up."""
        return tf.gather(tf.constant(self.values, x.dtype), tf.cast(x * 2.0**self.frac, tf.int32) - self.first)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of what is looked up."""
        return input_shape

    def get_config(self) -> Any:
        """The whole table."""
        return {**super().get_config(), "values": self.values.tolist(), "first": self.first, "frac": self.frac}


@register_keras_serializable(package="hmq_fpga")
class Gather(keras.layers.Layer):  # type: ignore[misc]
    """Values moved: `index`, of the result's shape, counts those of a sample in a row; -1 is the value `fill`."""

    def __init__(self, index: Any, fill: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index, self.fill = np.array(index), fill

    def call(self, x: Any) -> Any:
        """Gather from `x`."""
        values = tf.reshape(x, (-1, np.prod(x.shape[1:])))
        filled = tf.pad(values, [[0, 0], [1, 0]], constant_values=tf.constant(self.fill, x.dtype))
        return tf.gather(filled, self.index + 1, axis=1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the index."""
        return (input_shape[0], *self.index.shape)

    def get_config(self) -> Any:
        """The whole index."""
        return {**super().get_config(), "index": self.index.tolist(), "fill": self.fill}


def _scaled(unit: Any, scale: float, x: Any) -> Any:
    with floatx(getattr(x.dtype, "name", x.dtype)):
        return scale * unit(x / scale)
