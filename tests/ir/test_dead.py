"""Channels that no sample activates are taken out, and nothing else changes."""

import numpy as np
import pytest

from hmq_fpga.ir import logic, reference
from hmq_fpga.ir.dead import without_dead
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Add, Conv, Dense, Flatten, Input, MaxPool, Quantize

INPUT, RELU, WEIGHT = (
    Fixed(signed=False, width=4, frac=2),
    Fixed(signed=False, width=3, frac=1),
    Fixed(signed=True, width=4, frac=2),
)


def dense(rng, name, source, n, m, bias=None):
    bias = rng.integers(-20, 20, m) if bias is None else bias
    return Dense(name=name, source=source, weight=rng.integers(-8, 8, (n, m)), bias=bias, weight_format=WEIGHT)


def mlp(seed: int = 0) -> QNet:
    """Its hidden channels 1 and 4 are zero for inputs below one, and alive for others."""
    rng = np.random.default_rng(seed)
    first = dense(rng, "fc1", "x", 3, 6)
    first.bias[:] = 20
    first.weight[:, [1, 4]], first.bias[[1, 4]] = 2, -8 * 3
    return QNet(
        (
            Input(name="x", shape=(3,), format=INPUT),
            first,
            Quantize(name="relu", source="fc1", format=RELU),
            dense(rng, "fc2", "relu", 6, 2),
        )
    )


def small_inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, shape).astype(np.float32) / 4


def test_outputs_are_the_same_and_logic_is_less():
    net, x = mlp(), small_inputs(200, 3)
    smaller, lost = without_dead(net, [x[:50], x[50:]])
    assert lost == {"relu": 2}
    np.testing.assert_array_equal(reference.run(smaller, x), reference.run(net, x))
    assert logic.luts(smaller) < 0.8 * logic.luts(net)
    assert not smaller["fc1"].weight[:, [1, 4]].any() and not smaller["fc2"].weight[[1, 4]].any()
    kept = [0, 2, 3, 5]
    np.testing.assert_array_equal(smaller["fc1"].weight[:, kept], net["fc1"].weight[:, kept])
    np.testing.assert_array_equal(smaller["fc2"].weight[kept], net["fc2"].weight[kept])


def test_what_one_sample_activates_stays():
    net, x = mlp(), small_inputs(200, 3)
    smaller, lost = without_dead(net, [x, np.full((1, 3), 3.75, np.float32)])
    assert lost == {} and smaller.digest == net.digest


def test_channels_are_followed_through_pooling_and_flattening():
    rng = np.random.default_rng(0)
    conv = Conv(
        name="conv",
        source="x",
        weight=rng.integers(-8, 8, (3, 1, 4)),
        bias=np.array([0, -500, 9, 3]),
        weight_format=WEIGHT,
        padding=((1, 1),),
        stride=(1,),
    )
    conv.weight[:, :, 1] = 7
    net = QNet(
        (
            Input(name="x", shape=(8, 1), format=Fixed(signed=False, width=8, frac=2)),
            conv,
            Quantize(name="relu", source="conv", format=RELU),
            MaxPool(name="pool", source="relu", window=(2,), stride=(2,)),
            Flatten(name="flat", source="pool"),
            dense(rng, "fc", "flat", 16, 2),
        )
    )
    x = small_inputs(100, 8, 1)
    smaller, lost = without_dead(net, [x])
    assert lost == {"relu": 1}
    np.testing.assert_array_equal(reference.run(smaller, x), reference.run(net, x))
    assert not smaller["fc"].weight[1::4].any()


def test_sums_that_something_else_reads_stay():
    rng = np.random.default_rng(0)
    first = dense(rng, "fc1", "x", 3, 4, bias=np.full(4, -500))
    net = QNet(
        (
            Input(name="x", shape=(3,), format=INPUT),
            first,
            Quantize(name="relu", source="fc1", format=RELU),
            Quantize(name="wide", source="fc1", format=Fixed(signed=True, width=12, frac=1)),
            Add(name="sum", sources=("relu", "wide")),
        )
    )
    smaller, lost = without_dead(net, [small_inputs(50, 3)])
    assert lost == {} and smaller.digest == net.digest


@pytest.mark.parametrize("seed", range(10))
def test_any_network_keeps_its_outputs(seed):
    rng = np.random.default_rng(seed)
    net = QNet(
        (
            Input(name="x", shape=(3,), format=INPUT),
            dense(rng, "fc1", "x", 3, 8),
            Quantize(name="r1", source="fc1", format=RELU),
            dense(rng, "fc2", "r1", 8, 8),
            Quantize(name="r2", source="fc2", format=RELU),
            dense(rng, "fc3", "r2", 8, 3),
        )
    )
    x = rng.integers(0, 16, (4, 3)).astype(np.float32) / 4
    smaller, lost = without_dead(net, [x])
    assert lost
    np.testing.assert_array_equal(reference.run(smaller, x), reference.run(net, x))
