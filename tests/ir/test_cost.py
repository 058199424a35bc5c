from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmq_fpga.ir import cost
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, Flatten, Input, MaxPool, Quantize
from hmq_fpga.ir.scheme import Kind, Scheme, Tensor


def tensor(name: str, kind: Kind, bits: int, size: int) -> Tensor:
    return Tensor(name=name, kind=kind, format=Fixed(signed=False, width=bits, frac=0), size=size)


SCHEME = Scheme(
    (
        tensor("input", "input", 8, 100),
        tensor("a.weight", "weight", 2, 300),
        tensor("relu", "activation", 4, 150),
        tensor("b.weight", "weight", 5, 100),
    )
)


def test_weight_rate() -> None:
    assert cost.weight_bits(SCHEME) == 2 * 300 + 5 * 100
    assert cost.weight_rate(SCHEME) == 32 * 400 / 1100


def test_weights_count_by_their_own_widths() -> None:
    format_ = Fixed(signed=True, width=5, frac=0)
    own = Tensor(name="c.weight", kind="weight", format=format_, size=4, widths=np.array([0, 5, 2, 0]))
    assert cost.weight_bits(Scheme((*SCHEME.tensors, own))) == 2 * 300 + 5 * 100 + 7
    assert cost.weight_rate(Scheme((own,))) == 32 * 4 / 7
    none = Tensor(name="c.weight", kind="weight", format=format_, size=4, widths=np.zeros(4, int))
    assert cost.weight_rate(Scheme((none,))) == np.inf


def step(name: str, *sources: str, size: int, holds: Literal["format", "source", "nothing"] = "format") -> cost.Step:
    return cost.Step(name=name, sources=sources, size=size, holds=holds)


def test_activation_rate_of_a_chain_is_set_by_the_costliest_tensor() -> None:
    chain = [
        step("input", size=100),
        step("a", "input", size=150, holds="nothing"),
        step("relu", "a", size=150),
        step("pool", "relu", size=40, holds="source"),
        step("b", "pool", size=10, holds="nothing"),
    ]
    held = cost.moments(chain)
    assert held == [{"input": 100}, {"relu": 150}]
    formats = {name: SCHEME[name].format for name in ("input", "relu")}
    assert (
        cost.activation_rate(held, formats) == 32 * 150 / 800
    )  # relu is the largest, the input's 8 x 100 bits cost most


def test_a_shortcut_is_held_while_its_block_is_computed() -> None:
    block = [
        step("input", size=64),
        step("x", "input", size=50),
        step("small", "x", size=20, holds="source"),  # a pooled x is all that the shortcut keeps
        step("conv1", "small", size=30, holds="nothing"),
        step("relu1", "conv1", size=30),
        step("conv2", "relu1", size=20, holds="nothing"),
        step("quant2", "conv2", size=20),
        step("sum", "quant2", "small", size=20, holds="nothing"),
        step("relu2", "sum", size=20),
    ]
    held = cost.moments(block)
    assert held == [{"input": 64}, {"x": 50}, {"x": 20, "relu1": 30}, {"x": 20, "quant2": 20}, {"relu2": 20}]
    widths = {"input": 2, "x": 8, "relu1": 4, "quant2": 8, "relu2": 8}
    formats = {name: Fixed(signed=False, width=width, frac=0) for name, width in widths.items()}
    assert cost.activation_rate(held, formats) == 32 * 64 / (50 * 8)


def test_layer_costs_of_a_hand_computed_network() -> None:
    act = Fixed(signed=False, width=3, frac=3)
    conv = Conv(
        name="conv",
        source="x",
        weight=np.array([0, 1, -3, 4, 5, -8, 7, 0]).reshape(2, 2, 1, 2),
        weight_format=Fixed(signed=True, width=4, frac=2),
        bias=np.array([-9, 6]),
        stride=(1, 2),
        padding=((1, 0), (0, 1)),
    )
    fc = Dense(
        name="fc",
        source="flat",
        weight=np.array([[2], [0], [0], [-1]]),
        weight_format=Fixed(signed=True, width=3, frac=0),
        bias=np.array([0]),
    )
    net = QNet(
        (
            Input(name="x", shape=(3, 5, 1), format=Fixed(signed=False, width=5, frac=5)),
            conv,  # 4 x 6 padded, 2 x 2 windows with stride (1, 2): 3 x 3 positions
            Quantize(name="q", source="conv", format=act),
            MaxPool(name="pool", source="q", window=(2, 2), stride=(2, 1)),  # 1 x 2 x 2
            Flatten(name="flat", source="pool"),
            fc,
        )
    )
    positions = 9
    significant = 0 + 1 + 2 + 1 + 3 + 1 + 3 + 0  # 3 = 11b, 4 = 1b, 5 = 101b, 8 = 1b, 7 = 111b
    assert cost.layer_costs(net) == (
        cost.LayerCost(
            name="conv",
            macs=8 * positions,
            weight_bits=32,
            bias_bits=2 * 5,  # -9 takes five bits
            zero_weights=0.25,
            bops=8 * positions * 4 * 5,
            ebops=significant * positions * 5,
        ),
        cost.LayerCost(
            name="fc", macs=4, weight_bits=12, bias_bits=1, zero_weights=0.5, bops=4 * 3 * 3, ebops=2 * 1 * 3
        ),
    )


@given(st.integers(-(2**61), 2**61 - 1))
def test_significant_bits_of_any_code(code: int) -> None:
    weight_format = Fixed(signed=True, width=62, frac=0)
    assert weight_format.contains(code)
    expected = len(bin(abs(code))[2:].strip("0"))
    assert cost._significant_bits(np.array([code, 0, code])) == 2 * expected


@pytest.mark.parametrize("code", [2**50 + 1, 2**54 + 1, 2**57 - 1])
def test_significant_bits_where_logarithms_round(code: int) -> None:
    assert cost._significant_bits(np.array([-code])) == code.bit_length()
