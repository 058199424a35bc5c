"""Figures and weighted losses against scikit-learn's and PyTorch's own."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as known
from torch import nn
from torch.optim.lr_scheduler import StepLR

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.metrics import figures
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.samples import Weighted
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Best, Task, batches, evaluate, fit, rank

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def task(y, **settings):
    x = torch.zeros(len(y), 4)
    return Task(x_train=x, y_train=y, x_val=x, y_val=y, **settings)


@pytest.mark.parametrize("shape", [(200, 1), (200, 3), (200, 2, 3)])
def test_figures_of_values(shape):
    targets, outputs = RNG.normal(size=shape), RNG.normal(size=shape)
    found = figures(*[torch.from_numpy(outputs)] * 2, torch.from_numpy(targets).float())
    flat = [values.astype(np.float32).reshape(200, -1) for values in (targets, outputs)]
    assert found["mse"] == pytest.approx(known.mean_squared_error(*flat), rel=1e-5)
    assert found["rmse"] == pytest.approx(found["mse"] ** 0.5)
    assert found["mae"] == pytest.approx(known.mean_absolute_error(*flat), rel=1e-5)
    assert found["r2"] == pytest.approx(known.r2_score(*flat), rel=1e-5)
    one = figures(torch.rand(200), torch.rand(200), torch.ones(200, 1))  # a target that never varies
    assert "r2" not in one


def test_figures_of_labels():
    labels, scores = RNG.random((300, 5)) < [0.5, 0.1, 0.9, 0.3, 0], RNG.normal(size=(300, 5)) - [0, 0, 0, 0, 9]
    found = figures(*[torch.from_numpy(scores)] * 2, torch.from_numpy(labels))
    assert found["accuracy"] == known.accuracy_score(labels, scores > 0)
    assert found["label_accuracy"] == pytest.approx(1 - known.hamming_loss(labels, scores > 0))
    for kind in ("micro", "macro"):
        expected = known.f1_score(labels, scores > 0, average=kind, zero_division=0)
        assert found[f"f1_{kind}"] == pytest.approx(expected)


def test_weights_of_samples_and_classes_and_smoothing():
    scores, classes, weights = torch.randn(40, 3), torch.arange(40) % 3, torch.rand(40)
    plain, of_class = task(classes), torch.tensor([1.0, 5.0, 0.5])
    close = torch.testing.assert_close
    close(plain.loss(scores, classes), F.cross_entropy(scores, classes))
    close(task(classes, class_weights=of_class).loss(scores, classes), F.cross_entropy(scores, classes, of_class))
    smoothed = task(classes, label_smoothing=0.1).loss(scores, classes)
    close(smoothed, F.cross_entropy(scores, classes, label_smoothing=0.1))
    each = F.cross_entropy(scores, classes, reduction="none")
    close(plain.loss(scores, Weighted(classes, weights)), (each * weights).sum() / weights.sum())
    some = torch.arange(40) < 25
    both = task(classes, class_weights=of_class).loss(scores, Weighted(classes, some.float()))
    close(both, F.cross_entropy(scores[some], classes[some], of_class))
    values = torch.randn(40, 3)
    close(task(values).loss(scores, Weighted(values, some.float())), F.mse_loss(scores[some], values[some]))
    labels = values > 0
    close(task(labels).loss(scores, labels), F.binary_cross_entropy_with_logits(scores, labels.float()))


def test_several_outputs_and_targets():
    classes, values, outputs = torch.arange(40) % 3, torch.randn(40, 2), torch.randn(40, 5)
    targets = {"class": classes, "values": values}
    two = task(targets, output_shapes=((3,), (2,)))
    expected = F.cross_entropy(outputs[:, :3], classes) + F.mse_loss(outputs[:, 3:], values)
    torch.testing.assert_close(two.loss(outputs, targets), expected)

    def own(parts, given):
        return F.l1_loss(parts[1], given["values"])

    found = task(targets, output_shapes=((3,), (2,)), custom_loss=own).loss(outputs, targets)
    torch.testing.assert_close(found, F.l1_loss(outputs[:, 3:], values))


def test_ones_own_optimizer_and_schedule_are_those_of_a_plain_loop(digits):
    def optimizer(parameters, rate):
        return torch.optim.SGD(parameters, rate, momentum=0.9)

    torch.manual_seed(0)
    models = [nn.Linear(64, 10), nn.Linear(64, 10)]
    models[1].load_state_dict(models[0].state_dict())
    own = Task(
        x_train=digits.x_train,
        y_train=digits.y_train,
        x_val=digits.x_val,
        y_val=digits.y_val,
        optimizer=optimizer,
        scheduler=lambda optimizer, steps: StepLR(optimizer, steps // 2),
    )
    fit(models[0], own, steps=30, learning_rate=0.1, seed=5)
    plain = optimizer(list(models[1].parameters()), 0.1)
    schedule = StepLR(plain, 15)
    for x, y in batches(own, 30, torch.Generator().manual_seed(5)):
        plain.zero_grad()
        F.cross_entropy(models[1](x), y).backward()
        plain.step()
        schedule.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_the_best_state_is_kept(digits):
    torch.manual_seed(0)
    model, states = nn.Linear(64, 10), {}

    def note(step, steps, values):
        states[step] = (
            values["val_accuracy"],
            -values["val_loss"],
            {k: v.clone() for k, v in model.state_dict().items()},
        )

    fit(model, digits, steps=60, learning_rate=3.0, seed=0, keep="best", listener=note)
    best = max(states.values(), key=lambda of: of[:2])
    assert best[:2] > list(states.values())[-1][:2]  # else this shows nothing
    torch.testing.assert_close(model.state_dict(), best[2], rtol=0, atol=0)
    found = Best(model)
    found(1, 2, {"val_loss": 1.0, "val_metric": 0.0, "val_accuracy": 0.9})
    model.weight.data.zero_()
    found(2, 2, {"val_loss": 2.0, "val_metric": -1.0, "val_accuracy": 1.0})  # the user's metric goes first
    found.restore()
    torch.testing.assert_close(model.state_dict(), best[2], rtol=0, atol=0)


def test_the_best_network_of_a_search_is_kept(digits, mlp, budget):
    """It is one that the search went through, within the bounds, and at least as good as all others there."""
    looked = []

    class Noting(Best):
        def __call__(self, step, steps, values):
            looked.append((rank(values), step))
            super().__call__(step, steps, values)

    target = Target(weight_rate=8, bits=(2, 3, 4))  # which every choice keeps, so that all of the search's end counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["hmq_fpga.search.methods.hmq"], "Best", Noting)
        read = instrument(mlp, (64,), input_signed=False)
        read, scheme, _ = find_scheme(read, digits, budget, target, options={"keep": "best"}, seed=0)
    assert len(looked) > 5
    assert min(step for _, step in looked) >= budget.search_steps / 2 - 1
    assert "repaired" not in scheme.found_by
    assert rank(evaluate(read, digits)) == pytest.approx(max(looked)[0], rel=0.02)  # biases get their grid
    with pytest.raises(InvalidInput, match="keep 'first': choose from last, best"):
        find_scheme(read, digits, budget, target, options={"keep": "first"})
