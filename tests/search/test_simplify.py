"""Each rule alone leaves what a draft computes as it is, and does nothing where it could not; and where sites are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import Activation, Affine, AvgPool
from hmq_fpga.search.reading.exported import export
from hmq_fpga.search.reading.operations import MOVES
from hmq_fpga.search.reading.reader import Reader
from hmq_fpga.search.reading.simplify import (
    fold_affines,
    fold_into_maker,
    fold_into_reader,
    settle_clips,
    settle_means,
)
from hmq_fpga.search.reading.sites import place_sites
from hmq_fpga.search.reading.table import TABLE


class Net(nn.Module):
    """Layers and a function of them and the input; all parameters are few bits, so that nothing is rounded."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-12, 13, parameter.shape, generator=random) / 8)

    def forward(self, x):
        return self.function(self, x)


def draft_of(model, shape):
    return Reader(export(model, (shape,), signed=True), TABLE, MOVES).read()


def assert_computes(draft, model, shape, tolerance=0.0):
    """The draft against the model, in float64."""
    x = torch.randint(-16, 17, (5, *shape), generator=torch.Generator().manual_seed(1)).double() / 8
    read = QModel(draft.inputs, draft.layers, draft.nodes.values(), [], [])
    torch.testing.assert_close(read.double()(x), model.double().eval()(x), rtol=tolerance, atol=tolerance)


def last_affine(draft):
    return [name for name, layer in draft.layers.items() if isinstance(layer, Affine)][-1]


def along(n, axis, dims):
    """Values that differ along one dimension of a sample."""
    return (torch.arange(1, n + 1) / 4).view(-1, *(1,) * (dims - 1 - axis))


def scaled(y, axis=0):
    values = along(y.shape[axis + 1], axis, y.ndim - 1)
    return y * values + (values - 1)


def conv(cls, *arguments, **settings):
    return {"fc": cls(*arguments, **settings)}


