"""What samples reach, what is made for the rest, and what is said to be out of reach."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings

from hmq_fpga.deploy.bounds import Relaxation
from hmq_fpga.deploy.coverage import EVENTS, Tally, quantizer_events
from hmq_fpga.deploy.decide import decide_ends
from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.reach import Reach
from hmq_fpga.deploy.samples import made_samples
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, Input, Quantize
from tests.deploy.networks import Builder, scheme
from tests.strategies import SEEDS, inputs, qnets


def covered(net: QNet, x: np.ndarray):
    tally = Tally(net)
    tally.add(x.astype(np.float32), "data")
    made = made_samples(net, tally)
    return made, tally.coverage()


def test_events_of_a_quantizer():
    """Quarters, rounded to whole numbers of three bits: -4 … 3."""
    codes = np.array([-19, -18, -16, -14, -10, -2, 0, 2, 6, 10, 12, 14, 15])
    seen = quantizer_events(Fixed(signed=True, width=3, frac=0), codes, 2)
    found = {event: codes[hits].tolist() for event, hits in seen.items()}
    assert found == {
        "low": [-19, -18, -16, -14],
        "high": [12, 14, 15],
        "below": [-19],  # a tie to -4 is not
        "above": [14, 15],
        "tie_down": [-14, 2, 10],
        "tie_up": [-10, -2, 6],
        "zero": [-2, 0, 2],
    }


@settings(max_examples=25)
@given(net=qnets(), seed=SEEDS)
def test_what_is_called_unreachable_is_not_reached(net, seed):
    """By samples that were not there when it was said."""
    values = inputs(net, 50, seed).astype(np.float32)
    _, coverage = covered(net, np.zeros((1, *net.input_shape)))
    later = Tally(net)
    later.add(values, "data")
    for before, after in zip(coverage.tensors, later.coverage().tensors, strict=True):
        lo, hi = before.possible
        assert lo <= after.reached[0] and after.reached[1] <= hi, before.tensor
        for event, state in after.events.items():
            assert state != "data" or before.events[event] != "unreachable", (before.tensor, event)


def small(seed: int) -> QNet:
    """Three inputs of three bits, two layers; the weights of every other network are even."""
    net = (
        Builder((3,), scheme(signed=True, bits=3, m=0), seed=seed)
        .dense("fc1", 6, scheme(signed=True, bits=4, m=0), bias=9)
        .quantize("relu", scheme(signed=False, bits=3, m=1))
        .dense("fc2", 3, scheme(signed=True, bits=4, m=0), bias=9)
        .quantize("out", scheme(signed=True, bits=4, m=2))
        .net
    )
    ops = [replace(op, weight=op.weight // 2 * 2) if seed % 2 and isinstance(op, Dense) else op for op in net.ops]
    return QNet(tuple(ops))


def test_bounds_and_events_are_those_of_all_inputs():
    """Nothing that an input does is excluded, and more is than by interval arithmetic."""
    every = np.stack(np.meshgrid(*[np.arange(-4, 4)] * 3), -1).reshape(-1, 3)
    sharper = excluded = 0
    for seed in range(30):
        net = small(seed)
        x = (every * net.input.format.step).astype(np.float32)
        codes, relaxation = reference.trace(net, x), Relaxation(net)
        for name in ("fc1", "fc2"):
            found, interval = relaxation.ranges(name), net.ranges[name]
            assert (found.lo <= codes[name].min(axis=0)).all() and (found.hi >= codes[name].max(axis=0)).all()
            sharper += int((found.lo > interval.lo).sum() + (found.hi < interval.hi).sum())
        tally = Tally(net)
        for name in ("fc1", "fc2"):
            tally.narrow(name, relaxation.ranges(name))
        possible = tally.wanted
        tally.add(x, "data")
        reached = {(t.tensor, e) for t in tally.coverage().tensors for e, s in t.events.items() if s == "data"}
        assert reached <= possible, reached - possible
        excluded += sum(len(t.events) for t in tally.coverage().tensors) - len(possible)
    assert sharper > 100
    assert excluded > 30


def searched(relaxation, tensor, element, sign, level, nodes=4000):
    """Whether an input reaches a level: that it is excluded, or inputs that do it, or neither."""
    reach, net = Reach(relaxation, tensor, element, sign, level), relaxation.net
    search = reach.search
    while search.nodes < nodes and not search.ended:
        search.run(nodes - search.nodes)
        if len(search.points):
            values = reference.trace(net, (reach.inputs * net.input.format.step).astype(np.float32))[tensor]
            if (values[:, element] * sign >= level).any():
                return "point"
    return "excluded" if search.excluded else "open"


def test_branch_and_bound_is_right_for_all_inputs():
    """A level that an input reaches is never excluded, and those that none reaches are; bounds alone exclude fewer."""
    every = np.stack(np.meshgrid(*[np.arange(-4, 4)] * 3), -1).reshape(-1, 3)
    excluded = by_bounds = 0
    for seed in range(4):
        net = small(seed)
        relaxation = Relaxation(net)
        codes = reference.trace(net, (every * net.input.format.step).astype(np.float32))["fc2"]
        lo, hi = relaxation.bounds("fc2")
        for element in range(codes.shape[1]):
            for sign, most, bound in ((1, codes.max(axis=0), hi), (-1, -codes.min(axis=0), -lo)):
                level = int(most[element])
                assert searched(relaxation, "fc2", element, sign, level) == "point"
                above = [searched(relaxation, "fc2", element, sign, level + more) for more in (2, 8, 24)]
                excluded += above.count("excluded")
                by_bounds += sum(int(bound[element] < level + more) for more in (2, 8, 24))
    assert excluded > by_bounds + 10, (excluded, by_bounds)


def test_branch_and_bound_ends_with_its_work(monkeypatch):
    net = small(0)
    monkeypatch.setattr("hmq_fpga.deploy.decide.WORK", 0)
    monkeypatch.setattr("hmq_fpga.deploy.branch.Search.run", lambda *_: pytest.fail("it was begun"))
    tally = Tally(net)
    tally.add(np.zeros((1, 3), np.float32), "data")
    decide_ends(Relaxation(net), tally, lambda _: None)
    assert tally.coverage().missed


def test_positions_of_a_convolution_are_one_question(monkeypatch):
    """What is excluded at one position is not asked again at another."""
    rng = np.random.default_rng(0)
    fields = {"weight_format": Fixed(signed=True, width=4, frac=2), "padding": ((0, 0),), "stride": (1,)}
    first, second = (rng.integers(-8, 8, shape) for shape in ((3, 1, 4), (3, 4, 1)))
    net = QNet(
        (
            Input(name="x", shape=(9, 1), format=Fixed(signed=False, width=4, frac=2)),
            Conv(name="c1", source="x", weight=first, bias=np.zeros(4, np.int64), **fields),
            Quantize(name="relu", source="c1", format=Fixed(signed=False, width=3, frac=2)),
            Conv(name="c2", source="relu", weight=second, bias=np.zeros(1, np.int64), **fields),
        )
    )
    relaxation = Relaxation(net)
    assert len(relaxation.bounds("c2")[0]) == 5
    keys = {Reach(relaxation, "c2", position, 1, 400).search.key for position in range(5)}
    assert len(keys) == 1 and Reach(relaxation, "c2", 0, 1, 401).search.key not in keys


def test_what_bounds_leave_open_is_reached_or_excluded(monkeypatch):
    """Events at the ends of sums: branch and bound leaves none, the searches and bounds before it leave some."""
    nets = [small(seed) for seed in range(30)]
    open_ends = {}
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr("hmq_fpga.deploy.samples.decide_ends", lambda *_: None)
        missed = [covered(net, np.zeros((1, 3)))[1].missed for net in nets]
        open_ends[name] = sum(event in ("low", "high", "above", "below") for m in missed for _, event in m)
    assert open_ends["with"] == 0 < open_ends["without"], open_ends


def test_first_layer_is_driven_to_its_ends(cnn):
    _, coverage = covered(cnn, np.zeros((1, *cnn.input_shape)))
    first, ranges = coverage.tensors[1], cnn.ranges["same"]
    assert first.tensor == "same"
    assert first.reached == first.possible == (ranges.lo.min(), ranges.hi.max())


def test_every_event_is_reached_or_out_of_reach(mlp):
    _, coverage = covered(mlp, np.zeros((1, *mlp.input_shape)))
    assert coverage.missed == []
    found = coverage.to_json()
    assert found["data"] + found["made"] + found["unreachable"] == sum(len(t["events"]) for t in found["tensors"])
    assert {event for t in found["tensors"] for event in t["events"]} <= EVENTS.keys()


@dataclass
class Wrapping:
    """The reference, but that a quantizer wraps where it should saturate."""

    net: QNet
    name: str = "wrapping"

    def predict(self, x):
        relu = self.net["relu"]
        tensors = reference.trace(self.net, x)
        wide = replace(relu.format, width=40)
        codes = wide.requantize(tensors["fc1"], self.net.formats["fc1"].frac) % (1 << relu.format.width)
        return self.net["fc2"].run([self.net.tensors["relu"]], [codes])


def test_saturation_that_no_data_need_is_compared_all_the_same():
    format_ = Fixed(signed=False, width=4, frac=0)
    one = {"weight_format": Fixed(signed=True, width=3, frac=0), "bias": np.zeros(1, np.int64)}
    net = QNet(
        (
            Input(name="x", shape=(2,), format=format_),
            Dense(name="fc1", source="x", weight=np.ones((2, 1), np.int64), **one),
            Quantize(name="relu", source="fc1", format=format_),
            Dense(name="fc2", source="relu", weight=np.ones((1, 1), np.int64), **one),
        )
    )
    data = np.array([[1, 2], [7, 7]])
    assert check(net, [Wrapping(net)], data).passed
    parity = check(net, [Wrapping(net)], data, made=True)
    assert not parity.passed and parity.simulators["wrapping"].mismatches == 0
    assert parity.made.simulators["wrapping"].mismatches > 0
    states = {t.tensor: t.events for t in parity.coverage.tensors}
    assert states["relu"]["above"] == "made" and states["relu"]["below"] == "unreachable"
