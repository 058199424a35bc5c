import numpy as np
import pytest

from hmq_fpga.ir.network import QNet
from tests.deploy.networks import Builder, scheme


@pytest.fixture(scope="session")
def mlp() -> QNet:
    """Negative thresholds, a threshold beyond the width, 1-bit weights, no bias, and a signed activation.

    (The seeds of the two make networks whose outputs differ for most inputs.)
    """
    return (
        Builder((6,), scheme(signed=True, bits=5, m=0), seed=1)
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
        Builder((9, 8, 2), scheme(signed=False, bits=4, m=0), seed=44)
        .conv("same", (3, 3), 3, scheme(signed=True, bits=3, m=-1), padding=((1, 1), (1, 1)))
        .quantize("relu1", scheme(signed=False, bits=4, m=2))
        .pool("pool", (2, 2))
        .conv("uneven", (2, 3), 3, scheme(signed=True, bits=2, m=0), padding=((1, 0), (2, 1)))
        .quantize("identity2", scheme(signed=True, bits=4, m=2))
        .conv("strided", (2, 2), 4, scheme(signed=True, bits=4, m=-2), stride=(2, 2))
        .quantize("relu3", scheme(signed=False, bits=3, m=1))
        .conv("pointwise", (1, 1), 2, scheme(signed=True, bits=1, m=1), bias=3)
        .quantize("relu4", scheme(signed=False, bits=3, m=3))
        .flatten()
        .dense("fc", 3, scheme(signed=True, bits=4, m=0))
        .net
    )


@pytest.fixture(scope="session")
def heads() -> QNet:
    """Three outputs of different shapes and grids: an image, logits, and a quantized pair that is not negative."""
    trunk = Builder((4, 3, 2), scheme(signed=True, bits=5, m=1), seed=5).conv(
        "conv", (3, 3), 3, scheme(signed=True, bits=4, m=-1), padding=((1, 1), (1, 1))
    )
    trunk.quantize("relu", scheme(signed=False, bits=4, m=1))
    trunk.conv("mask", (1, 1), 2, scheme(signed=True, bits=3, m=1))
    trunk.flatten("flat", source="relu").dense("logits", 4, scheme(signed=True, bits=4, m=-2))
    trunk.dense("pair", 2, scheme(signed=True, bits=3, m=0), source="flat")
    trunk.quantize("positive", scheme(signed=False, bits=3, m=3))
    return QNet(tuple(trunk.ops), ("mask", "logits", "positive"))


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
