from itertools import pairwise

import numpy as np
import pytest
from torch import nn

from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.deploy.rtl.trace import trace
from hmq_fpga.ir import cost
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.logic import luts, signed_digits
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.logic import start
from hmq_fpga.search.methods import METHODS, find_scheme
from hmq_fpga.search.pruning import NetworkCost, Nonzeros, Pruning, share_of_zeros, widen_thresholds
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, evaluate, finetune
from hmq_fpga.study.budgets import pruning

pytestmark = pytest.mark.once


def test_zeros_that_were_asked_for_at_the_same_rate(mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    model, found, _ = find_scheme(model, digits, Budget(search_steps=150), Target(weight_rate=8), method="uniform")
    wider = widen_thresholds(model, found, 0.6)
    assert cost.weight_rate(wider) == cost.weight_rate(found)
    for name, weight in model.weights.items():
        steps = wider[name].format.step / found[name].format.step
        assert steps in (1, 2, 4, 8)
        shares = [abs(share_of_zeros(weight, f) - 0.6) for f in (found[name].format, wider[name].format)]
        assert shares[1] <= shares[0]

    model.set_scheme(wider)
    goal = Nonzeros(0.8)
    before = 1 - goal.size(model)
    finetune(model, digits, steps=1500, learning_rate=2e-3, seed=0, shaping=Pruning(model, goal, digits))
    zeros = np.concatenate([op.weight.ravel() for op in freeze(model).linears]) == 0
    assert zeros.mean() == pytest.approx(1 - goal.size(model), abs=1e-12)
    assert before < 0.75
    assert 0.8 <= zeros.mean() < 0.83
    assert evaluate(model, digits)["val_accuracy"] > 0.85


@pytest.mark.parametrize("most", [2500, 4000])
def test_logic_is_bounded_by_the_tracers_figure(most, mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    model, scheme, _ = find_scheme(model, digits, Budget(), Target(luts=most), method="uniform")
    assert scheme.found_by["zeros"] == 0.5
    asked = []

    def measure(net):
        asked.append(trace(net).cost)
        return asked[-1]

    pruning = Pruning(model, NetworkCost("LUTs", most, measure, luts), digits)
    finetune(model, digits, steps=1500, learning_rate=2e-3, seed=0, shaping=pruning)
    assert asked[0] > most
    assert 0.85 * most <= trace(freeze(model)).cost <= most
    assert len(asked) < 32
    assert evaluate(model, digits)["val_accuracy"] > 0.7


@pytest.mark.parametrize("bound", ["luts", "ebops"])
def test_what_is_too_much_at_the_end_goes_by_cheaper_codes(bound, mlp, digits, monkeypatch):
    count, most = {"luts": (traced_luts, 2500), "ebops": (cost.ebops, 12_000)}[bound]
    target = Target(**{bound: most})
    found = []
    for room in (1.0, NetworkCost.room):
        monkeypatch.setattr(NetworkCost, "room", room)
        model = instrument(mlp, digits.input_shape, input_signed=False)
        model, _, _ = find_scheme(model, digits, Budget(), target, method="uniform")
        finetune(model, digits, steps=1500, learning_rate=2e-3, seed=0, shaping=pruning(model, target, digits))
        net = freeze(model)
        assert 0.9 * most <= count(net) <= most
        codes = np.concatenate([op.weight.ravel() for op in net.linears])
        found.append(signed_digits(codes).sum() / np.count_nonzero(codes))
    assert found[1] < found[0]


class Larger:
    """A goal whose exact measure is larger than its size: what is left at the end is pruned without training."""

    name, most, room = "as a share of weights that are not zero", 0.3, 1.0

    def __init__(self):
        self.measures = []

    def size(self, model):
        return Nonzeros(0.7).size(model)

    def measured(self, model):
        self.measures.append(1.1 * self.size(model))
        return self.measures[-1]


def test_the_last_cut_takes_no_more_than_it_must(mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    model, _, _ = find_scheme(model, digits, Budget(), Target(), method="uniform")
    goal = Larger()
    finetune(model, digits, steps=300, learning_rate=2e-3, seed=0, shaping=Pruning(model, goal, digits))
    *before, last = goal.measures
    assert 0.97 * goal.most < last <= goal.most < before[-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("bound", "most"), [("luts", 2000), ("ebops", 12_000)])
def test_every_method_leaves_room_for_what_pruning_keeps(bound, most, method, mlp, digits, budget):
    model, target = instrument(mlp, digits.input_shape, input_signed=False), Target(**{bound: most})
    model, scheme, _ = find_scheme(model, digits, budget, target, method=method)
    assert sorted(scheme) == sorted(site.name for site in model.sites)
    finetune(model, digits, steps=300, learning_rate=2e-3, seed=0, shaping=pruning(model, target, digits))
    net = freeze(model)
    assert 0.8 * most <= {"luts": traced_luts, "ebops": cost.ebops}[bound](net) <= most


HIGHEST = 32 * 2720 / (2048 * 3 + 512 * 2 + 160 * 8)


@pytest.mark.parametrize(("most", "rate", "bits"), [(1500, HIGHEST, 3), (5000, HIGHEST, 4), (1e6, 4, 8)])
def test_a_search_under_a_bound_on_logic_starts_where_there_is_something_to_prune(most, rate, bits, mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    started = start(model, Target(luts=most))
    assert (started.weight_rate, started.max_activation_bits, started.luts) == (rate, bits, most)
    assert started.choices(model)["linear_6.weight"] == (8,) != started.choices(model)["linear_4.weight"]
    equal = start(model, Target(luts=most, bits=(4, 8)), mixed=False)
    assert equal.weight_rate == min(rate, 8) and not equal.tensor_bits
    wide = start(model, Target(luts=most, tensor_bits={"linear_0.weight": (6, 8)}))
    assert wide.weight_rate == pytest.approx(min(rate, 32 * 2720 / (2048 * 6 + 512 * 2 + 160 * 8)))
    wide.check(model)
    own = Target(luts=most, weight_rate=8)
    assert start(model, own) is own


def test_weights_of_inputs_start_with_more_than_two_bits():
    model = instrument(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)), (16,), input_signed=False)
    assert start(model, Target(luts=100)).weight_rate == 10
    deep = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert start(instrument(deep, (16,), input_signed=False), Target(luts=100)).weight_rate == 13


def test_less_than_a_weight_in_each_layer_is_refused_before_training(mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    for bound in ("luts", "ebops"):
        with pytest.raises(InvalidInput, match=rf"1 {bound[:-1].upper()}s are out of reach: .* needs about \d+"):
            find_scheme(model, digits, Budget(), Target(**{bound: 1}), method="uniform")


def test_a_bound_that_leaves_no_way_to_the_outputs_is_said_with_what_did(mlp, digits):
    model, target = instrument(mlp, digits.input_shape, input_signed=False), Target(luts=20)
    model, _, _ = find_scheme(model, digits, Budget(), target, method="uniform")
    with pytest.raises(InvalidInput, match=r"20 LUTs are out of reach: .* no output depends on an input") as refused:
        finetune(model, digits, steps=300, learning_rate=2e-3, seed=0, shaping=pruning(model, target, digits))
    nearest = float(str(refused.value).split(" has ")[1].split(":")[0].replace(",", ""))
    assert 20 < nearest < 2000


def test_what_was_pruned_stays_zero(mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    model, _, _ = find_scheme(model, digits, Budget(), Target(), method="uniform")
    pruning = Pruning(model, Nonzeros(0.8), digits)
    zeros = []

    def watched(step, steps):
        pruning(step, steps)
        zeros.append({name: (weight == 0).clone() for name, weight in model.weights.items()})

    finetune(model, digits, steps=300, learning_rate=2e-3, seed=0, shaping=watched)
    for before, after in pairwise(zeros):
        assert all((after[name] >= before[name]).all() for name in before)
    shares = [np.mean([float(mask.double().mean()) for mask in now.values()]) for now in zeros]
    assert shares[0] == 0
    assert shares[100] < shares[170] <= shares[-1]


@pytest.mark.parametrize("method", ["msqe", "pot_gradient"])
def test_one_width_for_all_weights_is_kept_under_a_bound_on_logic(method, mlp, digits, budget):
    """Though weights of outputs, where they are few, would get the widest."""
    model = instrument(mlp, digits.input_shape, input_signed=False)
    _, scheme, _ = find_scheme(model, digits, budget, Target(luts=2000), method=method, options={"widths": "uniform"})
    assert len({tensor.format.width for tensor in scheme.of_kind("weight")}) == 1


def test_training_leaves_no_more_to_polishing_than_it_can_do(mlp, digits, monkeypatch):
    """Where it could not, what is left is pruned without training, which cost letters at 20,000 LUTs 13 points."""
    model, target = instrument(mlp, digits.input_shape, input_signed=False), Target(luts=2500)
    model, _, _ = find_scheme(model, digits, Budget(), target, method="uniform")
    left = []
    monkeypatch.setattr(
        "hmq_fpga.search.pruning.polish", lambda *args, **kwargs: left.append(traced_luts(freeze(args[0])))
    )
    finetune(model, digits, steps=100, learning_rate=2e-3, seed=0, shaping=pruning(model, target, digits))
    assert all(luts < 1.04 * target.luts for luts in left)
