import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from hmq_fpga.search.calibrate import SAMPLES, least_error_format, least_error_formats, max_thresholds_log2
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.ranges import SHARES, Magnitudes, clips, range_notes
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Task, evaluate, finetune, fit

METHODS = ("hmq", "uniform")
BUDGET = Budget(float_steps=600, search_steps=300, finetune_steps=300)


def half_spaces() -> Task:
    """Whether one half of eight features in [0, 1) has the larger sum."""
    x = torch.from_numpy(np.random.default_rng(0).random((1600, 8)).astype(np.float32))
    y = (x[:, :4].sum(1) > x[:, 4:].sum(1)).long()
    return Task(x_train=x[:1000], y_train=y[:1000], x_val=x[1000:], y_val=y[1000:])


def trained(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    fit(model, task, steps=BUDGET.float_steps, learning_rate=1e-2, seed=0)
    return model


def quantized(model, task, method, rate=8):
    read = instrument(model, task.input_shape, input_signed=task.input_signed)
    found, _, _ = find_scheme(read, task, BUDGET, Target(weight_rate=rate), method=method)
    finetune(found, task, steps=BUDGET.finetune_steps, learning_rate=2e-3, seed=0)
    return found


@cache
def undisturbed(method=None):
    task = half_spaces()
    model = trained(task) if method is None else quantized(undisturbed()[0], task, method)
    return model, evaluate(model, task)["val_accuracy"]


def with_outlier(where, octaves):
    """A trained model and its task: in the samples from before the training, in a weight from after it."""
    task, x = half_spaces(), half_spaces().x_train
    if where == "value":
        x[17, 3] = 2.0**octaves
    elif where == "sample":
        x[17] *= 2.0**octaves
    else:
        model = copy.deepcopy(undisturbed()[0])
        with torch.no_grad():
            weight = model.get_parameter(where)
            weight[3, 5] = 2.0**octaves * weight.abs().max()
        return model, task
    task = replace(task, x_train=x)
    return trained(task), task


@pytest.mark.parametrize("octaves", [4, 12, 20])
@pytest.mark.parametrize("where", ["value", "sample", "0.weight", "2.weight"])
@pytest.mark.parametrize("method", METHODS)
def test_an_outlier_costs_little_and_is_told(method, where, octaves):
    model, task = with_outlier(where, octaves)
    found = quantized(model, task, method)
    assert evaluate(found, task)["val_accuracy"] > undisturbed(method)[1] - 0.02
    tensor = f"linear_{where}" if where.endswith("weight") else "input"
    (note,) = [note for note in range_notes(found, task) if note.startswith(tensor)]
    share = {
        "value": "1 of 8000 values that are not zero (0.01%)",
        "sample": "8 of 8000 values that are not zero (0.10%)",
    }
    assert share.get(where, "1 of ") in note
    assert where.endswith("weight") or f"exceed its threshold 2**0, up to 2**{octaves}, and are clipped" in note


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_said_of_ordinary_tensors(method):
    assert not range_notes(quantized(undisturbed()[0], half_spaces(), method), half_spaces())


def test_a_feature_at_another_scale_is_told_with_the_remedy():
    """An eighth of all values is no outlier: to clip it would lose it, not to clip it loses the rest."""
    task = half_spaces()
    scale = torch.tensor([2.0**10, *[1] * 7])
    wide = replace(task, x_train=task.x_train * scale, x_val=task.x_val * scale)
    (note,) = [n for n in range_notes(quantized(trained(wide), wide, "uniform"), wide) if n.startswith("input")]
    assert "7000 of 8000 values that are not zero (87.50%) become zero in 8 bits with its threshold 2**10" in note
    assert "--normalize" in note


def test_the_papers_thresholds_stay_where_values_lie_close(digits, mlp):
    model = instrument(mlp, digits.input_shape, input_signed=digits.input_signed)
    largest = {name: float(weight.detach().abs().max()) for name, weight in model.weights.items()}
    with torch.no_grad():
        model(digits.x_train, grids={}, observe=lambda name, x: largest.__setitem__(name, float(x.abs().max())))
    assert max_thresholds_log2(model, digits) == {s.name: int(np.ceil(np.log2(largest[s.name]))) for s in model.sites}
    assert not clips(model, digits)


def magnitudes(*parts, at_once=1):
    found = Magnitudes(at_once)
    for part in parts:
        found.add(torch.as_tensor(part, dtype=torch.float32))
    return found


@pytest.mark.parametrize(
    ("x", "at_once", "expected"),
    [
        ([0.0, 0.0], 1, 0),
        ([3.0, -8.0], 1, 3),
        ([1.0] * 100 + [4.0], 1, 2),  # not far
        ([1.0] * 100 + [4.1], 1, 0),
        ([-1.0] * 100 + [-1e30], 1, 0),
        ([1.0] * 100 + [float("inf")], 1, 0),
        ([1.0] * 20 + [2.0**20], 1, 20),  # one of a few may well be meant
        ([1.0] * 100 + [2.0**20] * 2, 1, 20),
        ([1.0] * 100 + [2.0**20] * 2, 2, 0),  # of one sample
        ([1.0] * 100 + [2.0**20] * 4, 8, 20),  # too many even so
        ([0.0] * 10_000 + [2.0**20] * 5, 8, 20),  # zeros need nothing
        ([1.0] * 10_000 + [2.0**20] * 10, 1, 0),
        ([1.0] * 10_000 + [2.0**20] * 11, 1, 20),
    ],
)
def test_outliers_are_rare_and_far_beyond_the_others(x, at_once, expected):
    assert magnitudes(x, at_once=at_once).threshold_log2 == expected
    assert magnitudes(x[:3], x[3:], at_once=at_once).threshold_log2 == expected


def test_what_follows_from_an_outlying_weight_is_not_calibrated():
    """All samples pass through the weight, so that its activations alone do not tell that they are outliers."""
    ordinary, task = instrument(undisturbed()[0], (8,), input_signed=False), half_spaces()
    limits = max_thresholds_log2(ordinary, task)
    disturbed = instrument(with_outlier("2.weight", 20)[0], (8,), input_signed=False)
    assert list(clips(disturbed, task)) == ["linear_2.weight"]
    found = max_thresholds_log2(disturbed, task)
    assert all(abs(found[name] - m) <= 1 for name, m in limits.items())
    bits = dict.fromkeys(limits, 6)
    formats, undisturbed_formats = (
        least_error_formats(model, task, bits, m) for model, m in ((disturbed, found), (ordinary, limits))
    )
    assert all(abs(f.threshold_log2 - formats[n].threshold_log2) <= 1 for n, f in undisturbed_formats.items())


def test_formats_of_least_error_are_those_of_all_samples_at_once():
    model, task = instrument(undisturbed()[0], (8,), input_signed=False), half_spaces()
    limits = max_thresholds_log2(model, task)
    values = {name: weight.detach() for name, weight in model.weights.items()}
    with torch.no_grad():
        model(task.x_train[:SAMPLES], grids={}, observe=values.__setitem__)
    found = least_error_formats(model, task, dict.fromkeys(limits, 4), limits)
    for site in model.sites:
        m = limits[site.name]
        assert found[site.name] == least_error_format(
            values[site.name], signed=site.signed, bits=4, max_threshold_log2=m
        )


def test_least_error_is_not_decided_by_an_outlier():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) / 5
    settings = {"signed": True, "bits": 4, "max_threshold_log2": 0}
    expected = least_error_format(x, **settings)
    x[0] = 2.0**20
    assert least_error_format(x, **settings) == expected
    assert expected.threshold_log2 == -1


def test_quantiles_are_right_to_an_octave():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * torch.exp2(3 * torch.randn(5000, generator=generator))
    x[:500] = 0
    found = Magnitudes(1)
    for part in x.split(700):
        found.add(part)
    exact = np.quantile(np.log2(np.abs(x[500:].numpy())), SHARES)
    np.testing.assert_allclose(found.quantiles(), exact, atol=1)
    assert found.quantiles() == sorted(found.quantiles())
    assert found.quantiles()[-1] == found.largest_log2
    assert Magnitudes(1).quantiles() == []
