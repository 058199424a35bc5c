import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hmq_fpga.ir import cost, reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search import kernels
from hmq_fpga.search.calibrate import max_thresholds_log2
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.search.layers import Function
from hmq_fpga.search.methods import METHODS, find_scheme
from hmq_fpga.search.methods.hmq import HmqOptions, Schedule, missed_rate_slope
from hmq_fpga.search.methods.widths import rises
from hmq_fpga.search.optimizer import BETAS, RAdam
from hmq_fpga.search.quantizers import Grid
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Bound, Target, cheapest_bits, meets
from hmq_fpga.search.train import Budget, Recorder, evaluate, finetune, fit

pytestmark = pytest.mark.once


def instrumented(mlp, digits):
    return instrument(mlp, digits.input_shape, input_signed=digits.input_signed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [4, 8, 16])
def test_every_method_keeps_its_promise_and_stays_exact(method, rate, mlp, digits, budget):
    model, scheme, _ = find_scheme(instrumented(mlp, digits), digits, budget, Target(weight_rate=rate), method=method)
    assert rate <= cost.weight_rate(scheme) <= 1.1 * rate
    assert cost.activation_rate(model.moments, model.formats) >= 4
    assert scheme.found_by["method"] == method
    finetune(model, digits, steps=budget.finetune_steps, learning_rate=2e-3, seed=0)
    assert {name: scheme[name].format for name in scheme} == dict(model.formats)
    net = freeze(model)
    x = digits.x_val * 8
    np.testing.assert_array_equal(run_codes(model, x, net.output_format), reference.run(net, x.numpy()))
    if rate <= 8:
        assert evaluate(model, digits)["val_accuracy"] > 0.85


@pytest.mark.parametrize("rate", [5, 6.5, 10, 12, 15.5])
def test_hmq_rates_between_the_uniform_ones(rate, mlp, digits):
    short = Budget(search_steps=150)
    _, scheme, history = find_scheme(instrumented(mlp, digits), digits, short, Target(weight_rate=rate))
    assert rate <= cost.weight_rate(scheme) <= 1.1 * rate
    assert history["step"][-1] == 150
    assert all(len(values) == len(history["step"]) for values in history.values())


def test_search_is_reproducible_and_depends_on_the_seed(mlp, digits):
    short = Budget(search_steps=150)

    def weights(seed):
        return find_scheme(instrumented(mlp, digits), digits, short, Target(), seed=seed)[0].layers[0].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_one_scheme_and_news_are_the_history(method, mlp, digits):
    def search():
        heard = []
        model, scheme, history = find_scheme(
            instrumented(mlp, digits),
            digits,
            Budget(search_steps=150),
            Target(weight_rate=10),
            method=method,
            seed=3,
            listener=lambda *news: heard.append(news),
        )
        return scheme, model.weights, history, heard

    (scheme, weights, history, heard), (again, same, _, _) = search(), search()
    assert scheme == again
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert heard
    if history:
        assert history["step"] == [step for step, _, _ in heard]


def test_schedule_is_the_papers():
    schedule = Schedule(steps=600, options=HmqOptions())
    assert [schedule.rising(12, 100 * c) for c in range(6)] == [6, 8, 10, 12, 12, 12]
    assert [schedule.rising(8, 100 * c) for c in range(6)] == [5, 6, 7, 8, 8, 8]
    for start in range(0, 600, 100):
        assert schedule.temperature(start) == 1.0
        assert schedule.temperature(start + 40) == pytest.approx(math.exp(-1e-2 * 50))
        assert schedule.temperature(start + 99) == 0.5


@pytest.mark.parametrize("target", [4.0, 7.0, 16.0])
def test_penalty_has_the_papers_gradient(target):
    """Against autograd on Eq. 8."""
    for mean_bits in (2.5, 4.6, 7.9):
        log_bits = torch.tensor(math.log(mean_bits), dtype=torch.float64, requires_grad=True)
        expected = 32 / log_bits.exp()
        (slope,) = torch.autograd.grad((torch.relu(target - expected) / target).square(), log_bits)
        assert missed_rate_slope(expected.item(), target) == pytest.approx(slope.item())