MAKERS = {
    "linear": (conv(nn.Linear, 3, 4), (3,), 0),
    "linear of rows": (conv(nn.Linear, 3, 4), (2, 3), 1),
    "conv1d, groups": (conv(nn.Conv1d, 4, 6, 2, groups=2), (4, 5), 0),
    "conv2d": (conv(nn.Conv2d, 2, 4, 2, padding=1, bias=False), (2, 3, 3), 0),
    "depthwise": (conv(nn.Conv2d, 3, 3, 2, groups=3), (3, 3, 3), 0),
    "transposed": (conv(nn.ConvTranspose1d, 4, 6, 3, stride=2, groups=2), (4, 3), 0),
    "transposed2d": (conv(nn.ConvTranspose2d, 4, 4, (2, 3), groups=2, bias=False), (4, 2, 2), 0),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_layer_before_takes_a_scale_and_a_shift(name):
    layers, shape, axis = MAKERS[name]
    model = Net(lambda m, x: scaled(m.fc(x), axis), **layers)
    draft = draft_of(model, shape)
    while len(draft.layers) > 1:
        first = next(name for name, layer in draft.layers.items() if isinstance(layer, Affine))
        assert fold_into_maker(draft, first) == "fc"
    assert list(draft.layers) == draft.outputs == ["fc"]
    assert_computes(draft, model, shape)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_scales_and_shifts_in_a_row_become_one(axis):
    values = torch.arange(6).view(2, 3) / 4 + 1 if axis is None else along(3 if axis else 2, axis, 2)
    model = Net(lambda m, x: (torch.relu(x) * values + 0.5 * values) * (values - 2))
    draft = draft_of(model, (2, 3))
    fold_affines(draft)
    assert [type(layer) for layer in draft.layers.values()] == [Activation, Affine]
    assert_computes(draft, model, (2, 3))


READERS = {
    "linear": (lambda m, x: m.fc(scaled(x)), conv(nn.Linear, 4, 3), (4,)),
    "linear of rows": (lambda m, x: m.fc(scaled(x, 1)), conv(nn.Linear, 4, 3), (2, 4)),
    "flattened": (lambda m, x: m.fc(scaled(x).flatten(1)), conv(nn.Linear, 12, 3), (2, 2, 3)),
    "sliced": (lambda m, x: m.fc(scaled(x)[:, 1::2].flatten(1)), conv(nn.Linear, 6, 3), (4, 3)),
    "permuted": (lambda m, x: m.fc(scaled(x).transpose(1, 2)), conv(nn.Linear, 4, 3), (4, 3)),
    "repeated": (lambda m, x: m.fc(torch.roll(scaled(x).repeat(1, 2), 3, 1)), conv(nn.Linear, 8, 3), (4,)),
    "each value its own": (
        lambda m, x: m.fc((x * torch.arange(6).view(2, 3) + 1).flatten(1)),
        conv(nn.Linear, 6, 3),
        (2, 3),
    ),
    "scale among zeros": (lambda m, x: m.fc(F.pad(x / 4, (1, 2))), conv(nn.Linear, 7, 3), (4,)),
    "conv": (lambda m, x: m.fc(scaled(x)), conv(nn.Conv2d, 2, 3, 2, stride=2, bias=False), (2, 4, 5)),
    "groups, dilation": (lambda m, x: m.fc(scaled(x)), conv(nn.Conv1d, 4, 6, 2, dilation=2, groups=2), (4, 6)),
    "depthwise": (lambda m, x: m.fc(scaled(x)), conv(nn.Conv1d, 3, 3, 2, groups=3), (3, 4)),
    "conv of what was rows": (lambda m, x: m.fc(scaled(x, 1).transpose(1, 2)), conv(nn.Conv1d, 3, 2, 2), (5, 3)),
    "padded, no shift": (
        lambda m, x: m.fc(x * along(2, 0, 3)),
        conv(nn.Conv2d, 2, 3, 3, padding=1, groups=1),
        (2, 3, 3),
    ),
    "same, no shift": (lambda m, x: m.fc(x * along(2, 0, 2)), conv(nn.Conv1d, 2, 2, 3, padding="same"), (2, 4)),
    "valid": (lambda m, x: m.fc(scaled(x)), conv(nn.Conv1d, 2, 2, 3, padding="valid"), (2, 4)),
}


@pytest.mark.parametrize("name", READERS)
def test_the_layer_after_takes_a_scale_and_a_shift(name):
    function, layers, shape = READERS[name]
    model = Net(function, **layers)
    draft = draft_of(model, shape)
    before = len([layer for layer in draft.layers.values() if not isinstance(layer, Affine)])
    while any(isinstance(layer, Affine) for layer in draft.layers.values()):
        assert fold_into_reader(draft, last_affine(draft)) == "fc"
    assert len(draft.layers) == before
    assert_computes(draft, model, shape)


UNFOLDED = {
    "its maker has a second reader": (lambda m, x: (lambda y: scaled(y) * y)(m.fc(x)), conv(nn.Linear, 4, 4), (4,)),
    "its maker is an output": (lambda m, x: (lambda y: (y, scaled(y)))(m.fc(x)), conv(nn.Linear, 4, 4), (4,)),
    "along another dimension than the maker's outputs": (
        lambda m, x: scaled(m.fc(x)),
        conv(nn.Linear, 3, 3),
        (3, 3),
    ),
    "a move after the maker": (lambda m, x: scaled(m.fc(x).view(-1, 2, 2)), conv(nn.Linear, 4, 4), (4,)),
    "a second reader": (lambda m, x: (lambda y: m.fc(y) + y)(scaled(x)), conv(nn.Linear, 4, 4), (4,)),
    "an output": (lambda m, x: (lambda y: (m.fc(y), y))(scaled(x)), conv(nn.Linear, 4, 4), (4,)),
    "an output after a move": (
        lambda m, x: (lambda y: (m.fc(y), y))(scaled(x).flip(1)),
        conv(nn.Linear, 4, 4),
        (4,),
    ),
    "a shift among zeros": (lambda m, x: m.fc(F.pad(x + 1, (1, 0))), conv(nn.Linear, 5, 3), (4,)),
    "a shift before padding": (lambda m, x: m.fc(x + 1), conv(nn.Conv1d, 2, 3, 3, padding=1), (2, 4)),
    "a shift before padding as is": (lambda m, x: m.fc(x + 1), conv(nn.Conv1d, 2, 3, 3, padding="same"), (2, 4)),
    "it differs over the positions of a conv": (
        lambda m, x: m.fc(scaled(x, 1)),
        conv(nn.Conv1d, 2, 3, 2),
        (2, 4),
    ),
    "it differs over rows": (lambda m, x: m.fc(scaled(x)), conv(nn.Linear, 4, 4), (2, 4)),
    "a pool in between": (lambda m, x: m.fc(F.max_pool1d(scaled(x), 2)), conv(nn.Conv1d, 2, 3, 1), (2, 4)),
    "a layer that takes none": (lambda m, x: m.fc(scaled(x)), conv(nn.ConvTranspose1d, 2, 3, 2), (2, 4)),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_what_no_layer_can_take_stays(name):
    function, layers, shape = UNFOLDED[name]
    model = Net(function, **layers)
    draft = draft_of(model, shape)
    fold_affines(draft)  # a scale and a shift become one
    assert sum(isinstance(layer, Affine) for layer in draft.layers.values()) == 1
    nodes, layers = dict(draft.nodes), dict(draft.layers)
    assert fold_into_maker(draft, last_affine(draft)) is None
    assert fold_into_reader(draft, last_affine(draft)) is None
    assert (draft.nodes, draft.layers) == (nodes, layers)
    assert any("kept as a scale and a shift per channel" in note for note in draft.notes)
    if len(draft.outputs) == 1:
        assert_computes(draft, model, shape)


def test_what_is_folded_into_one_use_is_not_into_the_other():
    model = Net(lambda m, x: m.fc(torch.tanh(scaled(m.fc(x)))), fc=nn.Linear(4, 4))
    draft = draft_of(model, (4,))
    first, second = (layer for layer in draft.layers.values() if isinstance(layer, nn.Linear))
    assert first.weight is second.weight
    fold_affines(draft)
    assert torch.equal(second.weight, model.fc.weight)
    assert torch.equal(second.bias, model.fc.bias)
    assert first.weight is not second.weight
    assert_computes(draft, model, (4,))


def two(first, second):
    return {"first": first, "second": second}


CLIPS = {
    "linear": (lambda m, x: m.second(m.first(x).clamp(0, 0.75)), two(nn.Linear(4, 5), nn.Linear(5, 3)), (4,)),
    "signed, at most one": (
        lambda m, x: m.second(m.first(x).clamp(-1.5, 1.5)),
        two(nn.Linear(4, 5), nn.Linear(5, 3)),
        (4,),
    ),
    "pools and moves after it": (
        lambda m, x: m.second(F.avg_pool2d(F.max_pool2d(F.relu6(m.first(x)), 2, 1), 2).flatten(1)),
        two(nn.Conv2d(2, 3, 2), nn.Linear(3, 2)),
        (2, 4, 4),
    ),
    "pools, moves and sums before it": (
        lambda m, x: m.second(F.relu6(F.pad(F.max_pool1d(m.first(x) - m.other(x).flip(1), 2), (1, 0))).flatten(1)),
        {"other": nn.Conv1d(2, 3, 1), **two(nn.Conv1d(2, 3, 1), nn.Linear(9, 2))},
        (2, 4),
    ),
    "two takers": (
        lambda m, x: (lambda y: m.second(y) * m.other(y.flip(1)))(m.first(x).clamp(0, 3)),
        {"other": nn.Linear(5, 3), **two(nn.Linear(4, 5), nn.Linear(5, 3))},
        (4,),
    ),
    "a scale that is kept is a taker": (
        lambda m, x: torch.tanh(scaled(m.first(x).clamp(0, 3))) + m.second(x),
        two(nn.Linear(4, 3), nn.Linear(4, 3)),
        (4,),
    ),
}


@pytest.mark.parametrize("name", CLIPS)
def test_weights_around_a_clip_take_the_rest(name):
    function, layers, shape = CLIPS[name]
    model = Net(function, **layers)
    draft = draft_of(model, shape)
    fold_affines(draft)
    settle_clips(draft)
    assert draft.is_exact
    assert "the weights before and after are scaled" in draft.notes[-1]
    assert_computes(draft, model, shape, 1e-5)


INEXACT_CLIPS = {
    "its maker is read twice": lambda m, x: (lambda y: m.second(F.relu6(y)) + y)(m.first(x)),
    "of the input": lambda m, x: m.second(torch.tanh(m.first(F.relu6(x)))),
    "at the end": lambda m, x: F.relu6(m.second(torch.tanh(m.first(x)))),
    "a function after it": lambda m, x: m.second(torch.tanh(F.relu6(m.first(x)))),
    "two clips": lambda m, x: m.second(F.relu6(F.hardtanh(m.first(x), -3, 3))),
    "a taker and another reader": lambda m, x: (lambda y: m.second(y) + y)(F.relu6(m.first(x))),
}


@pytest.mark.parametrize("name", INEXACT_CLIPS)
def test_where_no_weights_can_be_scaled_it_clips_later_and_says_so(name):
    model = Net(INEXACT_CLIPS[name], **two(nn.Linear(4, 4), nn.Linear(4, 4)))
    draft = draft_of(model, (4,))
    settle_clips(draft)
    assert not draft.is_exact
    assert all("clips at" in note and "scaled" not in note for note in draft.notes)
    for path, layer in (("first", model.first), ("second", model.second)):
        assert torch.equal(draft.layers[path].weight, layer.weight)


def test_a_clip_at_a_power_of_two_needs_nothing():
    model = Net(lambda m, x: m.second(m.first(x).clamp(-4, 4)), **two(nn.Linear(4, 4), nn.Linear(4, 4)))
    draft = draft_of(model, (4,))
    settle_clips(draft)
    assert (draft.is_exact, draft.notes) == (True, [])
    assert [layer.limit_log2 for layer in draft.layers.values() if isinstance(layer, Activation)] == [2]
    assert_computes(draft, model, (4,))


MEANS = {
    "after it": (lambda m, x: m.fc(x.mean((2, 3))), conv(nn.Linear, 2, 3), (2, 2, 3)),
    "after a ReLU and a move": (
        lambda m, x: m.fc(torch.relu(F.avg_pool2d(x, 3, 1)).flatten(1)),
        conv(nn.Linear, 8, 3),
        (2, 4, 4),
    ),
    "before it": (lambda m, x: m.fc(x).mean((2, 3)), conv(nn.Conv2d, 2, 3, 1), (2, 2, 3)),
    "before a leaky ReLU": (
        lambda m, x: F.leaky_relu(m.fc(x), 0.25).mean(2),
        conv(nn.Conv1d, 2, 3, 1),
        (2, 3),
    ),
    "before a sum of several": (
        lambda m, x: (m.fc(x) + torch.relu(m.other(x))).mean(2),
        {"other": nn.Conv1d(2, 3, 1), **conv(nn.Conv1d, 2, 3, 1)},
        (2, 5),
    ),
    "two in a row": (lambda m, x: m.fc(x.mean(3).mean(2)), conv(nn.Linear, 2, 3), (2, 3, 5)),
    "two readers": (
        lambda m, x: (lambda y: m.fc(y) * m.other(y))(x.mean(2)),
        {"other": nn.Linear(2, 3), **conv(nn.Linear, 2, 3)},
        (2, 3),
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_weights_near_a_mean_take_the_rest_of_its_divisor(name):
    function, layers, shape = MEANS[name]
    model = Net(function, **layers)
    draft = draft_of(model, shape)
    settle_means(draft)
    assert "nearby weights take the rest" in draft.notes[-1]
    assert all(layer.divisor.bit_count() == 1 for layer in draft.layers.values() if isinstance(layer, AvgPool))
    assert_computes(draft, model, shape, 1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(torch.tanh(x.mean(2))),
        lambda m, x: (lambda y: y.mean(2) + torch.tanh(y.transpose(1, 2)[:, 0]))(
            m.fc(x.transpose(1, 2)).transpose(1, 2)
        ),
        lambda m, x: (lambda y: m.fc(y) + y)(x.mean(2)),
    ],
)
def test_a_mean_that_no_weights_can_mend_is_refused(function):
    model = Net(function, fc=nn.Linear(3, 3))
    with pytest.raises(UnsupportedLayer, match="'mean': a mean over 3 values, no power of two"):
        settle_means(draft_of(model, (3, 3)))


def test_a_mean_of_a_power_of_two_needs_nothing():
    model = Net(lambda m, x: m.fc(x.mean(2)), fc=nn.Linear(2, 3))
    draft = draft_of(model, (2, 4))
    settle_means(draft)
    assert draft.notes == []
    assert_computes(draft, model, (2, 4))


SITES = {  # activations in network order; unsigned ones in capitals
    "none between the input and a layer, none at the end": (lambda m, x: m.a(x), ""),
    "between two layers": (lambda m, x: m.b(m.a(x)), "a_quant"),
    "a ReLU has its own": (lambda m, x: m.b(torch.relu(m.a(x))), "RELU"),
    "what moves a format keeps it": (
        lambda m, x: m.b(F.max_pool1d(torch.relu(m.a(x))[:, None], 3, 1, 1).flip(2).flatten(1)),
        "RELU",
    ),
    "after what moves an accumulator": (lambda m, x: m.b(m.a(x).flip(1)), "flip_quant"),
    "one for all readers": (lambda m, x: (lambda y: m.b(y) + torch.tanh(y))(m.a(x)), "a_quant tanh b_quant"),
    "around a table": (lambda m, x: m.b(torch.sigmoid(m.a(x))), "a_quant SIGMOID"),
    "a leaky ReLU has none": (lambda m, x: m.b(F.leaky_relu(m.a(x), 0.5)), "leaky_relu_quant"),
    "what several tensors are merged of": (lambda m, x: m.a(x) + x, "a_quant"),
    "and what they are merged to": (lambda m, x: m.b(torch.maximum(m.a(x), x)), "a_quant maximum_quant"),
    "side by side": (lambda m, x: torch.cat([torch.relu(m.a(x)), x, m.b(x)], 1), "RELU b_quant"),
    "a mean needs no format": (lambda m, x: m.a(x).view(-1, 2, 2).mean(2), ""),
    "a scale that is kept is a layer": (lambda m, x: scaled(torch.relu(m.a(x))) * x, "RELU mul_quant"),
}


@pytest.mark.parametrize("name", SITES)
def test_quantizers_are_where_a_format_is_read(name):
    function, expected = SITES[name]
    model = Net(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    draft = draft_of(model, (4,))
    fold_affines(draft)
    sites = place_sites(draft, input_signed=False)
    assert (sites[0].name, sites[0].kind, sites[0].size, sites[0].signed) == ("input", "input", 4, False)
    found = [site.name if site.signed else site.name.upper() for site in sites if site.kind == "activation"]
    assert found == expected.split()
    weights = [site.name for site in sites if site.kind == "weight"]
    assert weights == [f"{name}.weight" for name, layer in draft.layers.items() if hasattr(layer, "weight")]
    assert_computes(draft, model, (4,))
