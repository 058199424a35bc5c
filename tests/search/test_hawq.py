"""Curvature against what is known of it: quadratics, and the Hessian of a softmax regression."""

import pytest
import torch
from torch import nn

from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.methods.hawq import HawqOptions, eigenvalues, mean_of, probe
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Recorder, Task, fit


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(matrix, *tensors):
    """`½ x' A x` of tensors in a row."""
    x = torch.cat([t.flatten() for t in tensors])
    return x @ matrix @ x / 2


@pytest.fixture
def tensors():
    return [torch.randn(shape, generator=random(), dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (4,))]


def blocks(matrix):
    return matrix[:6, :6], matrix[6:, 6:]


def test_probes_of_a_diagonal_are_exact(tensors):
    diagonal = torch.arange(1.0, 11.0, dtype=torch.float64)
    found = probe(quadratic(diagonal.diag(), *tensors), tensors, random())
    torch.testing.assert_close(found, torch.stack([diagonal[:6].sum(), diagonal[6:].sum()]))


def test_mean_of_probes_is_the_trace(tensors):
    half = torch.randn(10, 10, generator=random(), dtype=torch.float64)
    matrix, n = half @ half.T, 2000
    options, generator = HawqOptions(least_probes=n, most_probes=n), random()
    figures = (probe(quadratic(matrix, *tensors), tensors, generator) for _ in range(n))
    traces = torch.stack([block.trace() for block in blocks(matrix)])
    spread = (2 * (matrix - matrix.diagonal().diag()).square().sum() / n).sqrt()  # of a probe of all, as a bound
    assert ((mean_of(figures, options, Recorder()) - traces).abs() < 4 * spread).all()


def test_probing_ends_when_the_mean_settles():
    recorder = Recorder()
    figures = iter(torch.tensor([[1.0], [3.0], *([[2.0]] * 100)]))
    assert mean_of(figures, HawqOptions(least_probes=5), recorder) == 2
    assert recorder.history["step"] == [1, 2, 3, 4, 5]


def test_power_iteration_finds_the_largest_eigenvalue_of_each_block(tensors):
    half = torch.randn(10, 10, generator=random(), dtype=torch.float64)
    matrix = half @ half.T
    matrix[6:, 6:] *= -1  # a maximum
    options = HawqOptions(most_probes=500, tolerance=1e-9)
    found = eigenvalues(quadratic(matrix, *tensors), tensors, options, random(), Recorder())
    expected = [values[values.abs().argmax()].item() for values in map(torch.linalg.eigvalsh, blocks(matrix))]
    assert found == pytest.approx(expected, rel=1e-5)


def test_trace_of_a_softmax_regression(digits):
    """The Hessian in the weight is the mean of `(diag(p) - p p') ⊗ x x'`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10))
    fit(model, digits, steps=100, learning_rate=1e-2, seed=0)
    read = instrument(model, digits.input_shape, input_signed=False)
    x, y = digits.x_train[:500], digits.y_train[:500]
    with torch.no_grad():
        p = model(x).softmax(1)
        trace = ((p - p.square()).sum(1) * x.square().sum(1)).mean()
    weights, generator = list(read.weights.values()), random()
    n = 400
    figures = (probe(digits.loss(read(x, grids={}), y), weights, generator) for _ in range(n))
    found = mean_of(figures, HawqOptions(least_probes=n, most_probes=n), Recorder())
    assert found.item() == pytest.approx(trace.item(), rel=0.02)


def test_double_backward_is_that_of_plain_layers(mlp, digits):
    """The layers' own gradients, which keep less, can be differentiated once more."""
    read = instrument(mlp, digits.input_shape, input_signed=False)
    weights, (x, y) = list(read.weights.values()), (digits.x_train[:64], digits.y_train[:64])
    fused = probe(digits.loss(read(x, grids={}), y), weights, random())
    plain = probe(digits.loss(read(x, grids={}, observe=lambda *_: None), y), weights, random())
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_wide_where_the_loss_is_curved(digits):
    """Of two layers side by side one hardly matters, and gets the fewer bits."""

    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.last = nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(32, 10)
            with torch.no_grad():
                self.last.weight[:, 16:] *= 1e-2

        def forward(self, x):
            return self.last(torch.cat((torch.relu(self.one(x)), torch.relu(self.other(x))), 1))

    torch.manual_seed(0)
    for sensitivity in ("trace", "eigenvalue"):
        read = instrument(Weighed(), digits.input_shape, input_signed=False)
        target, options = Target(weight_rate=8), {"sensitivity": sensitivity}
        _, scheme, _ = find_scheme(read, digits, Budget(), target, method="hawq", options=options)
        widths = [scheme[name].format.width for name in ("one.weight", "other.weight")]
        assert widths[0] > widths[1]
        assert set(scheme.found_by["sensitivities"]) == set(read.weights)


def test_negative_curvature_counts_as_none_and_is_said(digits):
    upside_down = Task(
        x_train=digits.x_train,
        y_train=digits.y_train,
        x_val=digits.x_val,
        y_val=digits.y_val,
        custom_loss=lambda outputs, _: -outputs.square().mean(),
    )
    torch.manual_seed(0)
    read = instrument(nn.Sequential(nn.Linear(64, 10)), digits.input_shape, input_signed=False)
    _, scheme, _ = find_scheme(read, upside_down, Budget(), Target(weight_rate=8), method="hawq")
    assert scheme.found_by["negative"] == list(read.weights)