def test_thresholds_cover_the_training_set(mlp, digits):
    model = instrumented(mlp, digits)
    limits = max_thresholds_log2(model, digits)
    assert limits["input"] == 0  # digits reach 1.0 exactly
    for name, weight in model.weights.items():
        assert 2.0 ** (limits[name] - 1) < weight.abs().max() <= 2.0 ** limits[name]


def test_activation_bits_follow_eq_11(mlp, digits):
    model = instrumented(mlp, digits)  # input 64, activations 32 and 16
    assert set(Target(activation_rate=4).activation_bits(model).values()) == {8}
    assert list(Target(activation_rate=16).activation_bits(model).values()) == [2, 4, 8]
    assert list(Target(activation_rate=16, max_activation_bits=3).activation_bits(model).values()) == [2, 3, 3]
    with pytest.raises(
        InvalidInput, match=r"R_a = 40 leaves tensor 'input' \(held among 64 values\) under 1 bit.*up to 32"
    ):
        Target(activation_rate=40).check(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_rate": 3.9}, "R_w = 3.9 cannot be reached with bit-widths 2 … 8: choose from 4 to 16"),
        ({"weight_rate": 17}, "choose from 4 to 16"),
        ({"weight_rate": float("nan")}, "cannot be reached"),
        ({"activation_rate": -1}, "not positive"),
        ({"bits": (4, 2)}, "ascending"),
        ({"bits": ()}, "ascending"),
        ({"max_activation_bits": 0}, "within 1 … 16"),
    ],
)
def test_unreachable_targets(settings, message):
    with pytest.raises(InvalidInput, match=message):
        Target(**settings)


OWN_BITS = {"*": (2, 3, 4, 5), "linear_6.weight": (6, 8), "relu_*": (3,)}  # the last that matches counts


@pytest.mark.parametrize("rate", [7, 10, 13])
@pytest.mark.parametrize("options", [{}, {"logit_learning_rate": 1e-9}], ids=["search", "repair"])
def test_bits_of_single_tensors(rate, options, mlp, digits):
    target = Target(weight_rate=rate, tensor_bits=OWN_BITS)
    model, scheme, _ = find_scheme(instrumented(mlp, digits), digits, Budget(search_steps=150), target, options=options)
    assert rate <= cost.weight_rate(scheme) <= 1.1 * rate
    bits = {name: tensor.width for name, tensor in model.formats.items()}
    assert bits.pop("linear_6.weight") in (6, 8)
    assert (bits.pop("relu_2"), bits.pop("relu_5")) == (3, 3)
    assert max(bits.values()) <= 5


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        ({"tensor_bits": {"linear_3.weight": (8,)}}, "hmq", "no tensor is called 'linear_3.weight'; there are input, "),
        ({"tensor_bits": {"linear_6.*": (4, 2)}}, "hmq", r"bit-widths \[4, 2\] of 'linear_6\.\*': give ascending"),
        ({"tensor_bits": OWN_BITS, "weight_rate": 15}, "hmq", "R_w = 15 cannot be .* choose from 6.19 to 14.31"),
        ({"tensor_bits": OWN_BITS}, "uniform", "leave out tensor_bits"),
    ],
)
def test_bits_of_single_tensors_that_cannot_be(settings, method, message, mlp, digits, budget):
    with pytest.raises(InvalidInput, match=message):
        find_scheme(instrumented(mlp, digits), digits, budget, Target(**settings), method=method)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("annealing", {}, "unknown method 'annealing'; there are hawq, hgq, hmq, msqe, pot_gradient, uniform, zeroq"),
        ("hmq", {"penatly": 1}, "no option 'penatly'; it has penalty"),
        ("hmq", {"expected_bits": "x"}, "gumbel, softmax"),
        ("uniform", {"threshold": "x"}, "least_error, maximum"),
        ("hawq", {"sensitivity": "x"}, "trace, eigenvalue"),
        ("hawq", {"least_probes": 300}, "300 to 200 probes: give at least 1"),
        ("hawq", {"tolerance": -1}, "tolerance -1 is negative"),
        ("zeroq", {"samples": 1}, "at least 2 samples"),
        ("zeroq", {"distance": "x"}, "kl, squared"),
        ("msqe", {"widths": "x"}, "widths 'x': choose from mixed, uniform"),
        ("msqe", {"robust": "x"}, "none, outliers, gradient"),
        ("msqe", {"margin": 1}, "within 0 … 1"),
        ("pot_gradient", {"widths": "x"}, "mixed, uniform"),
        ("pot_gradient", {"turns": 0}, "turns at least 1"),
    ],
)
def test_bad_options(method, options, message, mlp, digits, budget):
    with pytest.raises(InvalidInput, match=message):
        find_scheme(instrumented(mlp, digits), digits, budget, Target(), method=method, options=options)


