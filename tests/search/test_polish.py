import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from hmq_fpga.ir.logic import signed_digits
from hmq_fpga.search.deviations import input_deviations
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.polish import changes, cheaper, polish, within_reach
from hmq_fpga.search.quantizers import fake_quantize, grid_of
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.samples import InMemory, Weighted
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, evaluate

pytestmark = pytest.mark.once


def never():
    return False


@pytest.fixture(scope="module")
def trained(mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    return find_scheme(model, digits, Budget(search_steps=300), Target(weight_rate=7), method="uniform")[0]


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@pytest.fixture(scope="module")
def deviations(trained, digits):
    return input_deviations(trained, digits.x_train)


def codes(model):
    return np.concatenate([op.weight.ravel() for op in freeze(model).linears])


def digits_of(model):
    return int(signed_digits(codes(model)).sum())


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (1, [(0, 1)]),
        (-4, [(0, 1)]),
        (3, [(0, 2), (2, 1), (4, 1)]),
        (-3, [(-4, 1), (-2, 1), (0, 2)]),
        (7, [(0, 2), (4, 1)]),  # 8 is out of range
        (-7, [(-8, 1), (-4, 1), (0, 2)]),
        (5, [(0, 2), (4, 1)]),
    ],
)
def test_cheaper_codes_next_to_one(code, found):
    assert cheaper(code, -8, 7) == tuple(found)


def test_codes_lose_digits_and_the_network_neither_score_nor_loss(model, digits, deviations, monkeypatch):
    monkeypatch.setattr("hmq_fpga.search.polish.TOLERANCES", (0.0,))
    before, scheme, zeros = evaluate(model, digits), model.scheme, codes(model) == 0
    asked = []
    count = polish(model, digits, deviations, enough=lambda: asked.append(digits_of(model)), samples=4e5)
    assert count == len(asked) > 10
    assert all(np.diff(asked) < 0)  # each change that stays saves some
    assert (codes(model)[zeros] == 0).all()
    assert model.scheme is scheme
    after = evaluate(model, digits)
    assert after["val_accuracy"] >= before["val_accuracy"]
    assert after["val_loss"] <= before["val_loss"]


def test_only_as_many_as_are_enough(model, digits, deviations):
    before = codes(model)
    assert polish(model, digits, deviations, enough=lambda: True, samples=1e9) == 1
    assert (codes(model) != before).sum() == 1


def test_how_many_weights_samples_are_enough_for(digits):
    assert within_reach(digits, 6250) == 1  # 1,250 samples, of four trials and of the one that stays
    assert within_reach(digits, 625_000) == 100


def test_no_more_samples_than_may_be_computed(model, digits, deviations):
    before = codes(model)
    assert polish(model, digits, deviations, enough=never, samples=1000) == 0
    assert (codes(model) == before).all()


def test_where_nothing_is_left_that_costs_nothing_the_loss_may_grow_a_little(
    trained, model, digits, deviations, monkeypatch
):
    exact = copy.deepcopy(model)
    monkeypatch.setattr("hmq_fpga.search.polish.TOLERANCES", (0.0,))
    polish(exact, digits, deviations, enough=never, samples=1e9)
    monkeypatch.setattr("hmq_fpga.search.polish.TOLERANCES", (0.0, 0.05))
    polish(model, digits, deviations, enough=never, samples=1e9)
    assert digits_of(model) < digits_of(exact)
    for x, y in ((digits.x_val, digits.y_val), (digits.x_train, digits.y_train)):
        before, same, more = (
            evaluate(of, replace(digits, x_val=x, y_val=y))["val_loss"] for of in (trained, exact, model)
        )
        assert same <= before * (1 + 1e-6)
        assert more <= before * 1.05 * (1 + 1e-6)


def test_least_goes_first_and_what_multiplies_constants_before_all(model, deviations):
    still = {name: torch.ones_like(of) for name, of in deviations.items()}
    still["linear_0.weight"][..., 20] = 1e-6
    first, *_ = found = changes(model, still)
    assert first.site == "linear_0.weight"
    assert first.element[1] == 20
    assert [change.worth for change in found] == sorted(change.worth for change in found)


def test_widths_of_single_weights_are_kept(mlp, digits, budget):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    model, scheme, _ = find_scheme(model, digits, budget, Target(weight_rate=6), method="hgq")
    assert any(tensor.widths is not None for tensor in scheme.of_kind("weight"))
    unpolished = copy.deepcopy(model)
    count = polish(model, digits, input_deviations(model, digits.x_train), enough=never, samples=4e5)
    assert count
    changed = 0
    for tensor in scheme.of_kind("weight"):
        was, now = unpolished.weights[tensor.name], model.weights[tensor.name]
        grid = grid_of(tensor.format, tensor.widths, now)
        new = was != now
        assert torch.equal(fake_quantize(now.detach(), grid)[new], now[new])
        changed += int(new.sum())
    assert changed == count


def test_weighted_samples_and_streams_judge_as_those_in_memory(model, digits, deviations):
    weighted = replace(digits, w_train=torch.ones(1000), w_val=torch.ones(250))
    streams = {
        "train": InMemory(digits.x_train, Weighted(digits.y_train, torch.ones(1000))),
        "val": InMemory(digits.x_val, Weighted(digits.y_val, torch.ones(250))),
    }
    streamed = replace(digits, x_train=digits.x_train[:0], x_val=digits.x_val[:0], streams=streams)
    found = []
    for task in (digits, weighted, streamed):
        polished = copy.deepcopy(model)
        polish(polished, task, deviations, enough=never, samples=2e5)
        found.append(codes(polished))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
