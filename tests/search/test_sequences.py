"""Softmax, attention and recurrent layers as layers that are exact."""

from collections import OrderedDict
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_array_equal
from torch import nn

from hmq_fpga.ir import reference
from hmq_fpga.ir.cost import weight_bits
from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Input
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze, outline
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target, bops_of_a_bit
from tests.sequences import Recurrent

SCORES = Fixed(signed=True, width=6, frac=3)


def unsigned(width: int, frac: int) -> Fixed:
    return Fixed(signed=False, width=width, frac=frac)


def softmax_of_codes(exp: Fixed, total: Fixed, reciprocal: Fixed, made: Fixed) -> tuple[np.ndarray, np.ndarray]:
    """All vectors of three scores' codes, and the codes that the network's softmax makes of them."""
    layers = OrderedDict(scores=nn.Linear(3, 3), shares=nn.Softmax(1))
    model = instrument(nn.Sequential(layers), (3,), keep_final=True)
    steps = {"_exp": exp, "_sum": total, "_reciprocal": reciprocal, "": made}
    model.set_scheme(
        scheme_of(model, {s.name: steps.get(s.name.removeprefix("shares"), SCORES) for s in model.sites}, {})
    )
    net = freeze(model)
    start = next(n for n, op in enumerate(net.ops) if op.name == "shares_read")
    ops = (Input(name=net.ops[start].name, shape=(3,), format=SCORES), *net.ops[start + 1 :])
    codes = np.array(list(product(range(SCORES.lo, SCORES.hi + 1), repeat=3)))
    return codes, reference.run(QNet(ops), SCORES.decode(codes))


def test_the_largest_code_has_the_largest_share():
    """Of all code vectors, in formats as coarse as may be: a larger code never gets less."""
    codes, shares = softmax_of_codes(unsigned(3, 2), unsigned(4, 2), unsigned(3, 3), unsigned(3, 3))
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert (shares[:, a] >= shares[:, b])[codes[:, a] >= codes[:, b]].all()


def test_softmax_decides_as_the_float_function_does():
    """Of all code vectors, wherever the float softmax tells the two largest apart by more than one step."""
    made = unsigned(8, 8)
    codes, shares = softmax_of_codes(unsigned(12, 12), unsigned(12, 10), unsigned(12, 12), made)
    expected = torch.softmax(torch.from_numpy(SCORES.decode(codes)), 1).numpy()
    first, second = np.sort(expected, 1)[:, :0:-1].T
    apart = first - second > made.step
    assert apart.mean() > 0.9
    assert_array_equal(shares.argmax(1)[apart], expected.argmax(1)[apart])
    assert (np.sort(shares, 1)[:, -1] > np.sort(shares, 1)[:, -2])[apart].all(), "and no other has as much"
    assert np.abs(made.decode(shares) - expected).max() < 1.5 * made.step


def test_a_recurrent_layer_has_its_weights_once():
    """One scheme entry for all steps, one quantization in PyTorch, one code for all ops; R_w counts them once."""
    model = instrument(Recurrent(nn.GRU, 3, 4), (5, 3))
    sites = [site for site in model.sites if site.kind == "weight"]
    assert [(site.name, site.size) for site in sites] == [
        ("layer_input.weight", 36),
        ("layer_hidden.weight", 48),
        ("head.weight", 12),
    ]
    assert {name: parameter.shape for name, parameter in model.weights.items()}.keys() == {site.name for site in sites}
    net = outline(model)
    assert weight_bits(model.scheme) == 8 * (36 + 48 + 12)
    steps = [op for op in net.linears if op.name.startswith("layer_hidden")]
    assert len(steps) == 5
    for op in steps[1:]:
        assert_array_equal(op.weight, steps[0].weight)
    prices = bops_of_a_bit(instrument(Recurrent(nn.GRU, 3, 4), (5, 3)), Target(weight_rate=8).activation_bits(model))
    assert prices["layer_hidden.weight"] == 5 * 48 * 8


def test_what_is_read_of_a_recurrent_layer_is_made_of_it():
    """Of the last step no other state is joined, and of one layer's states nothing is left over."""
    last = instrument(Recurrent(nn.LSTM, 3, 4, num_layers=2), (5, 3))
    whole = instrument(Recurrent(nn.LSTM, 3, 4, "all", num_layers=2), (5, 3))
    joined = [sum(type(layer).__name__ == "Concat" for layer in model.layers) for model in (last, whole)]
    assert joined == [1, 2]


def test_states_from_outside():
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gru, self.rnn = nn.Linear(3, 4), nn.GRU(3, 4), nn.RNN(4, 4)
            self.start = nn.Parameter(torch.randn(1, 1, 4))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            states, hidden = self.gru(x.transpose(0, 1), torch.relu(self.first(x[:, 0]))[None])
            _, last = self.rnn(states, self.start.expand(-1, x.shape[0], -1).contiguous())
            return self.head(torch.cat([hidden[0], last[-1]], 1))

    assert instrument(Between(), (4, 3)).notes  # instrument compares it with PyTorch's own


class Masked(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, torch.arange(16.0).view(4, 4).sin())


class Crossed(nn.Module):
    def forward(self, x):
        return x[:, 0].T @ x[:, 0]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.LSTM(3, 4, proj_size=2, batch_first=True), (4, 3), "without proj_size"),
        (Masked(), (4, 3), "values are others than 0 and -inf"),
        (Crossed(), (4, 3), "multiplies matrices of two values|the batch as its first"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(UnsupportedLayer, match=message):
        instrument(model, shape)
