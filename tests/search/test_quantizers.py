import math

import numpy as np
import pytest
import torch

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.calibrate import least_error_format
from hmq_fpga.search.quantizers import (
    HMQ,
    Grid,
    TrainedGrid,
    TrainedGrids,
    fake_quantize,
    fake_quantize_all,
    initial_gap,
    least_threshold_log2,
    quantized_linear,
)

FORMATS = [
    Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=m)
    for signed in (True, False)
    for bits in (1, 2, 3, 8)
    for m in (-6, 0, 5)
]


def trained_grid(tensor: torch.Tensor) -> TrainedGrid:
    return TrainedGrid(tensor, Grid(*tensor.tolist()))


def grid_of(step: torch.Tensor, threshold: torch.Tensor, signed: bool) -> TrainedGrid:
    return trained_grid(torch.stack((step, -threshold if signed else torch.zeros_like(threshold), threshold - step)))


def plain(x: torch.Tensor, grid: TrainedGrid) -> torch.Tensor:
    """The quantizer as autograd differentiates it: the oracle of the fused one."""
    step, lo, hi = grid.tensor.unbind()
    scaled = x / step
    level = (scaled + (torch.round(scaled) - scaled).detach()) * step
    return torch.where(level > hi, hi, torch.where(level < lo, lo, level))


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_fake_quantize_is_the_format(format_):
    x = np.random.default_rng(0).normal(size=1000) * 2.0 ** (format_.threshold_log2 + 1)
    ties = (np.arange(-20, 20) + 0.5) * format_.step
    x = np.concatenate([x, ties]).astype(np.float32)
    expected = format_.decode(format_.encode(x))
    frozen = Grid.of(format_)
    trained = trained_grid(torch.tensor(frozen))
    for grid in (frozen, trained):
        np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), grid).numpy(), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_of_step_and_threshold(signed):
    """Against central differences of the quantizer with its rounding residue held: what straight-through means."""
    x = (torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5).requires_grad_()
    step, threshold = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.23, 1.1))
    upstream = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (fake_quantize(x, grid_of(step, threshold, signed)) * upstream).sum().backward()

    scaled = (x / step).detach()
    residue, level = torch.round(scaled) - scaled, (torch.round(scaled) * step).detach()
    above, below = level > 1.1 - 0.23, level < (-1.1 if signed else 0.0)

    def surrogate(step_: float, threshold_: float) -> float:
        values = x.detach() + residue * step_
        values[above], values[below] = threshold_ - step_, -threshold_ if signed else 0.0
        return float((values * upstream).sum())

    h = 1e-7
    by_step = (surrogate(0.23 + h, 1.1) - surrogate(0.23 - h, 1.1)) / (2 * h)
    by_threshold = (surrogate(0.23, 1.1 + h) - surrogate(0.23, 1.1 - h)) / (2 * h)
    assert float(step.grad) == pytest.approx(by_step, abs=1e-5)
    assert float(threshold.grad) == pytest.approx(by_threshold, abs=1e-5)


