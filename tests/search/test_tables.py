"""Functions of one value as tables: the user's own, and what they keep."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_array_equal
from torch import nn

import hmq_fpga as hmq
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.ops import Table
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.reading import instrument
from tests.models import Functional

READ, MADE = Fixed(signed=True, width=8, frac=4), Fixed(signed=True, width=7, frac=5)


def frozen(function, read=READ):
    model = instrument(nn.Sequential(nn.Linear(3, 4), function, nn.Linear(4, 2)), (3,))
    formats = {site.name: read if site.name.endswith("_quant") else MADE for site in model.sites}
    model.set_scheme(scheme_of(model, formats, {}))
    return freeze(model)


def wave(x):
    return torch.sin(3 * x) * torch.exp(-x * x)


def test_a_function_of_the_users_own_is_one_table():
    net = frozen(hmq.table(wave))
    (op,) = (op for op in net.ops if isinstance(op, Table))
    x = torch.arange(READ.lo, READ.hi + 1, dtype=torch.float64) * READ.step
    assert_array_equal(op.values, MADE.encode(wave(x).numpy()))


def gelu_by_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


WRITTEN_OUT = {
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "step": lambda x: (x > 0.3).float(),
    "choice of numbers": lambda x: torch.where(x >= 0.5, 2.0, -1.0),
    "zeros elsewhere": lambda x: torch.where(x <= 0.5, x, torch.zeros_like(x)),
    "band": lambda x: x * ((x > -1) & (x < 1)),
    "outside a band": lambda x: x * torch.logical_or(x < -1, ~(x < 0.5)),
    "filled": lambda x: x.masked_fill(x < 0.25, -0.5),
    "softsign": lambda x: x / (1 + x.abs()),
    "soft threshold": lambda x: torch.sign(x) * F.relu(x.abs() - 0.2),
    "gelu": gelu_by_tanh,
    "swish": lambda x: x * torch.sigmoid(1.5 * x),
    "residual": lambda x: x + torch.sin(x),
    "rounded": lambda x: torch.floor(4 * x.abs()),
    "remainder": lambda x: x % 1.0,
    "whole numbers": lambda x: x.int().float(),
    "reciprocal": lambda x: 1 / (1.5 + x.abs()),
    "scaled between": lambda x: torch.tanh(x.abs() / 2 + 1),
    "table of a table": lambda x: torch.exp(-x.abs()),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_what_is_written_out_in_several_operations_is_one_table(name):
    function = WRITTEN_OUT[name]
    net = frozen(Functional(function))
    kinds = [type(op).__name__ for op in net.ops]
    assert kinds == ["Input", "Dense", "Quantize", "Table", "Dense"]
    x = torch.arange(READ.lo, READ.hi + 1, dtype=torch.float64) * READ.step
    signed = replace(MADE, signed=net.ops[3].format.signed)
    assert_array_equal(net.ops[3].values, signed.encode(function(x).numpy()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x + x,  # exact products and sums
        lambda x: torch.where(x > torch.arange(4) / 4, x, 0.0),  # another one for each channel
        lambda x: torch.tanh(x) * x.mean(1, keepdim=True),  # of all values
    ],
)
def test_what_is_no_function_of_one_value_stays_as_it_is_written(function):
    net = frozen(Functional(function))
    assert len(net.ops) > 5


def test_a_table_takes_a_scale_and_a_shift_that_no_layer_after_it_can():
    net = frozen(Functional(lambda x: F.relu(2 * torch.tanh(x) - 1)))
    assert [type(op).__name__ for op in net.ops] == ["Input", "Dense", "Quantize", "Table", "Quantize", "Dense"]
    x = torch.arange(READ.lo, READ.hi + 1, dtype=torch.float64) * READ.step
    assert_array_equal(net.ops[3].values, MADE.encode((2 * torch.tanh(x) - 1).numpy()))


def test_where_a_function_has_no_slope_training_gets_none():
    """The root's is infinite at zero, and zero times that is no number."""
    model = instrument(nn.Sequential(nn.Linear(2, 3), Functional(lambda x: torch.sqrt(x.abs()))), (2,))
    with torch.no_grad():
        model.layers[0].bias.copy_(torch.tensor([-9.0, 0.0, 9.0]))
        model.layers[0].weight[1] = 0
    model(torch.randn(8, 2)).sum().backward()
    gradient = model.layers[0].bias.grad
    assert gradient.isfinite().all()
    assert gradient[2] > 0


def test_a_table_that_is_read_twice_stays():
    def function(x):
        x = torch.tanh(x)
        return x.roll(1, 1) + torch.exp(x)

    net = frozen(Functional(function))
    assert sum(isinstance(op, Table) for op in net.ops) == 2


GROWING = (nn.Tanh(), nn.Sigmoid(), nn.ELU(), nn.SELU(), nn.CELU(), nn.Softplus(), nn.Hardsigmoid(), nn.LeakyReLU(0.3))


@pytest.mark.parametrize("function", GROWING, ids=lambda f: type(f).__name__)
def test_what_grows_does_so_as_a_table_and_its_range_is_known(function):
    net = frozen(function)
    (op,) = (op for op in net.ops if isinstance(op, Table))
    assert (np.diff(op.values) >= 0).all()
    source, made = net.ranges[op.source], net.ranges[op.name]
    assert_array_equal(made.lo, op.values[source.lo - READ.lo])
    assert_array_equal(made.hi, op.values[source.hi - READ.lo])


def test_more_than_twelve_bits_are_refused_with_their_number():
    with pytest.raises(InvalidInput, match="8192 values exceeds 12 bits"):
        frozen(nn.Tanh(), Fixed(signed=True, width=13, frac=8))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.softmax(0), "'lambda': it is no function of one value"),
        (torch.sum, "'sum': it is no function of one value"),
        (nn.PReLU(), "'PReLU': it has parameters"),
    ],
)
def test_what_is_no_table(function, message):
    with pytest.raises(InvalidInput, match=message):
        hmq.table(function)
