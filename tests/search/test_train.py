"""A final function that hardware leaves out belongs to the loss all the same; learning from the float model."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.metrics import accuracy
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import (
    Budget,
    Distillation,
    Task,
    batches,
    evaluate,
    finetune,
    finished,
    fit,
    output_of,
    predict,
)

pytestmark = pytest.mark.once


class Ends(nn.Module):
    """Two layers, and a function at the end."""

    def __init__(self, inputs, outputs, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(inputs, 16), nn.Linear(16, outputs), function

    def forward(self, x):
        return self.function(self.last(F.relu(self.first(x))))


def seeded(*arguments):
    torch.manual_seed(0)
    return Ends(*arguments)


FINALS = [
    nn.Softmax(1),
    nn.LogSoftmax(1),
    nn.Sigmoid(),
    nn.Tanh(),
    lambda x: F.softmax(x, dim=1),
    lambda x: x.log_softmax(1),
    torch.sigmoid,
    lambda x: x.tanh(),
]
LOSSES = {
    "classes": {},
    "a loss of one's own": {"custom_loss": lambda outputs, classes: (outputs - F.one_hot(classes, 10)).square().sum()},
    "real targets": {"y_train": torch.rand(1000, 10), "y_val": torch.rand(250, 10)},
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("final", FINALS)
def test_float_and_quantized_model_are_judged_alike(final, settings, digits):
    model, task = seeded(64, 10, final), replace(digits, **settings)
    read = instrument(model, task.input_shape)
    ours, theirs = evaluate(read, task), evaluate(model, task)
    assert ours == pytest.approx(theirs, rel=1e-5)
    if "custom_loss" in settings:
        assert theirs["val_loss"] == pytest.approx(
            float(task.custom_loss(model(task.x_val).detach(), task.y_val)), rel=1e-5
        )


@pytest.mark.parametrize("final", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()])
def test_cross_entropy_takes_the_values_before_probabilities(final, digits):
    model, scores = seeded(64, 10, final), seeded(64, 10, nn.Identity())(digits.x_val).detach()
    expected = float(F.cross_entropy(scores, digits.y_val))
    assert evaluate(model, digits)["val_loss"] == pytest.approx(expected)


def test_training_is_that_of_a_model_without_the_softmax(digits):
    models = [seeded(64, 10, final) for final in (nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1))]
    for model in models:
        fit(model, digits, steps=50, learning_rate=1e-2, seed=0)
    for model in models[1:]:
        assert torch.equal(model.last.weight, models[0].last.weight)


def test_what_a_model_returns_and_its_scores(digits):
    model = seeded(64, 10, nn.Softmax(1))
    read = instrument(model, digits.input_shape)
    for found in (output_of(model, digits.x_val), predict(read, digits.x_val), finished(read, read(digits.x_val))):
        torch.testing.assert_close(found.returned, model(digits.x_val))
        torch.testing.assert_close(found.scores.softmax(1), found.returned)
        assert found.scores.min() < 0


def squashed():
    """Targets that a final tanh has to reach."""
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tanh(3 * torch.stack([x[:, 0] - x[:, 1], x[:, 2] * 2], 1))
    return Task(x_train=x[:800], y_train=y[:800], x_val=x[800:], y_val=y[800:])


def quantized(model, task, rate, **settings):
    read = instrument(model, task.input_shape, input_signed=task.input_signed, **settings)
    read, _, _ = find_scheme(read, task, Budget(search_steps=600), Target(weight_rate=rate))
    finetune(read, task, steps=600, learning_rate=2e-3, seed=0)
    net = freeze(read)
    np.testing.assert_array_equal(
        run_codes(read, task.x_val, net.output_format), reference.run(net, task.x_val.numpy())
    )
    return evaluate(read, task)


def test_search_and_finetuning_learn_what_comes_after_a_tanh():
    task = squashed()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2), nn.Tanh())
    fit(model, task, steps=1000, learning_rate=1e-2, seed=0)
    before = evaluate(model, task)["val_loss"]
    assert quantized(model, task, 4)["val_loss"] < before + 0.002
    assert quantized(model, task, 4, keep_final=True)["val_loss"] < before + 0.002


def test_a_kept_softmax_is_part_of_the_network():
    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(1))
    x = torch.randn(20, 8)
    kept, left_out = (instrument(model, (8,), keep_final=keep) for keep in (True, False))
    torch.testing.assert_close(kept(x, {}), model(x))
    torch.testing.assert_close(left_out(x, {}), model[0](x))


def test_what_a_kept_final_function_cannot_be():
    with pytest.raises(UnsupportedLayer, match=r"'1' \(LogSoftmax\): is no value that hardware could keep"):
        instrument(nn.Sequential(nn.Linear(8, 4), nn.LogSoftmax(1)), (8,), keep_final=True)


def test_a_loss_of_probabilities_gets_probabilities(digits):
    task = replace(digits, custom_loss=nn.NLLLoss())
    model = seeded(64, 10, nn.LogSoftmax(1))
    fit(model, task, steps=400, learning_rate=1e-2, seed=0)
    before = evaluate(model, task)["val_accuracy"]
    assert quantized(model, task, 8)["val_accuracy"] > before - 0.03


@pytest.mark.parametrize("final", [nn.Identity(), nn.Sigmoid()])
def test_one_output_and_two_classes_are_told_by_the_sign(final, digits):
    task = replace(digits, y_train=digits.y_train % 2, y_val=digits.y_val % 2)
    model = seeded(64, 1, final)
    expected = F.binary_cross_entropy(seeded(64, 1, nn.Sigmoid())(task.x_val).detach()[:, 0], task.y_val.float())
    assert evaluate(model, task)["val_loss"] == pytest.approx(float(expected), rel=1e-4)
    fit(model, task, steps=400, learning_rate=1e-2, seed=0)
    before = evaluate(model, task)["val_accuracy"]
    assert before > 0.8
    assert quantized(model, task, 8)["val_accuracy"] > before - 0.05


def test_accuracy_of_one_score():
    scores = torch.tensor([[0.3], [-0.2], [0.0], [5.0]])
    assert accuracy(scores, torch.tensor([1, 1, 0, 1])) == 0.75


class TwoEyes(nn.Module):
    """Reads the upper half of the digits as features and the lower as an image."""

    def __init__(self):
        super().__init__()
        self.upper, self.lower = nn.Linear(32, 16), nn.Conv2d(1, 4, 3, stride=2)
        self.head = nn.Linear(28, 10)

    def forward(self, upper, lower):
        both = torch.cat((F.relu(self.upper(upper)), F.relu(self.lower(lower)).flatten(1)), 1)
        return self.head(both)


def two_inputs(digits):
    return replace(digits, input_shapes=((32,), (1, 4, 8)))


def test_a_float_model_gets_its_inputs_one_by_one(digits):
    task = two_inputs(digits)
    torch.manual_seed(0)
    model = TwoEyes()
    fit(model, task, steps=400, learning_rate=1e-2, seed=0)
    upper, lower = task.x_val[:, :32], task.x_val[:, 32:].reshape(-1, 1, 4, 8)
    torch.testing.assert_close(predict(model, task.x_val, task.input_shapes).returned, model(upper, lower))
    assert evaluate(model, task)["val_accuracy"] > 0.85


def test_a_model_of_several_inputs_is_quantized(digits):
    task = two_inputs(digits)
    torch.manual_seed(0)
    model = TwoEyes()
    fit(model, task, steps=400, learning_rate=1e-2, seed=0)
    before = evaluate(model, task)["val_accuracy"]
    assert quantized(model, task, 8)["val_accuracy"] > before - 0.05


def test_distillation_is_hintons(mlp, digits):
    """Scores of a student that are the teacher's cost nothing; else T^2 times the divergence, by its definition."""
    x, y = digits.x_train[:50], digits.y_train[:50]
    teacher = copy.deepcopy(mlp).eval()
    taught = teacher(x).detach()
    distillation = Distillation(teacher=teacher, share=0.25, temperature=3.0)
    assert float(distillation.mixed(torch.tensor(2.0), x, taught, digits)) == pytest.approx(1.5)
    scores = taught.roll(1, 0)
    p, q = (torch.softmax(values.double() / 3, 1) for values in (taught, scores))
    divergence = float((p * (p / q).log()).sum(1).mean())
    loss = task_loss = digits.loss(scores, y)
    assert float(distillation.mixed(loss, x, scores, digits)) == pytest.approx(
        0.75 * float(task_loss) + 0.25 * 9 * divergence, rel=1e-5
    )


