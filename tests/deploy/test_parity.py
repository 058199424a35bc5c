import json
from dataclasses import dataclass

import numpy as np
import pytest

from hmq_fpga.deploy.parity import ParityError, check, classes, to_codes
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed


@dataclass
class Untraced:
    """The reference, with `shift` added to some output codes."""

    net: object
    shift: dict
    name: str = "untraced"

    def predict(self, x):
        codes = reference.run(self.net, x)
        for index, by in self.shift.items():
            codes[index] += by
        return codes


@dataclass
class Traced(Untraced):
    """And all later tensors wrong from `tensor` on, at every sample but the first that is traced."""

    tensor: str = "relu1"
    name: str = "traced"

    def trace(self, x):
        tensors = reference.trace(self.net, x)
        names = list(tensors)
        for name in names[names.index(self.tensor) :]:
            tensors[name][1:, 2] += 1
        return tensors


def test_equal_codes_pass(mlp, samples):
    x = samples(mlp, 10)
    labels = reference.run(mlp, x).argmax(1)
    labels[:3] = -1
    parity = check(mlp, [Untraced(mlp, {})], x, labels)
    parity.raise_for_mismatch()
    figures = {"values": 120, "mismatches": 0, "max_abs_diff": 0, "accuracy": 0.9}
    assert parity.to_json() == {"passed": True, "samples": 30, "simulators": {"untraced": figures}}


def test_one_code_off_by_one_is_found(mlp, samples):
    x = samples(mlp, 10)
    parity = check(mlp, [Untraced(mlp, {}, "fine"), Untraced(mlp, {(7, 1): -3, (20, 0): 1})], x)
    assert not parity.passed
    assert parity.simulators["fine"].mismatches == 0
    expected = int(reference.run(mlp, x)[7, 1])
    assert parity.to_json()["simulators"]["untraced"] == {
        "values": 120,
        "mismatches": 2,
        "max_abs_diff": 3,
        "accuracy": None,
        "first_difference": {
            "tensor": "fc4",
            "sample": 7,
            "index": [1],
            "expected": expected,
            "actual": expected - 3,
        },
    }
    json.dumps(parity.to_json())
    with pytest.raises(ParityError, match=r"^untraced: 2 of 120 .* by up to 3; tensor 'fc4' first differs at sample 7"):
        parity.raise_for_mismatch()


def test_first_tensor_in_network_order_is_named(mlp, samples):
    simulator = Traced(mlp, {(4, 0): 1, (9, 0): 1})
    first = check(mlp, [simulator], samples(mlp, 10)).simulators["traced"].first_difference
    assert (first.tensor, first.sample, first.index) == ("relu1", 9, (2,))
    assert first.actual == first.expected + 1


def test_nothing_to_compare_is_an_error(mlp, samples):
    x = samples(mlp, 10)
    with pytest.raises(InvalidInput, match="at least one simulator"):
        check(mlp, [], x)
    with pytest.raises(InvalidInput, match="one sample"):
        check(mlp, [Untraced(mlp, {})], x[:0])
    with pytest.raises(InvalidInput, match="one class per sample"):
        check(mlp, [Untraced(mlp, {})], x, np.zeros(3))


def test_codes_are_decoded_exactly_or_not_at_all():
    format_ = Fixed(signed=True, width=4, frac=2)
    assert to_codes(np.array([-0.25, 5.0]), format_, "a").tolist() == [-1, 20]
    for value in (0.3, 2.0**-40, np.nan, np.inf):
        with pytest.raises(ParityError, match="tensor 'a' holds"):
            to_codes(np.array([value]), format_, "a")


def test_class_of_outputs():
    assert classes(np.array([[3, -1, 2], [0, 0, 1]])).tolist() == [0, 2]
    assert classes(np.array([[3], [-1], [0]])).tolist() == [1, 0, 0]
