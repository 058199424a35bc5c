"""Samples are the same wherever they come from, and what transforms draw is theirs alone."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.calibrate import max_thresholds_log2
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.samples import InMemory, Loaded, OnDisk, Weighted, endless, parts_of
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import fit

X, Y, W = torch.randn(50, 6), torch.arange(50) % 3, torch.rand(50)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def first(samples, n=20, size=8):
    return [batch for batch, _ in zip(endless(samples, size, generator()), range(n), strict=False)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for (x, y), (x_of, y_of) in zip(found, expected, strict=True):
        torch.testing.assert_close((x, *parts_of(y)), (x_of, *parts_of(y_of)), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_are_the_same_wherever_samples_come_from(weighted):
    held = InMemory(X, Weighted(Y, W) if weighted else Y)
    rows = torch.randperm(50).numpy()
    back = np.argsort(rows)
    stored, targets = X.numpy()[rows], Weighted(Y[rows], W[rows]) if weighted else Y[rows]
    on_disk = OnDisk(lambda r: stored[r], targets, back)
    loaded = Loaded(TensorDataset(X, Y, W) if weighted else TensorDataset(X, Y))
    for other in (on_disk, loaded):
        assert len(other) == 50
        assert_equal(first(other), first(held))
        assert_equal(list(other.in_order(7)), list(held.in_order(7)))
        assert_equal([other.head(20)], [held.head(20)])
        assert other.signed


class Noisy(Dataset):
    """Augments by each of the generators that transforms use."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return X[i] + torch.rand(1) + np.random.rand() + random.random(), Y[i]  # noqa: NPY002


@pytest.mark.parametrize(
    "source",
    [Noisy(), DataLoader(Noisy(), 8, shuffle=True), DataLoader(Noisy(), 8, num_workers=1)],
    ids=["data set", "loader", "worker"],
)
def test_transforms_draw_anew_and_are_repeated_by_seed(source):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    samples = Loaded(source)
    found = first(samples, n=9)
    assert_equal(first(samples, n=9), found)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(torch.equal(found[0][0], x) for x, _ in found[3:])  # another pass
    assert {len(x) for x, _ in found} == {8}
    assert_equal(list(samples.in_order(8)), list(samples.in_order(8)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def test_iterables():
    samples = Loaded(Stream())
    assert len(samples) == 50
    assert [len(x) for x, _ in samples.in_order(20)] == [20, 20, 10]
    assert_equal(first(samples, 2, 20), list(samples.in_order(20))[:2])
    spent = iter(DataLoader(Stream(), 10))

    class Once(IterableDataset):
        def __iter__(self):
            return spent

    with pytest.raises(InvalidInput, match="a pass over the training samples has none: give an iterable that starts"):
        first(Loaded(DataLoader(Once(), None)), 9)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([X[0], X[1]], r"a sample is \(input, target\)"),
        ([(X[0], Y[0], 1.0, 2)], r"a sample is \(input, target\) .*gives 4 values"),
        ([(X[0], "cat")], "the label 'cat'; let its targets be numbers"),
        ([], "there are no samples"),
    ],
)
def test_what_is_no_sample_is_named(samples, message):
    class Wrong(IterableDataset):
        def __iter__(self):
            return iter(samples)

    with pytest.raises(InvalidInput, match=message):
        Loaded(Wrong()).head(1)


def test_training_and_search_of_a_stream_are_those_of_the_tensors(digits, budget):
    loaded = Loaded(TensorDataset(digits.x_train, digits.y_train))
    streamed = replace(
        digits,
        x_train=digits.x_train[:0],
        y_train=digits.y_train[:0],
        x_val=digits.x_val[:0],
        y_val=digits.y_val[:0],
        streams={"train": loaded, "val": Loaded(TensorDataset(digits.x_val, digits.y_val))},
    )
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 12), nn.Dropout(0.1), nn.ReLU(), nn.Linear(12, 10))
    states, schemes, histories = [], [], []
    for task in (digits, streamed):
        model = copy.deepcopy(start)
        torch.manual_seed(1)
        histories.append(fit(model, task, steps=40, learning_rate=1e-2, seed=0))
        read = instrument(model, task.input_shape, input_signed=task.input_signed)
        limits = max_thresholds_log2(read, task)
        read, scheme, _ = find_scheme(read, task, replace(budget, search_steps=150), Target(weight_rate=8), seed=0)
        states.append(read.state_dict())
        schemes.append((limits, scheme.tensors))
    assert schemes[0] == schemes[1]
    assert histories[0]["val_accuracy"] == histories[1]["val_accuracy"]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
