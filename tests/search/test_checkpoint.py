"""Training that was interrupted goes on where it was, bit for bit: all methods, float training and fine-tuning."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hmq_fpga.ir import cost
from hmq_fpga.search import pruning
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import METHODS, find_scheme
from hmq_fpga.search.pruning import NetworkCost, Pruning
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Distillation, finetune, fit, ignore

pytestmark = pytest.mark.once

LONG = {"hmq", "zeroq", "msqe", "pot_gradient", "hgq"}  # methods that take many steps
OPTIONS = {"msqe": {"robust": "gradient"}}


@pytest.fixture(scope="session")
def digits(digits):
    """With a validation split so small that trainings look at it as often as they ever do."""
    return replace(digits, x_val=digits.x_val[:64], y_val=digits.y_val[:64])


class Stopped(Exception):
    """What a listener raises."""


def stopping_after(news):
    """A listener that hears so often before it stops the training, and what it heard."""
    heard = []

    def listen(step, steps, values):
        heard.append(step)
        if len(heard) == news:
            raise Stopped

    return listen, heard


def interrupted(training, path, stops=(1, 7, 40), **settings):
    """Result of a training that is begun again after each of its ends, and the first step heard each time."""
    firsts = []
    for news in stops:
        listen, heard = stopping_after(news)
        with pytest.raises(Stopped):
            training(listener=listen, checkpoint=Checkpoint(path, every_s=0, **settings))
        firsts.append(heard[0])
    listen, heard = stopping_after(0)
    return training(listener=listen, checkpoint=Checkpoint(path, every_s=0, **settings)), [*firsts, *heard[:1]]


def assert_same(module, other):
    for (name, value), wanted in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_for_bit(method, mlp, digits, tmp_path):
    def search(listener=ignore, checkpoint=None):
        return find_scheme(
            instrument(mlp, digits.input_shape),
            digits,
            Budget(search_steps=150),
            Target(weight_rate=10, activation_rate=8),
            method=method,
            options=OPTIONS.get(method),
            seed=1,
            listener=listener,
            checkpoint=checkpoint,
        )

    model, scheme, history = search()
    stops = (1, 7, 40) if method in LONG else (1,)
    (again, same, goes_on), firsts = interrupted(search, tmp_path / "checkpoint", stops)
    assert same == scheme
    assert goes_on == history
    assert_same(again, model)
    if method in LONG:
        assert firsts == sorted(firsts)
        assert firsts[-1] > 40
        assert search(listener=stopping_after(1)[0], checkpoint=Checkpoint(tmp_path / "checkpoint"))[1] == scheme


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stops_cleanly(method, mlp, digits):
    """Parameters are nobody's but the model's, which is in evaluation mode and can be searched again."""
    model = instrument(mlp, digits.input_shape).eval()
    with pytest.raises(Stopped):
        find_scheme(
            model,
            digits,
            Budget(search_steps=150),
            Target(weight_rate=10),
            method=method,
            listener=stopping_after(1)[0],
        )
    assert not model.training
    assert not model.formats
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
    assert torch.isfinite(model(digits.x_val)).all()


class Noisy(nn.Module):
    """Draws from every global generator there is."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 10)

    def forward(self, x):
        if self.training:
            x = x + 1e-2 * np.random.rand() + 1e-2 * random.random()  # noqa: NPY002
        return self.head(self.drop(self.norm(x)))


def test_float_training_goes_on_with_its_noise(digits, tmp_path):
    def train(listener=ignore, checkpoint=None):
        for seeded in (torch.manual_seed, np.random.seed, random.seed):
            seeded(0)
        model = Noisy()
        history = fit(model, digits, steps=120, learning_rate=1e-2, seed=0, listener=listener, checkpoint=checkpoint)
        return model, history

    model, history = train()
    (again, same), _ = interrupted(train, tmp_path / "checkpoint")
    assert same == history
    assert_same(again, model)


def test_fine_tuning_goes_on_with_what_was_pruned(mlp, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "EVENTS", 10)  # rare ones: what is forgotten shows before the next
    monkeypatch.setattr(pruning, "MEASUREMENTS", 2)
    found, _, _ = find_scheme(
        instrument(mlp, digits.input_shape), digits, Budget(search_steps=150), Target(), method="uniform"
    )
    most = cost.ebops(freeze(found)) / 2

    def train(listener=ignore, checkpoint=None):
        model = copy.deepcopy(found)
        history = finetune(
            model,
            digits,
            steps=150,
            learning_rate=1e-2,
            seed=0,
            shaping=Pruning(model, NetworkCost("EBOPs", most, cost.ebops, lambda net: cost.ebops(net) ** 0.8), digits),
            distillation=Distillation(teacher=mlp),
            listener=listener,
            checkpoint=checkpoint,
        )
        return model, history

    model, history = train()
    (again, same), _ = interrupted(train, tmp_path / "checkpoint", (3, 10, 25))
    assert same == history
    assert_same(again, model)


def test_another_trainings_file_is_not_used(digits, tmp_path):
    def train(learning_rate=1e-2, steps=100, key="", layer=0, listener=ignore):
        torch.manual_seed(layer)
        model = nn.Linear(64, 10)
        checkpoint = Checkpoint(tmp_path / "checkpoint", key=key, every_s=0)
        fit(model, digits, steps=steps, learning_rate=learning_rate, seed=0, listener=listener, checkpoint=checkpoint)
        return model

    with pytest.raises(Stopped):
        train(listener=stopping_after(20)[0])
    kept = (tmp_path / "checkpoint").read_bytes()
    for other in ({"learning_rate": 2e-2}, {"steps": 101}, {"key": "other data"}, {"layer": 1}):
        (tmp_path / "checkpoint").write_bytes(kept)
        listen, heard = stopping_after(1)
        with pytest.raises(Stopped):
            train(**other, listener=listen)
        assert heard == [2], other
    (tmp_path / "checkpoint").write_bytes(kept)
    listen, heard = stopping_after(1)
    with pytest.raises(Stopped):
        train(listener=listen)
    assert heard == [40]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half", None])
def test_a_broken_file_is_said_and_left(damage, digits, tmp_path, caplog):
    path = tmp_path / "checkpoint"

    def train():
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        fit(model, digits, steps=20, learning_rate=1e-2, seed=0, checkpoint=Checkpoint(path))
        return model

    model = train()
    path.write_bytes(path.read_bytes()[:-300] if damage is None else damage)
    assert_same(train(), model)
    assert len(caplog.records) == 1
    assert f"{path}: cannot be read" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    Checkpoint(path).remove()
    assert not path.exists()
