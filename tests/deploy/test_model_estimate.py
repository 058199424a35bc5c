from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from hmq_fpga.deploy.rtl.estimate import estimate
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.logic import signed_digits
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Dense, Gather, Input, Maximum, Minimum, Multiply, Op, Subtract, Table
from tests.deploy.networks import Builder
from tests.strategies import qnets


def unsigned(width: int, frac: int = 0) -> Fixed:
    return Fixed(signed=False, width=width, frac=frac)


def signed(width: int, frac: int = 0) -> Fixed:
    return Fixed(signed=True, width=width, frac=frac)


def dense(name: str, source: str, inputs: int) -> Dense:
    weight = np.arange(3 * inputs).reshape(inputs, 3) % 7 - 3
    return Dense(name=name, source=source, weight=weight, weight_format=signed(3), bias=np.zeros(3, np.int64))


def perceptron(bits: int) -> QNet:
    builder = Builder((16,), unsigned(6))
    for i, outputs in enumerate((24, 16)):
        builder.dense(f"fc{i}", outputs, signed(bits)).quantize(f"relu{i}", unsigned(4, -bits - i))
    return builder.dense("fc", 5, signed(bits)).net


def convolution() -> QNet:
    return (
        Builder((8, 8, 1), unsigned(4))
        .conv("conv0", (3, 3), 4, signed(3), padding=((1, 1), (1, 1)))
        .quantize("relu0", unsigned(3, -4))
        .pool("pool", (2, 2))
        .conv("conv1", (2, 2), 4, signed(3))
        .quantize("relu1", unsigned(3, -4))
        .flatten()
        .dense("fc", 4, signed(3))
        .net
    )


@pytest.mark.parametrize("net", [perceptron(2), perceptron(4), convolution()], ids=["two", "four", "convolution"])
def test_it_predicts_what_the_tracer_counts(net, tmp_path):
    traced = RtlProject.create(net, tmp_path / "rtl").trace_resources()
    assert 0.8 < estimate(net).lut / traced.lut < 1.25


def pair(kind: type[Op], *widths: int) -> QNet:
    ops = [Input(name=name, shape=(2,), format=signed(width)) for name, width in zip("ab", widths, strict=True)]
    return QNet((*ops, kind(name="op", sources=("a", "b"))))


def table(width: int, value_bits: int) -> QNet:
    values = np.random.default_rng(0).integers(0, 1 << value_bits, 1 << width)
    op = Table(name="op", source="x", values=values, format=unsigned(value_bits))
    return QNet((Input(name="x", shape=(2,), format=signed(width)), op))


FUNCTIONS = {
    **{kind.__name__: pair(kind, 6, 4) for kind in (Subtract, Maximum, Minimum, Multiply)},
    "wide": pair(Multiply, 8, 7),
    **{f"table{width}": table(width, 6) for width in (3, 6, 8, 10)},
}


@pytest.mark.parametrize("net", FUNCTIONS.values(), ids=FUNCTIONS)
def test_it_predicts_what_the_tracer_counts_for_single_functions(net, tmp_path):
    traced = RtlProject.create(net, tmp_path / "rtl").trace_resources()
    assert 0.7 < estimate(net).lut / traced.lut < 1.45


def test_what_is_not_gathered_costs_nothing():
    net = perceptron(3)
    index, source = np.array([0, 5, 0, -1]), "relu0"
    ops = (*net.ops[:3], Gather(name="some", source=source, index=index), dense("fc", "some", 4))
    kept = np.isin(np.arange(24), index)
    fc0 = replace(net["fc0"], weight=net["fc0"].weight * kept)
    without = (net.ops[0], fc0, *ops[2:])
    assert estimate(QNet(ops)).lut == estimate(QNet(without)).lut < 0.2 * estimate(net).lut


def test_more_weight_bits_and_fewer_zeros_cost_more():
    assert estimate(perceptron(2)).lut < estimate(perceptron(3)).lut < estimate(perceptron(5)).lut
    net = perceptron(4)
    layer = net["fc1"]
    keep = np.random.default_rng(0).random(layer.weight.shape) < 0.5
    sparse = QNet(tuple(replace(op, weight=op.weight * keep) if op is layer else op for op in net.ops), net.outputs)
    assert estimate(sparse).lut < 0.9 * estimate(net).lut


def test_a_neuron_that_is_not_read_or_never_changes_costs_nothing():
    net = perceptron(3)

    def changed(**layers) -> int:
        return estimate(QNet(tuple(replace(op, **layers.get(op.name, {})) for op in net.ops), net.outputs)).lut

    rows = np.arange(24)[:, None] == 3
    unread = changed(fc1={"weight": np.where(rows, 0, net["fc1"].weight)})
    never = changed(fc0={"bias": np.where(rows[:, 0], -100_000, net["fc0"].bias)})
    without = changed(fc0={"weight": net["fc0"].weight * ~rows.T}, fc1={"weight": np.where(rows, 0, net["fc1"].weight)})
    assert unread == never == without < estimate(net).lut


@settings(max_examples=30)
@given(net=qnets())
def test_every_network_has_a_finite_estimate(net):
    resources = estimate(net)
    assert (resources.stage, resources.dsp) == ("model", 0)
    assert resources.lut >= 0


def test_a_matrix_without_additions_costs_its_biases_only():
    wires = Builder((4,), unsigned(3)).net
    layer = {"weight": 2 * np.eye(4, dtype=np.int64), "weight_format": signed(4), "bias": np.zeros(4, np.int64)}
    net = QNet((*wires.ops, Dense(name="wires", source="input", **layer)))
    assert estimate(net).lut <= 2


def test_signed_digits_are_the_fewest():
    fewest = {0: 0}
    for _ in range(4):
        sums = {n + s * (1 << k): d + 1 for n, d in fewest.items() for k in range(8) for s in (-1, 1)}
        fewest = {n: min(sums.get(n, 9), fewest.get(n, 9)) for n in sums.keys() | fewest.keys()}
    codes = np.arange(-100, 100)
    np.testing.assert_array_equal(signed_digits(codes), [fewest[int(n)] for n in codes])
