"""What is known to stop HLS is said of a network and its settings, with a setting that avoids it."""

from dataclasses import replace

import pytest

from hmq_fpga.deploy.hls.limits import REGISTERS, limits, valid_reuse_factors
from hmq_fpga.deploy.settings import Hardware, LayerSettings
from hmq_fpga.ir.network import QNet
from tests.deploy.networks import Builder, scheme

EIGHT = scheme(signed=True, bits=8, m=0)


def dense(outputs: int, *, inputs: int = 64):
    return Builder((inputs,), EIGHT).dense("fc", outputs, EIGHT).net


def test_reuse_factors_are_hls4ml_s():
    from hls4ml.backends import get_backend

    backend = get_backend("Vitis")
    for inputs, outputs in ((6, 8), (64, 65), (1, 5), (12, 1), (30, 7)):
        assert valid_reuse_factors(inputs, outputs) == backend.get_valid_reuse_factors(inputs, outputs)


def test_multiplications_of_one_loop():
    assert limits(dense(64), Hardware(), {}) == []
    (line,) = limits(dense(65), Hardware(), {})
    assert line.startswith("fc: 4,160 multiplications of one unrolled loop by strategy Latency")
    assert line.endswith("strategy Resource with a reuse factor of 2 or more")
    assert (
        len(limits(dense(65), Hardware(reuse_factor=2), {"fc": 2})) == 1
    )  # which strategy Latency unrolls all the same
    assert limits(dense(65), Hardware(strategy="Resource", reuse_factor=2), {"fc": 2}) == []
    assert limits(dense(65), Hardware(strategy="distributed_arithmetic"), {}) == []
    own = {"fc": LayerSettings(strategy="Resource", reuse_factor=4)}
    assert limits(dense(65), Hardware(layers=own), {"fc": 4}) == []
    (line,) = limits(dense(1024), Hardware(strategy="Resource", reuse_factor=2), {"fc": 2})
    assert "32,768 multiplications" in line and line.endswith("a reuse factor of 16 or more")
    assert limits(dense(65), Hardware(backend="Quartus"), {}) == []


@pytest.mark.parametrize("side", [32, 33])
def test_arrays_of_registers(side):
    net = Builder((side, side, 1), EIGHT).conv("conv", (1, 1), 4, EIGHT).quantize("relu", EIGHT).flatten().net
    lines = limits(net, Hardware(), {})
    assert [line.split(":")[0] for line in lines] == (["conv", "relu"] if side * side * 4 > REGISTERS else [])
    assert all(line.endswith("--io-type io_stream") for line in lines)
    assert limits(net, Hardware(io_type="io_stream"), {}) == []


def test_a_reuse_factor_that_hls4ml_changed(mlp):
    lines = limits(mlp, Hardware(reuse_factor=5), {"fc1": 6, "fc2": 5})
    assert lines == ["fc1: reuse factor 6, the nearest to 5 that divides its work"]


def test_limits_are_of_what_hls4ml_is_given():
    """To hls4ml a convolution in groups multiplies by the zeros between them, too."""
    net = Builder((3, 3, 96), EIGHT).conv("conv", (1, 1), 64, EIGHT).net
    halves = replace(net["conv"], weight=net["conv"].weight[:, :, :48], groups=2)
    (line,) = limits(QNet((net.input, halves)), Hardware(), {})
    assert line.startswith("conv: 6,144 multiplications")