@pytest.mark.parametrize("shape", [(7,), (64, 16), (4, 3, 5, 6)])
@pytest.mark.parametrize("signed", [True, False])
def test_fused_quantizer_equals_the_plain_one(shape, signed):
    """Values and all gradients; the upstream gradient's layout does not matter."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    step, threshold = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.21, 1.3))
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).t() if len(shape) == 2 else None
    results = []
    for quantize in (fake_quantize, plain):
        y = quantize(x, grid_of(step, threshold, signed))
        loss = y.sum() if upstream is None else (y.t() * upstream).sum()
        results.append((y, *torch.autograd.grad(loss, (x, step, threshold))))
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_at_ties_are_those_of_the_levels(signed):
    """Constant grids, whose levels are exact: the ends of the range, where the even level is the nearest."""
    for bits in (1, 2, 3, 8):
        grid = Grid.of(Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=1))
        halves = torch.arange(grid.lo - 4 * grid.step, grid.hi + 4 * grid.step, grid.step / 2)
        towards = [torch.nextafter(halves, torch.tensor(end)) for end in (-math.inf, math.inf)]
        x = torch.cat((halves, *towards)).requires_grad_()
        (gradient,) = torch.autograd.grad(fake_quantize(x, grid).sum(), x)
        level = torch.round(x.detach() / grid.step) * grid.step
        np.testing.assert_array_equal(gradient, ((level >= grid.lo) & (level <= grid.hi)).float())


@pytest.mark.parametrize("trained", [True, False])
def test_relu_in_the_quantizer_is_relu_before_it(trained):
    constant = Grid.of(Fixed.from_threshold(signed=False, bits=3, threshold_log2=0))
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    tensor = torch.tensor([0.13, 0, 0.9], requires_grad=True)
    grid, sources = (trained_grid(tensor), (x, tensor)) if trained else (constant, (x,))
    results = [
        (y, *torch.autograd.grad((y * upstream).sum(), sources))
        for y in (fake_quantize(x, grid, relu=True), fake_quantize(torch.relu(x), grid))
    ]
    for ours, oracle in zip(*results, strict=True):
        np.testing.assert_array_equal(ours.detach(), oracle.detach())


def test_several_tensors_at_once_are_each_by_itself():
    shapes = ((7,), (5, 4), (2, 3, 3))
    xs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i), requires_grad=True)
        for i, shape in enumerate(shapes)
    ]
    tensors = [torch.tensor([0.2 + 0.1 * i, -1.0, 0.8], requires_grad=True) for i in range(3)]
    grids = [trained_grid(tensor) for tensor in tensors]
    results = [
        (*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), (*xs, *tensors)))
        for ys in (fake_quantize_all(xs, grids), [fake_quantize(x, grid) for x, grid in zip(xs, grids, strict=True)])
    ]
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=0)


def test_grids_of_slices_are_each_by_itself():
    """Also where a reshape put several positions of a sample in a row, and inside a linear layer."""
    tensor = torch.tensor([[0.2, -1.0, 0.8], [0.3, 0.0, 0.9], [0.1, -0.5, 0.4]], requires_grad=True)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias, constant = torch.zeros(4), Grid.of(FORMATS[0])

    def each(x):
        parts = x.split(2)
        return torch.cat([fake_quantize(p, trained_grid(t)) for p, t in zip(parts, tensor, strict=True)])

    grids = TrainedGrids(tensor, 0)
    for ours, oracle in (
        (fake_quantize(x, grids), each(x)),
        (fake_quantize_all((x, bias), (grids, constant))[0], each(x)),
        (fake_quantize(x.t(), TrainedGrids(tensor, 1)).t(), each(x)),
        (
            quantized_linear(x, weight, bias, grids=(grids, constant, None)),
            each(x) @ fake_quantize(weight, constant).t(),
        ),
    ):
        results = [(y, *torch.autograd.grad(y.square().sum(), (x, tensor))) for y in (ours, oracle)]
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("trained", [True, False])
def test_mixed_precision_does_not_touch_the_quantizer(trained):
    """A bfloat16 tensor is quantized as its float32 values are, and to float32."""
    format_ = Fixed.from_threshold(signed=True, bits=8, threshold_log2=2)
    grid = trained_grid(torch.tensor(Grid.of(format_))) if trained else Grid.of(format_)
    x, weight = torch.linspace(-5, 5, 1000).reshape(100, 10), torch.eye(10)
    blocks = HMQ([True], [0], [(2, 4)])
    p = blocks.sample(1.0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = x @ weight
        quantized, (expected,) = fake_quantize(low, grid), blocks.grids(p)
    assert low.dtype == torch.bfloat16
    assert quantized.dtype == expected.tensor.dtype == torch.float32
    np.testing.assert_array_equal(quantized.numpy(), format_.decode(format_.encode(low.float().numpy())))
    assert expected.values == blocks.grids(p)[0].values


def test_gradient_passes_at_the_end_levels_and_stops_beyond():
    format_ = Fixed.from_threshold(signed=True, bits=2, threshold_log2=0)  # levels -1, -0.5, 0, 0.5
    x = torch.tensor([-2.0, -1.2, -1.0, 0.1, 0.5, 0.7, 0.8, 3.0], requires_grad=True)
    for grid in (Grid.of(format_), trained_grid(torch.tensor(Grid.of(format_)))):
        (gradient,) = torch.autograd.grad(fake_quantize(x, grid).sum(), x)
        assert gradient.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


def test_cold_limit_is_one_format():
    """As the temperature falls, expected step and threshold become those of one pair, and so does the quantizer."""
    blocks = HMQ([True, False], [1, 3], [(2, 3, 8), (2, 3, 8)])
    p = blocks.sample(1e-4, torch.Generator().manual_seed(0))
    x = torch.linspace(-12, 12, 1001)
    for i, grid in enumerate(blocks.grids(p)):
        k, b = divmod(int(p[i].argmax()), 3)
        format_ = blocks.candidates[i][k][b]
        torch.testing.assert_close(fake_quantize(x, grid), fake_quantize(x, Grid.of(format_)))


def test_expected_grid_is_the_papers():
    """Eq. 5-6: the clip is [-t, t - step] of the expected threshold and step."""
    blocks = HMQ([True], [2], [(2, 4, 8)])
    p = blocks.sample(1.0, torch.Generator().manual_seed(3))
    (grid,) = blocks.grids(p)
    thresholds = torch.tensor([2.0 ** (2 - k) for k in range(9)])
    steps = torch.tensor([[2.0 ** (2 - k + 1 - b) for b in (2, 4, 8)] for k in range(9)])
    expected_threshold, expected_step = (p[0].view(9, 3).sum(1) * thresholds).sum(), (p[0].view(9, 3) * steps).sum()
    expected = torch.stack((expected_step, -expected_threshold, expected_threshold - expected_step))
    torch.testing.assert_close(grid.tensor, expected)
    assert grid.values == Grid(*grid.tensor.tolist())


def test_joint_distribution():
    blocks = HMQ([True] * 2, [0, 0], [(2, 3, 4, 5, 6, 7, 8)] * 2)
    start = blocks.probabilities()
    assert start[0, 6].item() == pytest.approx(0.9)
    assert start.sum(1).tolist() == pytest.approx([1, 1])
    assert blocks.chosen()[0] == Fixed.from_threshold(signed=True, bits=8, threshold_log2=0)
    draws = torch.stack([blocks.sample(1.0, torch.Generator().manual_seed(i)) for i in range(400)])
    assert draws.sum(2).flatten().tolist() == pytest.approx([1.0] * 800, abs=1e-5)
    hits = (draws[:, 0].argmax(1) == 6).double().mean()  # the Gumbel-max trick samples from P
    assert abs(hits - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 400)


def test_tensors_with_fewer_candidates():
    """Their missing pairs are never drawn and never move."""
    blocks = HMQ([True, False], [0, 2], [(2, 3, 4), (8,)], prices=[[0, 5], [2, 1]])
    assert torch.isfinite(blocks.logits).sum(1).tolist() == [27, 9]
    assert [f.width for f in blocks.chosen()] == [4, 8]
    p = blocks.sample(0.5, torch.Generator().manual_seed(0))
    assert p.sum(1).tolist() == pytest.approx([1, 1])
    bits = (p[0].view(9, 3) @ torch.tensor([2.0, 3.0, 4.0])).sum().item()
    costs = [cost.item() for cost in blocks.expected_costs(p)]
    assert costs == pytest.approx([5 * 8, 2 * bits + 8])
    sum(grid.tensor.sum() for grid in blocks.grids(p)).backward()
    assert (blocks.logits.grad[1].view(9, 3)[:, 1:] == 0).all()
    optimizer = torch.optim.RAdam(blocks.parameters(), lr=0.1)
    optimizer.step()
    assert torch.isfinite(blocks.logits).sum(1).tolist() == [27, 9]
    gaps = [
        logits[logits.isfinite()].max() - logits[logits.isfinite()].min()
        for logits in HMQ([True], [0], [(2, 8)]).logits
    ]
    assert gaps[0].item() == pytest.approx(initial_gap(18))


def test_gradient_reaches_every_logit():
    blocks = HMQ([True, False], [0, 0], [(1, 2, 8)] * 2)
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    grids = blocks.grids(blocks.sample(1.0, torch.Generator().manual_seed(0)))
    sum(((fake_quantize(x, grid) - x) ** 2).sum() for grid in grids).backward()
    assert (blocks.logits.grad != 0).all()


def test_least_threshold():
    assert [least_threshold_log2(v) for v in (0.0, 1.0, 1.0001, 0.25, 0.26, 6.0)] == [0, 0, 1, -2, -1, 3]


def test_least_error_format_beats_its_neighbours():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.1
    best = least_error_format(x, signed=True, bits=3, max_threshold_log2=0)
    errors = {m: ((fake_quantize(x, Grid.of(Fixed(True, 3, 2 - m))) - x) ** 2).sum() for m in range(-8, 1)}
    assert best.threshold_log2 == min(errors, key=errors.get)
