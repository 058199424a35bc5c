import numpy as np
import pytest

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import Conv2d, Dense, Flatten, Input, MaxPool2d, QNet, Quantize


def scheme(*, signed: bool, bits: int, m: int) -> Fixed:
    return Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=m)


class Builder:
    """Chains ops with random codes."""

    def __init__(self, shape, format_, seed=0):
        self.ops = [Input(name="input", shape=shape, format=format_)]
        self.rng = np.random.default_rng(seed)

    @property
    def net(self):
        return QNet(tuple(self.ops))

    def _add(self, op, name, **fields):
        self.ops.append(op(name=name, source=self.ops[-1].name, **fields))
        return self

    def _linear(self, op, name, shape, format_, bias, **fields):
        weight = self.rng.integers(format_.lo, format_.hi, shape, endpoint=True)
        biases = self.rng.integers(-bias, bias, shape[-1], endpoint=True)
        return self._add(op, name, weight=weight, weight_format=format_, bias=biases, **fields)

    def dense(self, name, outputs, format_, *, bias=40):
        return self._linear(Dense, name, (self.net.shapes[self.ops[-1].name][-1], outputs), format_, bias)

    def conv(self, name, kernel, filters, format_, *, stride=(1, 1), padding=((0, 0), (0, 0)), bias=40):
        shape = (*kernel, self.net.shapes[self.ops[-1].name][-1], filters)
        return self._linear(Conv2d, name, shape, format_, bias, stride=stride, padding=padding)

    def quantize(self, name, format_):
        return self._add(Quantize, name, format=format_)

    def pool(self, name, window, stride=None):
        return self._add(MaxPool2d, name, window=window, stride=stride or window)

    def flatten(self, name="flat"):
        return self._add(Flatten, name)


@pytest.fixture(scope="session")
def mlp() -> QNet:
    """Negative thresholds, a threshold beyond the width, 1-bit weights, no bias, and a signed activation."""
    return (
        Builder((6,), scheme(signed=True, bits=5, m=0))
        .dense("fc1", 8, scheme(signed=True, bits=3, m=-3))
        .quantize("relu1", scheme(signed=False, bits=4, m=-1))
        .dense("fc2", 7, scheme(signed=True, bits=3, m=0))
        .quantize("identity2", scheme(signed=True, bits=5, m=0))
        .dense("fc3", 6, scheme(signed=True, bits=1, m=-2), bias=0)
        .quantize("relu3", scheme(signed=False, bits=4, m=-1))
        .dense("fc4", 4, scheme(signed=True, bits=3, m=6))
        .net
    )


@pytest.fixture(scope="session")
def cnn() -> QNet:
    """Every kind of padding, strides, pooling that drops a row, a 1 x 1 convolution, and an unsigned input."""
    return (
        Builder((9, 8, 2), scheme(signed=False, bits=4, m=0))
        .conv("same", (3, 3), 3, scheme(signed=True, bits=3, m=-1), padding=((1, 1), (1, 1)))
        .quantize("relu1", scheme(signed=False, bits=4, m=2))
        .pool("pool", (2, 2))
        .conv("uneven", (2, 3), 3, scheme(signed=True, bits=2, m=0), padding=((1, 0), (2, 1)))
        .quantize("identity2", scheme(signed=True, bits=5, m=0))
        .conv("strided", (2, 2), 4, scheme(signed=True, bits=4, m=-2), stride=(2, 2))
        .quantize("relu3", scheme(signed=False, bits=3, m=1))
        .conv("pointwise", (1, 1), 2, scheme(signed=True, bits=1, m=1), bias=3)
        .quantize("relu4", scheme(signed=False, bits=3, m=3))
        .flatten()
        .dense("fc", 3, scheme(signed=True, bits=4, m=0))
        .net
    )


@pytest.fixture(scope="session")
def samples():
    """Inputs of a network: anywhere, half-way between two codes, and eight times too large."""

    def draw(net: QNet, count: int = 100) -> np.ndarray:
        rng = np.random.default_rng(0)
        format_, shape = net.input.format, (count, *net.input.shape)
        anywhere = rng.normal(scale=2.0**format_.threshold_log2, size=shape)
        ties = rng.integers(2 * format_.lo - 3, 2 * format_.hi + 3, shape, endpoint=True) * format_.step / 2
        return np.concatenate([anywhere, ties, 8 * anywhere]).astype(np.float32)

    return draw
