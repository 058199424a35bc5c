"""QKeras with thresholds below one: importing this module imports TensorFlow.

QKeras 0.9.0 computes `2**integer` on int32, which fails for every negative `integer`, given as a number or a tensor,
eager or traced. Scaling by a power of two is exact, so these classes let QKeras quantize with `integer = 0` and
scale around it. Their names and configurations are QKeras's own, which is what hls4ml reads. A `.keras` file
records this module's name, and Keras imports it by itself where the model is loaded.
"""

from __future__ import annotations

from typing import Any

import qkeras
import tensorflow as tf


@tf.keras.saving.register_keras_serializable(package="hmq_fpga")
class quantized_bits(qkeras.quantized_bits):  # type: ignore[misc]
    """`qkeras.quantized_bits` for any `integer`."""

    def __call__(self, x: Any) -> Any:
        """Quantize `x`."""
        scale = 2.0**self.integer
        unit = qkeras.quantized_bits(self.bits, 0, self.symmetric, self.keep_negative, self.alpha)
        return scale * unit(x / scale)


@tf.keras.saving.register_keras_serializable(package="hmq_fpga")
class quantized_relu(qkeras.quantized_relu):  # type: ignore[misc]
    """`qkeras.quantized_relu` for any `integer`."""

    def __call__(self, x: Any) -> Any:
        """Clip at zero from below, and quantize `x`."""
        scale = 2.0**self.integer
        return scale * qkeras.quantized_relu(self.bits, 0)(x / scale)


@tf.keras.saving.register_keras_serializable(package="hmq_fpga")
class QActivation(qkeras.QActivation):  # type: ignore[misc]
    """`qkeras.QActivation` of a quantizer in text, such as `quantized_relu(4,-3)`, with any `integer`."""

    def __init__(self, activation: str, **kwargs: Any) -> None:
        super().__init__(activation, **kwargs)
        given: Any = self.quantizer  # type: ignore[has-type]
        cls: Any = quantized_relu if isinstance(given, qkeras.quantized_relu) else quantized_bits
        self.quantizer = cls.from_config(given.get_config())