def test_a_student_comes_near_its_teacher(mlp, digits):
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    teacher = copy.deepcopy(mlp).eval()
    distillation = Distillation(teacher=teacher, share=1.0)

    def apart():
        with torch.no_grad():
            scores = (torch.log_softmax(model(digits.x_val), 1) for model in (student.eval(), teacher))
            return float(F.kl_div(*scores, log_target=True, reduction="batchmean"))

    before = apart()
    fit(student, digits, steps=300, learning_rate=1e-2, seed=0, distillation=distillation)
    assert apart() < 0.3 * before


def test_a_large_validation_split_is_looked_at_less_often(digits):
    """Training is the same; of some fifty states the best is kept all the same."""
    large = replace(digits, x_val=digits.x_val.repeat(8, 1), y_val=digits.y_val.repeat(8))

    def trained(task, keep="last"):
        model = seeded(64, 10, nn.Identity())
        return len(fit(model, task, steps=1000, learning_rate=1e-2, seed=0, keep=keep)["step"]), model

    (often, model), (rarely, same) = trained(digits), trained(large)
    assert often == 50
    assert rarely == 1000 * large.batch_size // (2 * len(large.x_val)) + 1  # and the last step
    assert torch.equal(model.last.weight, same.last.weight)
    assert trained(large, keep="best")[0] == 50


def test_input_noise_is_of_each_value_and_within_its_range(digits):
    """The same for the same seed, also where a training goes on in the middle; without it batches are the samples."""
    noisy = replace(digits, input_noise=0.5)
    (plain, _), *_ = batches(digits, 1, seeded_by(1))
    (first, _), (second, _), _ = batches(noisy, 3, seeded_by(1))
    (again, _), _ = batches(noisy, 3, seeded_by(1), start=1)
    x = digits.x_train
    assert torch.equal(again, second)
    assert (first >= x.amin(0)).all()
    assert (first <= x.amax(0)).all()
    dark = x.std(0) == 0
    assert 0 < dark.sum() < 64
    assert torch.equal(first[:, dark], plain[:, dark])
    whole = replace(noisy, batch_size=len(x))
    ((disturbed, labels),) = batches(whole, 1, seeded_by(1))
    ((samples, same),) = batches(replace(whole, input_noise=0), 1, seeded_by(1))
    assert torch.equal(labels, same)
    inner = (samples > x.amin(0) + 0.3) & (samples < x.amax(0) - 0.3)  # little of it is cut off there
    ratio = ((disturbed - samples) / x.std(0))[inner]
    assert abs(float(ratio.std()) - 0.5) < 0.05


def seeded_by(seed):
    return torch.Generator().manual_seed(seed)
