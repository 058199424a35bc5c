"""The gradient of learned thresholds against the formula and finite differences, and how they settle."""

import math

import pytest
import torch
from torch import nn

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.methods.pot_gradient import Thresholds
from hmq_fpga.search.quantizers import Grid, fake_quantize
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget

FORMATS = [
    Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=m)
    for signed in (True, False)
    for bits in (1, 2, 4, 8)
    for m in (-3, 0, 2)
]


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_grids_are_the_formats(format_):
    thresholds = Thresholds({"x": format_}, turns=4)
    assert thresholds.grids()["x"].values == Grid.of(format_)
    assert thresholds.formats() == {"x": format_}


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_gradient_of_a_threshold(format_):
    """Against `t ln 2` times the derivative with respect to t: of the formula, and of differences with the rounding
    residue held, which is what straight-through means."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).double() * 2.0**format_.threshold_log2
    upstream = torch.randn(500, generator=torch.Generator().manual_seed(1)).double()
    thresholds = Thresholds({"x": format_}, turns=4).double()
    thresholds.unit = thresholds.unit.double()
    (fake_quantize(x, thresholds.grids()["x"]) * upstream).sum().backward()

    t, step = 2.0**format_.threshold_log2, format_.step
    code = torch.round(x / step)
    by_step = torch.where(code > format_.hi, float(format_.hi), torch.where(code < format_.lo, float(format_.lo), 0))
    inside = (code >= format_.lo) & (code <= format_.hi)
    by_step = torch.where(inside, code - x / step, by_step)
    formula = (upstream * by_step).sum() * step * math.log(2)

    def smooth(threshold):
        at, residue = step * threshold / t, code - x / step
        level = (x / at + residue) * at
        return torch.where(inside, level, by_step * at)

    h = 1e-6 * t
    differences = (upstream * (smooth(t + h) - smooth(t - h))).sum() / (2 * h) * t * math.log(2)
    assert thresholds.log2.grad.item() == pytest.approx(formula.item(), rel=1e-5)
    assert thresholds.log2.grad.item() == pytest.approx(differences.item(), rel=1e-4)


def test_thresholds_keep_their_limits():
    thresholds = Thresholds({"x": FORMATS[3], "y": FORMATS[3]}, {"y": -2}, turns=4)
    with torch.no_grad():
        thresholds.log2.fill_(5.5)
    thresholds.settle()
    assert [f.threshold_log2 for f in thresholds.formats().values()] == [6, -2]


def test_what_turns_too_often_stays():
    """One goes to and fro, one only up; the first stays where it mostly was."""
    start = Fixed.from_threshold(signed=True, bits=4, threshold_log2=0)
    thresholds = Thresholds({"to and fro": start, "up": start}, turns=3)
    for step in range(60):
        with torch.no_grad():
            thresholds.log2[0] = 0.2 if step % 10 == 0 else -0.3
            thresholds.log2[1] = -0.5 + step / 10
        thresholds.settle()
    assert thresholds.stays[0] == 0
    assert thresholds.stays[1].isnan()
    sum(grid.tensor[0] for grid in thresholds.grids().values()).backward()
    assert thresholds.log2.grad[0] == 0
    assert thresholds.log2.grad[1] != 0
    assert [f.threshold_log2 for f in thresholds.formats().values()] == [0, 6]


@pytest.mark.parametrize("start", [-4, 4])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_thresholds_learn_the_least_error(start, scale):
    """However large the gradient is, and from either side."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    formats = [Fixed.from_threshold(signed=True, bits=3, threshold_log2=m) for m in range(-6, 7)]
    errors = [float((fake_quantize(x, Grid.of(f)) - x).square().sum()) for f in formats]
    best = formats[errors.index(min(errors))].threshold_log2
    thresholds = Thresholds({"x": Fixed.from_threshold(signed=True, bits=3, threshold_log2=start)}, turns=4)
    optimizer = torch.optim.Adam(thresholds.parameters(), 3e-2)
    for _ in range(400):
        thresholds.settle()
        optimizer.zero_grad()
        (scale * (fake_quantize(x, thresholds.grids()["x"]) - x).square().mean()).backward()
        optimizer.step()
    assert abs(thresholds.formats()["x"].threshold_log2 - best) <= 1


def test_thresholds_learn(mlp, digits):
    def thresholds(rate):
        read = instrument(mlp, digits.input_shape, input_signed=False)
        options = {"learning_rate": rate}
        budget, target = Budget(search_steps=100), Target(weight_rate=10)
        _, scheme, _ = find_scheme(read, digits, budget, target, method="pot_gradient", options=options)
        return [scheme[name].format for name in scheme]

    still, learned = thresholds(1e-9), thresholds(2e-1)
    assert [f.width for f in still] == [f.width for f in learned]
    assert [f.threshold_log2 for f in still] != [f.threshold_log2 for f in learned]


def test_a_clip_bounds_its_threshold(digits):
    torch.manual_seed(0)
    read = instrument(nn.Sequential(nn.Linear(64, 16), nn.ReLU6(), nn.Linear(16, 10)), (64,), input_signed=False)
    budget, options = Budget(search_steps=40), {"learning_rate": 1.0}
    _, scheme, _ = find_scheme(read, digits, budget, Target(), method="pot_gradient", options=options)
    (clip,) = (scheme[site.name] for site in read.sites if site.kind == "activation")
    assert clip.format.threshold_log2 <= 3
