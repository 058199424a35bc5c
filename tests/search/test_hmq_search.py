"""Phase one in training loops of other people."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hmq_fpga as hmq
from hmq_fpga.ir import cost
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.methods.hmq import HmqOptions
from hmq_fpga.search.quantizers import THRESHOLDS
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, batches, evaluate, fit

pytestmark = pytest.mark.once

STEPS, SEED = 300, 3
TARGET = Target(weight_rate=10, activation_rate=8)


def instrumented(mlp, digits):
    return instrument(mlp, digits.input_shape)


def shuffled(digits, start=0):
    return batches(digits, STEPS, torch.Generator().manual_seed(SEED), start)


@pytest.fixture(scope="module")
def found(mlp, digits):
    """By `find_scheme`."""
    return find_scheme(instrumented(mlp, digits), digits, Budget(search_steps=STEPS), TARGET, seed=SEED)[:2]


def test_a_loop_of_ones_own_finds_the_same(found, mlp, digits):
    quantized = instrumented(mlp, digits)
    search = hmq.HmqSearch(quantized, TARGET, STEPS, task=digits, seed=SEED)
    for x, y in shuffled(digits):
        search.step(F.cross_entropy(search(x), y))
    model, scheme = found
    assert search.finish() == scheme == quantized.scheme
    for name, weight in model.weights.items():
        assert torch.equal(quantized.weights[name], weight)


def test_an_optimizer_of_ones_own(mlp, digits):
    """PyTorch's RAdam; the same when stopped and continued by state dicts, as Lightning does it."""

    def started():
        search = hmq.HmqSearch(instrumented(mlp, digits), TARGET, STEPS, task=digits, seed=SEED)
        return search, torch.optim.RAdam(search.parameter_groups())

    def searched(stop):
        search, optimizer = started()
        for step, (x, y) in enumerate(shuffled(digits)):
            if step == stop:
                states = [part.state_dict() for part in (search, optimizer)]
                search, optimizer = started()
                for part, state in zip((search, optimizer), states, strict=True):
                    part.load_state_dict(state)
            optimizer.zero_grad()
            (F.cross_entropy(search(x), y) + search.penalty()).backward()
            optimizer.step()
            search.advance()
        return search.finish(), search.model

    (scheme, model), (same, again) = searched(None), searched(120)
    assert scheme == same
    assert all(torch.equal(again.weights[name], weight) for name, weight in model.weights.items())
    assert 10 <= cost.weight_rate(scheme) <= 11
    assert evaluate(model, digits)["val_accuracy"] > 0.85


def test_evaluation_is_through_the_largest_logits(mlp, digits):
    search = hmq.HmqSearch(instrumented(mlp, digits), TARGET, STEPS, task=digits)
    first, second = search(digits.x_val), search(digits.x_val)
    assert not torch.equal(first, second)  # new noise
    search.eval()
    first, second = search(digits.x_val), search(digits.x_val)
    assert torch.equal(first, second)
    formats = search.formats()
    assert {f.width for name, f in formats.items() if name.endswith(".weight")} == {8}  # where the logits start


def test_what_a_search_refuses(mlp, digits):
    model = instrumented(mlp, digits)
    with pytest.raises(InvalidInput, match="100 steps: a search by hmq needs at least 150"):
        hmq.HmqSearch(model, TARGET, 100, task=digits)
    with pytest.raises(InvalidInput, match="give HmqSearch R_w too, or use find_scheme"):
        hmq.HmqSearch(model, Target(luts=1000), STEPS, task=digits)
    with pytest.raises(InvalidInput, match="compute the output before it"):
        hmq.HmqSearch(model, TARGET, STEPS, task=digits, options=HmqOptions(penalty=1.0)).penalty()


def test_activation_widths_are_learnt_within_what_all_had_together(mlp, digits):
    """At R_a = 16 Eq. 11 gives the 64 inputs two bits each; of as many together, some get more."""
    target = Target(weight_rate=10, activation_rate=16)
    model = instrumented(mlp, digits)
    given = target.activation_bits(model)
    options = {"activation_widths": "learnt"}
    model, scheme, _ = find_scheme(model, digits, Budget(search_steps=STEPS), target, options=options, seed=SEED)
    sizes = {site.name: site.size for site in model.sites}
    most = sum(bits * sizes[name] for name, bits in given.items())
    learnt = {name: scheme[name].format.width for name in given}
    assert 0.9 * most <= sum(bits * sizes[name] for name, bits in learnt.items()) <= most
    assert learnt != given
    assert 10 <= cost.weight_rate(scheme) <= 11
    with pytest.raises(InvalidInput, match="what a bit operation costs depends on them"):
        find_scheme(instrumented(mlp, digits), digits, Budget(), Target(bops=1e5), options=options)