def test_too_short_a_search_is_refused(mlp, digits):
    with pytest.raises(InvalidInput, match="search_steps = 100: hmq needs at least 150"):
        find_scheme(instrumented(mlp, digits), digits, Budget(search_steps=100), Target())


def test_repair_is_recorded(mlp, digits):
    """Logits that cannot move leave all weights at 8 bits; the promise is kept all the same."""
    options = {"logit_learning_rate": 1e-9}
    _, scheme, _ = find_scheme(
        instrumented(mlp, digits), digits, Budget(search_steps=150), Target(weight_rate=12), options=options
    )
    assert 12 <= cost.weight_rate(scheme) <= 13.2
    repaired = scheme.found_by["repaired"]
    assert repaired
    assert all(before == 8 and scheme[name].format.width == after for name, (before, after) in repaired.items())


class Twice(nn.Module):
    """A layer that is used twice, and a shortcut past it."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        y = torch.tanh(self.middle(x)) + x
        return self.last(F.relu(self.middle(y)))


def test_rises_are_those_of_whole_passes(digits):
    """What comes before a changed tensor is not computed again."""
    torch.manual_seed(0)
    model = instrument(Twice(), digits.input_shape)
    _, scheme, _ = find_scheme(model, digits, Budget(search_steps=150), Target(weight_rate=4), method="uniform")
    formats = {name: scheme[name].format for name in scheme}
    candidates = {name: {bits: f.narrowed(bits) for bits in (1, 2, f.width)} for name, f in formats.items()}
    x, y = digits.samples("train").head(4096)

    def loss(name, changed):
        with torch.no_grad():
            output = model(x, {n: Grid.of(f) for n, f in {**formats, name: changed}.items()})
        return float(digits.loss(output, y))

    calls = []
    (tanh,) = (layer for layer in model.layers if isinstance(layer, Function))
    with tanh.register_forward_hook(lambda *_: calls.append(1)):
        found = rises(model, digits, formats, candidates)
    assert len(calls) < sum(map(len, candidates.values()))
    assert set(found) == set(formats)
    for name, of_each in found.items():
        expected = {bits: loss(name, f) - loss(name, formats[name]) for bits, f in candidates[name].items()}
        assert of_each == pytest.approx(expected, abs=1e-5), name
        assert max(abs(rise) for rise in of_each.values()) > 1e-4, name


def bound(most, *, of="weights", **prices):
    return Bound(name="cost", prices=prices, most=most, of=of)


def test_repair_takes_the_cheapest_moves():
    figures = {"a": [0.9, 0.5, 0.0], "b": [0.1, 0.05, 0.0], "c": [0.2, 0.01, 0.0]}
    costs = {name: dict(zip((2, 4, 8), row, strict=True)) for name, row in figures.items()}
    rate_6 = bound(300 * 32 / 6, a=100, b=100, c=100)
    assert cheapest_bits(costs, [rate_6]) == {"a": 8, "b": 4, "c": 4}  # mean 5.33 bits allowed, at least 4.85
    assert cheapest_bits(costs | {"a": {4: 0.0}}, [rate_6]) == {"a": 4, "b": 8, "c": 4}  # it may get no other
    dear = bound(1300, a=200, b=10, c=10)
    assert cheapest_bits(costs, [rate_6, dear]) == {"a": 4, "b": 8, "c": 4}  # of two bounds one is used up
    lower = {"d": {2: 0.0, 4: 0.1}}  # an activation, bounded by itself
    other = bound(40, of="activations", d=10)
    both = cheapest_bits(costs | lower, [rate_6, other])
    assert both == {"a": 8, "b": 4, "c": 4, "d": 4}
    assert meets(both, [rate_6, other])
    assert not meets({"a": 2, "b": 2, "c": 2, "d": 4}, [rate_6, other])  # what is left of one excuses none of another
    assert not meets(both | {"d": 2}, [rate_6, other])
    lone = cheapest_bits({"a": {2: 0.0, 4: 0.0, 8: 0.0}}, [bound(32 / 9, a=1)])
    assert lone == {"a": 2}  # only 2, 4 and 8 can be had: the closest below the bound
    assert not meets(lone, [bound(32 / 9, a=1)])
    with pytest.raises(InvalidInput, match="no bit-widths keep cost and cost"):
        cheapest_bits({"a": {2: 0.0}, "b": {2: 0.0}}, [bound(3, a=1, b=1), bound(9, a=1, b=1)])


@given(
    st.lists(st.dictionaries(st.sampled_from([2, 3, 4, 6, 8]), st.integers(0, 9), min_size=1), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(10, 200)), min_size=1, max_size=2
    ),
)
def test_cheapest_bits_are_those_of_trying_all(choices, rows):
    costs = {str(i): choice for i, choice in enumerate(choices)}
    bounds = [bound(most, **dict(zip(costs, prices, strict=False))) for prices, most in rows]
    all_bits = [dict(zip(costs, bits, strict=True)) for bits in itertools.product(*choices)]
    kept = [bits for bits in all_bits if all(b.cost(bits) <= b.most for b in bounds)]
    if not kept:
        with pytest.raises(InvalidInput):
            cheapest_bits(costs, bounds)
        return
    found = cheapest_bits(costs, bounds)
    assert found in kept
    if used_up := [bits for bits in kept if meets(bits, bounds)]:
        assert meets(found, bounds)
        cost_of = [sum(costs[name][width] for name, width in bits.items()) for bits in (found, *used_up)]
        assert cost_of[0] == pytest.approx(min(cost_of), abs=1e-3)  # the solver's own gap is 1e-4 of it


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget_of", ["weight_bits", "bops"])
def test_every_method_keeps_other_bounds(method, budget_of, mlp, digits, budget):
    model = instrumented(mlp, digits)
    eight = Target().bounds(model)[0].most * 2
    most = {"weight_bits": eight / 2, "bops": 8 * eight / 2.5}[budget_of]
    model, scheme, _ = find_scheme(model, digits, budget, Target(**{budget_of: most}), method=method)
    layers = cost.layer_costs(freeze(model), scheme)
    actual = {"weight_bits": cost.weight_bits(scheme), "bops": sum(layer.bops for layer in layers)}[budget_of]
    least = 0.6 if method == "uniform" else 1 / 1.1  # which has whole bits only
    assert least * most <= actual <= most


def test_both_of_two_bounds_are_kept(mlp, digits, budget):
    """The first layer, which reads eight bits as the others do, has the most products: bit operations press there."""
    model = instrumented(mlp, digits)
    target = Target(weight_rate=8, bops=8 * 5 * 2600)
    model, scheme, _ = find_scheme(model, digits, budget, target)
    assert cost.weight_rate(scheme) >= 8
    assert sum(layer.bops for layer in cost.layer_costs(freeze(model))) <= 8 * 5 * 2600


def test_bounds_out_of_reach(mlp, digits):
    model = instrumented(mlp, digits)
    with pytest.raises(InvalidInput, match=r"1,000 bit operations are out of reach: the narrowest weights need 43,520"):
        Target(bops=1000).check(model)
    with pytest.raises(InvalidInput, match="weight bits are out of reach"):
        Target(weight_rate=8, weight_bits=100).check(model)
    Target(bops=1e9).check(model)  # more than the widest weights need


def test_divergence_is_an_error(mlp, digits):
    model = copy.deepcopy(mlp)
    with pytest.raises(FloatingPointError, match="loss became"):
        fit(model, digits, steps=50, learning_rate=1e25, seed=0)


def test_listener_hears_what_is_recorded(mlp, digits):
    heard = []
    history = fit(
        copy.deepcopy(mlp), digits, steps=60, learning_rate=1e-3, seed=0, listener=lambda *news: heard.append(news)
    )
    assert [step for step, _, _ in heard] == history["step"]
    assert heard[-1][:2] == (60, 60)
    assert set(Recorder().history) == set()


@pytest.mark.parametrize("plain", [False, True])
def test_optimizer_is_pytorchs(plain, mlp, digits, monkeypatch):
    """Its RAdam on the single parameters, with a layer that gets no gradient and a second learning rate."""
    if plain:
        monkeypatch.setattr(kernels, "_descend", None)
        monkeypatch.setattr(kernels, "descend", kernels._plain_descend)
    model = torch.nn.ModuleDict({"used": copy.deepcopy(mlp), "unused": torch.nn.Linear(2, 2)})
    model["scale"] = torch.nn.Linear(10, 1)  # learns faster
    oracle = copy.deepcopy(model)

    def groups(net):
        faster = set(net["scale"].parameters())
        return ([p for p in net.parameters() if p not in faster], 1e-3), (list(faster), 3e-2)

    ours = RAdam(*groups(model))
    expected = torch.optim.RAdam([{"params": members, "lr": rate} for members, rate in groups(oracle)], betas=BETAS)
    for x in digits.x_train[:640].split(64):
        losses = [net["scale"](net["used"](x)).square().mean() for net in (model, oracle)]
        ours.step(losses[0])
        expected.zero_grad()
        losses[1].backward()
        expected.step()
    ours.release()
    for parameter, other in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-5)
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        assert parameter.grad is None


def test_optimizer_keeps_the_order_of_memory(digits):
    """Channels last stay so, and are stepped as PyTorch's own RAdam steps them; in lower precision likewise."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 10)
    model = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    oracle = copy.deepcopy(model)
    ours, expected = RAdam((model.parameters(), 1e-2)), torch.optim.RAdam(oracle.parameters(), lr=1e-2, betas=BETAS)
    strides = model[1].weight.stride()
    assert not model[1].weight.is_contiguous()
    x = digits.x_train.view(-1, 1, 8, 8)
    for batch in x[:640].split(64):
        ours.step(model(batch).square().mean())
        assert model[1].weight.stride() == strides
        expected.zero_grad()
        oracle(batch).square().mean().backward()
        expected.step()
    ours.release()
    for parameter, other in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)
    task = replace(digits, x_train=x, x_val=digits.x_val.view(-1, 1, 8, 8))
    fit(model, task, steps=200, learning_rate=5e-3, seed=0, autocast=torch.bfloat16)
    assert model[1].weight.stride() == strides
    assert model[1].weight.dtype == torch.float32
    assert evaluate(model, task)["val_accuracy"] > 0.8
