"""Functions of one value as tables: the user's own, and what they keep."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import nn

import hmq_fpga as hmq
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.ops import Table
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.reading import instrument

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
