"""Thresholds of least squared error against trying all, and how reluctantly they follow."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmq_fpga.ir import cost
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.methods.msqe import Follower, MsqeOptions, squared_errors, without_outliers
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget


def fixed(bits, threshold_log2=0):
    return Fixed.from_threshold(signed=True, bits=bits, threshold_log2=threshold_log2)


def least(weight, bits, importance=1.0):
    """By exhaustive search over 60 octaves, in double precision and with the formats' own arithmetic."""

    def error(m):
        format_ = fixed(bits, m)
        quantized = torch.from_numpy(format_.decode(format_.encode(weight.numpy())))
        return float(((quantized - weight.double()).square() * importance).sum())

    return min(error(m) for m in range(-30, 31))


@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["normal", "heavy", "uniform", "two values"]),
    st.integers(-10, 10),
)
def test_least_error_is_that_of_trying_all(seed, bits, kind, octave):
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(200, generator=random)
    draws = {
        "normal": normal,
        "heavy": normal / torch.rand(200, generator=random).clamp(min=0.02),
        "uniform": 2 * torch.rand(200, generator=random) - 1,
        "two values": normal.sign(),
    }
    weight = draws[kind] * 2.0**octave
    errors = squared_errors(weight, fixed(bits))
    assert min(errors.values()) == pytest.approx(least(weight, bits), rel=1e-4, abs=1e-30)
    importance = torch.rand(200, generator=random)
    errors = squared_errors(weight, fixed(bits), importance)
    assert min(errors.values()) == pytest.approx(least(weight, bits, importance), rel=1e-4, abs=1e-30)


def test_outliers_do_not_drag():
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0)) / 20
    plain = squared_errors(weight, fixed(4))
    weight[:4] = 8.0
    assert without_outliers(weight).nonzero().numel() == 4000 - 4
    robust, dragged = squared_errors(weight, fixed(4), without_outliers(weight)), squared_errors(weight, fixed(4))
    best, ours, theirs = (min(errors, key=errors.get) for errors in (plain, robust, dragged))
    assert best == ours < theirs


def test_nothing_of_importance_is_all_alike():
    weight = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert squared_errors(weight, fixed(4), torch.zeros(100)) == squared_errors(weight, fixed(4))


def test_a_follower_waits():
    weight = torch.rand(100, generator=torch.Generator().manual_seed(0)) / 2
    follower = Follower(fixed(4, 3), MsqeOptions(patience=3))
    seen = []
    for look in (weight, weight, 16 * weight, weight, weight, weight, weight):
        follower.look(look)
        seen.append(follower.format.threshold_log2)
    assert seen == [3, 3, 3, 3, 3, -1, -1]
    assert follower.format.width == 4


def test_a_margin_keeps_a_threshold():
    weight = torch.linspace(-1, 1, 1001)
    errors = squared_errors(weight, fixed(3))
    best = min(errors, key=errors.get)
    other = min((m for m in errors if m != best), key=errors.get)
    gain = 1 - errors[best] / errors[other]
    for margin, expected in ((gain / 2, best), ((1 + gain) / 2, other)):
        follower = Follower(fixed(3, other), MsqeOptions(patience=1, margin=margin))
        follower.look(weight)
        assert follower.format.threshold_log2 == expected


def test_importance_is_a_running_mean():
    follower = Follower(fixed(4, 3), MsqeOptions(robust="gradient", patience=1))
    weight = torch.cat([torch.full((10,), 4.0), torch.linspace(-0.2, 0.2, 90)])
    follower.feel(torch.cat([torch.zeros(10), torch.ones(90)]))
    follower.look(weight)
    assert follower.format.threshold_log2 < 0
    follower.feel(torch.cat([torch.ones(10), torch.zeros(90)]))
    follower.look(weight)
    assert follower.format.threshold_log2 > 1


def test_thresholds_follow_until_they_are_frozen(mlp, digits):
    """Weights that learn fast outgrow theirs; by the gradient the large ones matter less."""
    target, budget = Target(weight_rate=10), Budget(search_steps=60, learning_rate=1e-1)

    def formats(**options):
        read = instrument(copy.deepcopy(mlp), digits.input_shape, input_signed=False)
        options = {"every": 1, "patience": 1, "margin": 0, **options}
        _, scheme, _ = find_scheme(read, digits, budget, target, method="msqe", options=options)
        return [scheme[name].format for name in read.weights]

    frozen, moving, felt = formats(freeze=1), formats(freeze=0), formats(freeze=0, robust="gradient")
    assert [f.width for f in frozen] == [f.width for f in moving] == [f.width for f in felt]
    assert [f.threshold_log2 for f in frozen] != [f.threshold_log2 for f in moving]
    assert [f.threshold_log2 for f in felt] != [f.threshold_log2 for f in moving]


def test_one_width_for_all(mlp, digits):
    for method in ("msqe", "pot_gradient"):
        read = instrument(mlp, digits.input_shape, input_signed=False)
        target, options = Target(weight_rate=9), {"widths": "uniform"}
        _, scheme, _ = find_scheme(read, digits, Budget(search_steps=20), target, method=method, options=options)
        assert {scheme[name].format.width for name in read.weights} == {3}
        assert cost.weight_rate(scheme) >= 9
        with pytest.raises(InvalidInput, match="one bit-width for all weights: leave out tensor_bits"):
            own = Target(weight_rate=8, tensor_bits={"*": (3, 4)})
            find_scheme(read, digits, Budget(search_steps=20), own, method=method, options=options)
