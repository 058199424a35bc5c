"""Widths of single weights: how they are learnt, kept within bounds, and kept while fine-tuning."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hmq_fpga.ir import cost, reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme, Tensor
from hmq_fpga.search.calibrate import max_thresholds_log2
from hmq_fpga.search.describe import describe
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.methods.hgq import LearntWidths, nearest_within
from hmq_fpga.search.pruning import Nonzeros, Pruning, share_of_zeros, widen_thresholds
from hmq_fpga.search.quantizers import fake_quantize, grid_of, round_to_fractions
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Task, evaluate, finetune
from hmq_fpga.study.data import channels_last

pytestmark = pytest.mark.once

SHORT = Budget(search_steps=120)


def instrumented(mlp, digits):
    return instrument(mlp, digits.input_shape, input_signed=digits.input_signed)


# --- the quantizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [2.0, 3.3, 5.6])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_gradient_of_fractions_is_that_of_the_expected_loss(fraction, slope):
    """By central differences of the expectation over errors spread evenly over a step."""
    x = torch.linspace(-1, 1, 300_001, dtype=torch.float64)
    errors = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5

    def loss(levels):
        return ((levels - x).square() * (1 + x) + slope * (levels - x) * x.sign() + (levels - x) ** 4).mean()

    def expected(f):
        return (loss(x + errors * 2.0**-f) + loss(x - errors * 2.0**-f)) / 2

    whole, h = round(fraction), 1e-4
    fractions = torch.full_like(x, fraction, requires_grad=True)
    loss(round_to_fractions(x, fractions, torch.full_like(x, 4.0))).backward()
    slope_of_expected = (expected(whole + h) - expected(whole - h)) / (2 * h)
    assert fractions.grad.sum() == pytest.approx(slope_of_expected.item(), rel=0.01)


def test_gradient_of_weights_is_straight_through_within_the_threshold():
    x = torch.tensor([0.3, -0.9, 0.5, 0.6, -0.5], requires_grad=True)
    fractions = torch.full((5,), 2.0, requires_grad=True)
    levels = round_to_fractions(x, fractions, torch.full((5,), 0.5))
    assert levels.tolist() == [0.25, -0.5, 0.25, 0.25, -0.5]
    levels.backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [1, 0, 3, 0, 5]
    expected = [1 * 0.05, 0, 3 * 0.25, 4 * 0.25, 0]  # errors of what lies within the threshold, or is clipped to it
    torch.testing.assert_close(fractions.grad, math.log(2) * torch.tensor(expected))


@given(st.integers(0, 2**32 - 1), st.integers(-3, 2), st.integers(2, 8))
def test_widths_have_one_meaning(seed, threshold_log2, width):
    """In what is learnt, in the model, and in integers."""
    generator = np.random.default_rng(seed)
    size, format_ = 60, Fixed.from_threshold(signed=True, bits=width, threshold_log2=threshold_log2)
    tensor = Tensor(name="w", kind="weight", format=format_, size=size, widths=generator.integers(0, width + 1, size))
    x = torch.from_numpy(generator.normal(0, 2.0**threshold_log2, size).astype(np.float32))
    values = format_.decode(tensor.encode(x.numpy()))
    grid = grid_of(format_, tensor.widths, x)
    np.testing.assert_array_equal(fake_quantize(x, grid).double().numpy(), values)
    fractions = torch.from_numpy(tensor.widths.astype(np.float32)) - threshold_log2 - 1
    learnt = round_to_fractions(x, fractions, torch.full((size,), 2.0**threshold_log2))
    np.testing.assert_array_equal(learnt.double().numpy(), values)


def test_gradient_of_each_element_stays_within_its_own_grid():
    tensor = Tensor(
        name="w", kind="weight", format=Fixed(True, 4, 3), size=4, widths=np.array([4, 2, 2, 1])
    )  # steps 1/8, 1/2, 1/2, 1
    x = torch.tensor([0.8, 0.7, 0.8, -0.4], requires_grad=True)
    fake_quantize(x, grid_of(tensor.format, tensor.widths, x)).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 1]  # 0.8 is beyond the last of -1, -1/2, 0, 1/2


# --- the repair ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 2), st.floats(0.2, 3))
def test_repair_keeps_all_bounds_and_uses_one_up(seed, weights, bounds, spent):
    generator = np.random.default_rng(seed)
    found = generator.integers(0, 6, weights)
    prices = generator.uniform(0.1, 1, (bounds, weights))
    prices *= spent / max((prices @ np.maximum(found, 1)).max(), 1e-9)
    costs = np.sort(generator.uniform(0, 1, (weights, 6)), axis=1)[:, ::-1]
    widths = nearest_within(found, costs, prices)
    shares = prices @ widths
    assert shares.max() <= 1 + 1e-6
    assert (widths >= found).all() or (widths <= found).all()
    assert widths.max() == 5 == widths.min() or shares.max() > 1 - 5 * prices.max()


def test_repair_takes_the_cheapest_bits():
    costs = np.array([[9.0, 4.0, 0.0], [5.0, 0.1, 0.0], [0.0, 0.0, 0.0]])
    prices = np.full((1, 3), 1 / 4)
    assert nearest_within(np.array([2, 2, 2]), costs, prices / 0.75).tolist() == [2, 1, 0]
    assert nearest_within(np.array([2, 2, 2]), costs, prices).tolist() == [2, 2, 0]
    assert nearest_within(np.array([0, 1, 0]), costs, prices).tolist() == [2, 2, 0]
    assert nearest_within(np.array([0, 1, 1]), costs, prices).tolist() == [2, 1, 1]  # what was found stays or grows


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "channel", "tensor"])
@pytest.mark.parametrize("rate", [4, 7.7, 12, 16])
def test_rate_is_kept_to_the_bits_of_a_weight(granularity, rate, mlp, digits):
    model = instrumented(mlp, digits)
    target, options = Target(weight_rate=rate), {"granularity": granularity}
    model, scheme, history = find_scheme(model, digits, SHORT, target, method="hgq", options=options)
    widths = np.concatenate([t.widths for t in scheme.of_kind("weight")])
    size = sum(weight.numel() for weight in model.weights.values())
    assert len(widths) == size
    assert rate <= 32 * size / widths.sum() <= 32 * size / (32 * size / rate - 8)
    assert cost.weight_rate(scheme) == 32 * size / widths.sum()
    assert history["step"][-1] == 120
    assert all(len(values) == len(history["step"]) for values in history.values())
    assert scheme.found_by["granularity"] == granularity
    limits = max_thresholds_log2(instrumented(mlp, digits), digits)
    for name, weight in model.weights.items():
        m = scheme[name].format.threshold_log2
        assert 2.0 ** (m - 1) < weight.abs().max()
        assert m == limits[name] or weight.abs().max() <= 2.0**m


def test_search_is_reproducible_and_depends_on_the_seed(mlp, digits):
    def found(seed):
        model, scheme, _ = find_scheme(instrumented(mlp, digits), digits, SHORT, Target(), method="hgq", seed=seed)
        return scheme, model.layers[0].weight

    (scheme, weight), (again, same), (other, _) = found(0), found(0), found(1)
    assert scheme == again
    assert torch.equal(weight, same)
    assert scheme != other


def test_price_follows_the_bits(mlp, digits):
    *_, history = find_scheme(
        instrumented(mlp, digits), digits, Budget(search_steps=600), Target(weight_rate=14), method="hgq"
    )
    assert history["rate_target"][0] == pytest.approx(4, rel=0.03)  # eight bits each, but for the zeros among them
    assert history["rate_target"][-1] == 14
    assert history["rate_actual"][-1] == pytest.approx(14, rel=0.25)  # before the repair
    assert max(history["price"]) > 5 * history["price"][0]


def test_widths_that_cannot_move_are_repaired(mlp, digits):
    options = {"width_learning_rate": 1e-9}
    model, scheme, _ = find_scheme(
        instrumented(mlp, digits), digits, SHORT, Target(weight_rate=12), method="hgq", options=options
    )
    assert 12 <= cost.weight_rate(scheme) <= 12.1
    for name, (before, after) in scheme.found_by["repaired"].items():
        assert 7 < before <= 8
        assert after == round(scheme[name].mean_width, 2) < before
    assert evaluate(model, digits)["val_accuracy"] > 0.8


def test_tensors_have_largest_widths_of_their_own(mlp, digits):
    target = Target(weight_rate=8, tensor_bits={"linear_6.weight": (2, 3)})
    _, scheme, _ = find_scheme(instrumented(mlp, digits), digits, SHORT, target, method="hgq")
    assert scheme["linear_6.weight"].widths.max() <= 3
    assert scheme["linear_0.weight"].widths.max() > 3
    assert 8 <= cost.weight_rate(scheme) <= 8.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layer"}, "granularity 'layer': choose from weight, channel, tensor"),
        ({"width_learning_rate": 0.0}, "width_learning_rate = 0 is not positive"),
        ({"beta": 1}, "method 'hgq' has no option 'beta'; it has granularity, width_learning_rate"),
    ],
)
def test_bad_options(options, message, mlp, digits):
    with pytest.raises(InvalidInput, match=message):
        find_scheme(instrumented(mlp, digits), digits, SHORT, Target(), method="hgq", options=options)


# --- all layers with weights -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Task:
    torch.manual_seed(1)
    x, y = torch.rand(192, 2, 6, 6), torch.randint(0, 3, (192,))
    return Task(x_train=x[:128], y_train=y[:128], x_val=x[128:], y_val=y[128:], batch_size=32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 7 * 7, 3),
    )


def random_widths(model, seed=0):
    """A scheme in which each weight has any width from 0 to 6."""
    generator = np.random.default_rng(seed)

    def tensor(site):
        format_ = Fixed.from_threshold(signed=site.signed, bits=6, threshold_log2=0)
        widths = generator.integers(0, 7, site.size) if site.kind == "weight" else None
        return Tensor(name=site.name, kind=site.kind, format=format_, size=site.size, widths=widths)

    return Scheme(tuple(tensor(site) for site in model.sites), {"method": "none"})


def assert_exact(model, x):
    net = freeze(model)
    expected = reference.run(net, channels_last(x.numpy()))
    np.testing.assert_array_equal(run_codes(model, x, net.output_format), expected)
    return net


def test_widths_stay_while_fine_tuning(images, tmp_path):
    model = instrument(network(), images.input_shape, input_signed=False)
    random_widths(model).save(tmp_path / "scheme.json")
    scheme = Scheme.load(tmp_path / "scheme.json")
    model.set_scheme(scheme)
    before = {name: weight.detach().clone() for name, weight in model.weights.items()}
    assert_exact(model, images.x_val)
    finetune(model, images, steps=40, learning_rate=2e-2, seed=0)
    net = assert_exact(model, images.x_val * 4)
    assert [type(op).__name__ for op in net.linears] == ["Conv", "DepthwiseConv", "Conv", "Dense"]
    for tensor in scheme.of_kind("weight"):
        weight = model.weights[tensor.name].detach()
        codes, shift = tensor.encode(weight.flatten().numpy()), tensor.format.width - tensor.widths.astype(int)
        own = codes >> shift
        np.testing.assert_array_equal(own << shift, codes)  # on its own grid
        half = 2.0 ** (tensor.widths.astype(int) - 1)
        assert ((-half <= own) & (own < np.maximum(half, 1))).all()  # within its own width
        assert not codes[tensor.widths == 0].any()
        assert (weight != before[tensor.name]).any()
        frozen = next(op for op in net.linears if op.name == tensor.name.removesuffix(".weight"))
        assert sorted(frozen.weight.ravel()) == sorted(codes)
        assert frozen.weight_format == tensor.format


def test_a_copy_in_another_type_has_the_same_widths(images):
    model = instrument(network(), images.input_shape, input_signed=False)
    model.set_scheme(random_widths(model))
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        torch.testing.assert_close(double(images.x_val.double()), model(images.x_val).double())


def test_widths_of_another_model_are_refused(images):
    model = instrument(network(), images.input_shape, input_signed=False)
    scheme = random_widths(model)
    other = instrument(nn.Sequential(nn.Conv2d(2, 3, 3), *network()[1:2]), images.input_shape, input_signed=False)
    with pytest.raises(InvalidInput, match="differ in the tensors"):
        other.set_scheme(scheme)
    tensors = [t if t.name != "conv2d_0.weight" else copy.copy(t) for t in scheme.tensors]
    short = Tensor(name="linear_7.weight", kind="weight", format=tensors[0].format, size=3, widths=np.array([1, 2, 3]))
    swapped = Scheme(tuple(short if t.name == short.name else t for t in tensors))
    with pytest.raises(InvalidInput, match=r"'linear_7\.weight': the scheme has widths of 3 weights"):
        model.set_scheme(swapped)


@pytest.mark.parametrize("granularity", ["weight", "channel", "tensor"])
def test_search_over_all_layers_is_exact(granularity, images):
    model = instrument(network(), images.input_shape, input_signed=False)
    options, few = {"granularity": granularity}, Budget(search_steps=20)
    model, scheme, _ = find_scheme(model, images, few, Target(bops=2e5), method="hgq", options=options)
    net = assert_exact(model, images.x_val)
    bops = sum(layer.bops for layer in cost.layer_costs(net, scheme))
    assert 2e5 / 1.1 <= bops <= 2e5


def test_groups_are_those_of_outputs(images):
    """A transposed convolution has its outputs second."""
    model = instrument(network(), images.input_shape, input_signed=False)
    widths = LearntWidths(model, Target(), max_thresholds_log2(model, images), "channel")
    assert len(widths.fractions) == 4 + 4 + 3 + 3  # the two groups of the third layer share theirs
    with torch.no_grad():
        widths.fractions[4 + 4 + 1] -= 3
        weights, bits = widths()
    own = bits.split([weight.numel() for weight in weights.values()])[2].view(4, 3, 3, 3)
    assert own[:, 1].max() == 5
    assert own[:, [0, 2]].max() == 8


def test_layers_are_described_by_mean_widths(images):
    model = instrument(network(), images.input_shape, input_signed=False)
    scheme = random_widths(model)
    model.set_scheme(scheme)
    rows = [row for row in describe(model) if row.weight_bits is not None]
    assert [row.weight_bits for row in rows] == [t.mean_width for t in scheme.of_kind("weight")]
    assert sum(row.weight_share for row in rows) == pytest.approx(1)


def test_zeros_can_be_asked_for_beside_widths(mlp, digits):
    model, found, _ = find_scheme(instrumented(mlp, digits), digits, SHORT, Target(weight_rate=6), method="hgq")
    wider = widen_thresholds(model, found, 0.7)
    model.set_scheme(wider)
    assert cost.weight_rate(wider) == cost.weight_rate(found)
    for name, weight in model.weights.items():
        shares = [share_of_zeros(weight, scheme[name].format, scheme[name].widths) for scheme in (found, wider)]
        assert abs(shares[1] - 0.7) <= abs(shares[0] - 0.7)
    goal = Nonzeros(0.8)
    finetune(model, digits, steps=200, learning_rate=2e-3, seed=0, shaping=Pruning(model, goal, digits))
    zeros = np.concatenate([op.weight.ravel() for op in freeze(model).linears]) == 0
    assert zeros.mean() == pytest.approx(1 - goal.size(model))
    assert zeros.mean() >= 0.8