def test_a_threshold_that_leaves_nothing_of_a_weight_is_not_kept(mlp, digits, monkeypatch):
    """The search of one run in forty ended with such a one, and with a tenth of the digits right."""
    model = instrumented(mlp, digits)
    search = hmq.HmqSearch(model, Target(weight_rate=4), STEPS, task=digits)
    found = search.formats()
    name, largest = "linear_4.weight", found["linear_4.weight"].threshold_log2
    lost = Fixed.from_threshold(signed=True, bits=8, threshold_log2=largest - THRESHOLDS + 1)
    monkeypatch.setattr(search, "formats", lambda: {**found, name: lost})
    scheme = search.finish()
    assert scheme.found_by["restored"] == {name: [lost.threshold_log2, scheme[name].format.threshold_log2]}
    assert scheme[name].format.width == 8
    assert scheme[name].format.threshold_log2 >= largest - 1
    assert evaluate(model, digits)["val_accuracy"] > 0.8


def test_a_lost_layer_that_all_leads_through_is_restored_whatever_the_loss(mlp, digits, monkeypatch):
    """Without it nothing learns."""
    mlp = copy.deepcopy(mlp)
    with torch.no_grad():
        mlp[4].weight.mul_(-8)
    search = hmq.HmqSearch(instrumented(mlp, digits), Target(weight_rate=4), STEPS, task=digits)
    lost = Fixed.from_threshold(signed=True, bits=8, threshold_log2=-20)
    found = {**search.formats(), "linear_4.weight": lost}
    monkeypatch.setattr(search, "formats", lambda: found)
    assert "linear_4.weight" in search.finish().found_by["restored"]


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(F.relu(x + self.inner(x)))


@pytest.mark.parametrize("learnt", [False, True])
def test_a_lost_layer_beside_a_shortcut_is_restored_where_that_helps(digits, monkeypatch, learnt):
    """A network that has learnt without it does not know what it would say."""
    torch.manual_seed(0)
    net = Shortcut()
    net.inner.requires_grad_(learnt)
    if not learnt:
        nn.init.zeros_(net.inner.weight)
    fit(net, digits, steps=200, learning_rate=1e-2, seed=0)
    if not learnt:
        nn.init.normal_(net.inner.weight)
    model = instrumented(net, digits)
    search = hmq.HmqSearch(model, Target(weight_rate=4), STEPS, task=digits)
    lost = Fixed.from_threshold(signed=True, bits=8, threshold_log2=-20)
    found = {**search.formats(), "inner.weight": lost}
    monkeypatch.setattr(search, "formats", lambda: found)
    scheme = search.finish()
    assert ("inner.weight" in scheme.found_by.get("restored", {})) == learnt
    assert (scheme["inner.weight"].format == lost) != learnt
    assert evaluate(model, digits)["val_accuracy"] > 0.85


def test_headroom_is_a_larger_threshold_for_weights_alone(mlp, digits):
    def limits(headroom):
        options = HmqOptions(headroom=headroom)
        search = hmq.HmqSearch(instrumented(mlp, digits), TARGET, STEPS, task=digits, options=options).eval()
        return {name: f.threshold_log2 for name, f in search.formats().items()}  # the largest, where logits start

    paper, wider = limits(0), limits(1)
    assert {name: wider[name] - paper[name] for name in paper} == {
        name: int(name.endswith(".weight")) for name in paper
    }


def test_weights_decay_by_their_rate(mlp, digits):
    search = hmq.HmqSearch(
        instrumented(mlp, digits), TARGET, STEPS, task=digits, options=HmqOptions(weight_decay=0.5), learning_rate=0.1
    )
    before = {name: weight.clone() for name, weight in search.model.weights.items()}
    search.advance()
    for name, weight in search.model.weights.items():
        torch.testing.assert_close(weight, before[name] * 0.95)


def test_noise_of_slices_averages_to_the_distribution(mlp, digits):
    """Each sample and each input channel is drawn for itself; what comes of it keeps the promise."""
    model = instrumented(mlp, digits)
    search = hmq.HmqSearch(model, TARGET, STEPS, task=digits, options=HmqOptions(noise="slice"))
    alike = digits.x_train[:1].expand(64, -1)
    assert len(search(alike).unique(dim=0)) > 32
    found = search.blocks.sample_slices(1.0, [20_000] * len(search.formats()), torch.Generator().manual_seed(0))
    for drawn, p in zip(found, search.blocks.probabilities(), strict=True):
        shares = torch.bincount(drawn.argmax(1), minlength=len(p)) / len(drawn)
        torch.testing.assert_close(shares, p, rtol=0, atol=0.02)
    options = {"noise": "slice"}
    _, scheme, _ = find_scheme(
        instrumented(mlp, digits), digits, Budget(search_steps=STEPS), TARGET, options=options, seed=SEED
    )
    assert 10 <= cost.weight_rate(scheme) <= 11
