"""Inputs made from BatchNorms' statistics, and bit-widths by what they change for these."""

import itertools

import pytest
import torch
from torch import nn

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.methods.widths import cheapest
from hmq_fpga.search.methods.zeroq import ZeroqOptions, distance, distil, mismatch
from hmq_fpga.search.quantizers import Grid
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Bound, Target
from hmq_fpga.search.train import Budget, Task


class Unread(Task):
    """A task whose data nobody may read."""

    def __getattribute__(self, name):
        assert name not in ("x_train", "y_train", "x_val", "y_val", "regression", "input_signed")
        return super().__getattribute__(name)


@pytest.fixture
def unread(digits):
    return Unread(x_train=digits.x_train, y_train=digits.y_train, x_val=digits.x_val, y_val=digits.y_val)


@pytest.fixture
def read(mlp):
    return instrument(mlp, (64,), input_signed=False)


@pytest.mark.parametrize("target", [Target(weight_rate=8), Target(luts=2000)])
def test_no_data_are_read(target, unread, read):
    _, scheme, history = find_scheme(read, unread, Budget(), target, method="zeroq")
    assert scheme.found_by["method"] == "zeroq"
    assert history["statistics_error"][-1] < history["statistics_error"][0] / 10


def test_statistics_come_to_be_the_stored_ones(read):
    made = [distil(read, ZeroqOptions(steps=steps), seed=0)[0] for steps in (0, 500)]
    before, after = (float(mismatch(read, x).detach()) for x in made)
    assert after < before / 10
    assert made[1].min() >= 0  # digits are


def test_the_optimum_of_a_linear_network_is_found():
    """A BatchNorm of the input itself: the samples must have its mean and deviation."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[0].running_mean.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
    model[0].running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
    x = distil(instrument(model.eval(), (4,)), ZeroqOptions(), seed=0)[0]
    torch.testing.assert_close(x.mean(0), model[0].running_mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), model[0].running_var.sqrt(), atol=1e-2, rtol=0)


def test_normalized_inputs_are_asked_for():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():  # as of normal inputs
        model[1].running_mean.copy_(model[0].bias)
        model[1].running_var.copy_(model[0].weight.square().sum(1))
    read = instrument(model, (4,))
    x = distil(read, ZeroqOptions(normalized=True), seed=0)[0]

    @torch.no_grad()
    def asked(x):
        return float(mismatch(read, x, normalized=True) - mismatch(read, x))

    assert asked(x) < 1e-3
    assert asked(5 * x + 3) == pytest.approx(3**2 + 4**2, rel=1e-2)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_distance_is_none_in_floats_and_falls_with_bits(kind, read):
    x = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
    assert distance(read, x, {}, kind) == 0
    name = next(iter(read.weights))
    formats = [Fixed.from_threshold(signed=True, bits=bits, threshold_log2=0) for bits in (2, 4, 8)]
    far = [distance(read, x, {name: Grid.of(f)}, kind) for f in formats]
    assert far == sorted(far, reverse=True)
    assert far[-1] > 0


def test_distance_is_the_divergence_of_probabilities(read):
    x = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
    grids = {name: Grid.of(Fixed.from_threshold(signed=True, bits=3, threshold_log2=0)) for name in read.weights}
    with torch.no_grad():
        p, q = (read(x, grids=on).double().softmax(1) for on in ({}, grids))
    expected = (p * (p.log() - q.log())).sum(1).mean()
    assert distance(read, x, grids, "kl") == pytest.approx(expected.item())


def test_a_single_score_tells_two_classes_apart():
    read = instrument(nn.Sequential(nn.Linear(4, 1)), (4,))
    x = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    grids = {name: Grid.of(Fixed.from_threshold(signed=True, bits=2, threshold_log2=0)) for name in read.weights}
    with torch.no_grad():
        p, q = (read(x, grids=on).double().sigmoid() for on in ({}, grids))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert distance(read, x, grids, "kl") == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_bit_widths_are_those_of_trying_all(unit):
    """Four layers of three widths, also where divergences are tiny."""
    random = torch.Generator().manual_seed(0)
    bits, sizes = (2, 4, 8), {"a": 100.0, "b": 30.0, "c": 200.0, "d": 10.0}
    costs = {
        name: dict(zip(bits, sorted((unit * torch.rand(3, generator=random)).tolist(), reverse=True), strict=True))
        for name in sizes
    }
    formats = {b: Fixed.from_threshold(signed=True, bits=b, threshold_log2=0) for b in bits}
    bound = Bound(name="bits", prices=sizes, most=1700)
    found = cheapest(dict.fromkeys(sizes, formats), costs, [bound])
    tried = (dict(zip(sizes, chosen, strict=True)) for chosen in itertools.product(bits, repeat=4))
    kept = [chosen for chosen in tried if bound.most / 1.1 <= bound.cost(chosen) <= bound.most]
    best = min(kept, key=lambda chosen: sum(costs[name][b] for name, b in chosen.items()))
    assert {name: f.width for name, f in found.items()} == best


def test_a_network_without_batchnorm_is_refused(digits):
    read = instrument(nn.Sequential(nn.Linear(64, 10)), (64,))
    with pytest.raises(InvalidInput, match="statistics of BatchNorms, and the model has none"):
        find_scheme(read, digits, Budget(), Target(), method="zeroq")
