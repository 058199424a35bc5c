"""Whatever people have their data in gives the same data set, with a note of what was done, or one line of error."""

import json
import runpy
import warnings
from contextlib import nullcontext
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_array_equal
from rich.console import Console
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.samples import OnDisk, parts_of
from hmq_fpga.search.train import fit, ignore
from hmq_fpga.study.dataset import SPLITS
from hmq_fpga.study.monitor import summary
from hmq_fpga.study.run.config import make_config
from hmq_fpga.study.run.pipeline import run
from hmq_fpga.study.run.stages import read_record
from hmq_fpga.study.scales import Normalization, check_scales
from hmq_fpga.study.sources import Options, take
from hmq_fpga.study.tasks import resolve, training_task

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(90, 4)).astype(np.float32), np.arange(90) % 3
TRAIN, TEST = slice(0, 60), slice(60, 90)
ARRAYS = {"x_train": X[TRAIN], "y_train": Y[TRAIN], "x_test": X[TEST], "y_test": Y[TEST]}


class Monitor:
    """Shows nothing, and remembers what was done before."""

    def __init__(self):
        self.done = []

    def stage(self, name):
        return nullcontext(ignore)

    def skipped(self, name):
        self.done.append(name)


def whole(dataset, split):
    """A split's samples and targets, wherever they are."""
    samples = dataset.samples(split)
    x, y = samples.head(len(samples))
    return x.numpy(), tree_map(lambda t: t.numpy(), parts_of(y)[0])


def assert_same(found, expected, splits=SPLITS):
    for split in splits:
        for a, b in zip(whole(found, split), whole(expected, split), strict=True):
            assert_array_equal(a, b)
            assert a.dtype == b.dtype


def folder(path, **arrays):
    path.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def test_arrays_tensors_frames_and_folders_are_the_same(tmp_path):
    expected = take(ARRAYS)
    frame = pd.DataFrame(X, columns=list("abcd")).assign(kind=Y)
    np.savez(tmp_path / "mine.npz", **ARRAYS)
    tensors = {
        split: (torch.from_numpy(X[of]), torch.from_numpy(Y[of])) for split, of in (("train", TRAIN), ("test", TEST))
    }
    for given in (
        (tensors["train"], tensors["test"]),
        tensors,
        {"train": frame[TRAIN], "test": frame[TEST]},
        {"train": (frame[TRAIN][list("abcd")], frame[TRAIN]["kind"]), "test": (X[TEST], Y[TEST])},
        tmp_path / "mine.npz",
        folder(tmp_path / "folder", **ARRAYS),
    ):
        assert_same(take(given), expected)
    loaders = {"train": TensorDataset(*tensors["train"]), "test": DataLoader(TensorDataset(*tensors["test"]), 7)}
    loaded = take(loaders)
    assert_same(loaded, expected, ["test"])
    assert len(loaded.samples("train")) + len(loaded.samples("val")) == 60
    assert loaded.notes == ("15% of the training data are the validation split, transforms included",)
    assert loaded.digest == take(loaders).digest != expected.digest


def test_a_table_is_divided_and_says_so(tmp_path):
    kinds = np.array(["cat", "dog", "eel"])[Y]
    frame = pd.DataFrame(X, columns=list("abcd"))
    frame.insert(1, "kind", kinds)
    frame.to_csv(tmp_path / "named.csv", index=False)
    np.savetxt(tmp_path / "bare.csv", np.column_stack([X, Y + 1]), delimiter=";")
    from_frame, from_file = (
        take(frame, options=Options(target="kind")),
        take(tmp_path / "named.csv", options=Options(target="kind")),
    )
    assert_same(from_file, from_frame)
    assert from_frame.class_names == ("cat", "dog", "eel")
    assert "30% of the samples are the test split" in from_frame.notes[0]
    assert "names are read as classes, in alphabetical order: cat is 0, dog is 1, eel is 2" in from_frame.notes[1]
    order = np.lexsort(X.T)
    for dataset, names in (
        (from_file, None),
        (take(tmp_path / "bare.csv", options=Options(kind="classes")), ("1", "2", "3")),
    ):
        x, y = (np.concatenate(parts) for parts in zip(*(whole(dataset, split) for split in SPLITS), strict=True))
        back = np.lexsort(x.T)
        np.testing.assert_allclose(x[back], X[order], rtol=1e-6)
        assert_array_equal(y[back], Y[order])
        assert names in (None, dataset.class_names)


@pytest.mark.parametrize(
    ("y", "kind", "expected", "names", "note"),
    [
        (Y, None, Y, (), None),
        (Y + 1, None, Y, ("1", "2", "3"), "labels start at 1"),
        (np.array([3, 7, 40])[Y], None, Y, ("3", "7", "40"), "labels are read as classes in their order: 3 is 0"),
        (np.array([-1, 1])[Y % 2], None, Y % 2, ("-1", "1"), "-1 is 0, 1 is 1"),
        (np.array(["b", "a", "c"])[Y], None, np.array([1, 0, 2])[Y], ("a", "b", "c"), "names are read as classes"),
        (np.array(["b", "a", "c"], object)[Y], None, np.array([1, 0, 2])[Y], ("a", "b", "c"), "names are read"),
        (Y == 1, None, (Y == 1).astype(int), (), None),
        (Y[:, None], None, Y, (), None),
        (np.eye(3)[Y], None, Y, (), "rows of one 1 among 3 are read as classes"),
        (np.eye(3, dtype=np.uint8)[Y], "labels", np.eye(3)[Y] == 1, (), "read as 3 labels"),
        (np.eye(3)[Y], "values", np.eye(3, dtype=np.float32)[Y], (), None),
        (1 - np.eye(3, dtype=int)[Y], None, np.eye(3)[Y] == 0, (), "3 labels, of which a sample may have several"),
        (Y + 0.5, None, (Y[:, None] + 0.5).astype(np.float32), (), "read as one target of a regression"),
        (Y * 1.0, "classes", Y, (), None),
        (Y, "values", Y[:, None].astype(np.float32), (), None),
        (np.zeros((90, 2)), None, np.zeros((90, 2), np.float32), (), None),
    ],
)
def test_targets_are_read_and_a_note_says_how(y, kind, expected, names, note):
    given = {**ARRAYS, "y_train": y[TRAIN], "y_test": y[TEST]}
    dataset = take(given, options=Options(kind=kind))
    streamed = None
    if y.dtype.kind not in "UO":
        parts = {
            s: TensorDataset(*map(torch.from_numpy, (X[of], y[of]))) for s, of in (("train", TRAIN), ("test", TEST))
        }
        streamed = take(parts, options=Options(kind=kind))
    for found in filter(None, (dataset, streamed)):
        assert_array_equal(whole(found, "test")[1], expected[TEST])
        assert whole(found, "test")[1].dtype.kind == {"i": "i", "b": "b", "f": "f"}[expected.dtype.kind]
        assert found.class_names == names
        assert (note is None) or any(note in line for line in found.notes)
        assert (found.kind == "labels") == (expected.dtype == bool)
    assert note or not dataset.notes


def test_several_targets_are_taken_as_they_are(tmp_path):
    """Whichever way they are given, they are those of the arrays."""
    real = X[:, 1].astype(float)
    of = {split: (X[part], {"kind": Y[part], "size": real[part]}) for split, part in (("train", TRAIN), ("test", TEST))}
    tuples = {split: (x, tuple(y.values())) for split, (x, y) in of.items()}
    names = {
        f"{kind}_{split}{i}": array
        for split, (x, y) in tuples.items()
        for kind, i, array in (("x", "", x), ("y", "_0", y[0]), ("y", "_1", y[1]))
    }
    np.savez(tmp_path / "several.npz", **names)
    streams = {
        split: [(torch.from_numpy(x[i]), {"kind": int(y["kind"][i]), "size": y["size"][i]}) for i in range(len(x))]
        for split, (x, y) in of.items()
    }
    loaders = {split: DataLoader(samples, 10) for split, samples in streams.items()}
    for given in (of, tuples, tmp_path / "several.npz", {**loaders, "val": loaders["test"]}):
        dataset = take(given)
        assert dataset.kind == "several"
        assert [dataset.classes_of(0), dataset.classes, dataset.classes_test] == [3, 0, None]
        _, targets = whole(dataset, "test")
        assert isinstance(targets, dict) == (given is not tuples and given != tmp_path / "several.npz")
        kind, size = tree_leaves(targets)
        assert_array_equal(kind, Y[TEST])
        assert_array_equal(size, real[TEST].astype(np.float32))
    assert len({take(given).digest for given in (tuples, tmp_path / "several.npz")}) == 1
    for wrong, message in (
        ((-Y, real), "y_train_0 is int64 of shape .*whole numbers from 0, one a sample"),
        ((Y, real[:50]), "x_train has 60 samples and y_train 50 labels"),
    ):
        with pytest.raises(InvalidInput, match=message):
            take({"train": (X[TRAIN], tuple(y[TRAIN] for y in wrong)), "test": tuples["test"]})
    with pytest.raises(InvalidInput, match=r"y_test: its targets are .*, those of the training data"):
        take({**tuples, "test": (X[TEST], (real[TEST], Y[TEST]))})
    with pytest.raises(InvalidInput, match="target_kind: is for one target, and a sample has 2"):
        take(tuples, options=Options(kind="values"))


HEADS = """
import numpy as np
from torch import nn
from torch.nn import functional as F

SIZES = 1

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(4, 12), nn.Linear(12, 3), nn.Linear(12, SIZES)

    def forward(self, x):
        x = F.relu(self.body(x))
        return self.kind(x), self.size(x)

build = Heads

def data():
    x = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    y = x[:, :3].argmax(1), x[:, 3]
    return {"train": (x[:400], (y[0][:400], y[1][:400])), "test": (x[400:], (y[0][400:], y[1][400:]))}

def loss(outputs, targets):
    return F.cross_entropy(outputs[0], targets[0]) + F.l1_loss(outputs[1][:, 0], targets[1])
"""


def test_a_target_that_only_ones_own_loss_can_compare_has_no_figures(tmp_path):
    """Here an output of two values, of which the loss takes one, for one target."""
    (tmp_path / "mine.py").write_text(HEADS.replace("SIZES = 1", "SIZES = 2"))
    steps = {"float_steps": 20, "search_steps": 150, "finetune_steps": 10, "estimate": "none"}
    settings = {"task": f"{tmp_path}/mine.py:build", **steps, "out": tmp_path / "run"}
    with pytest.raises(InvalidInput, match=r"output 1 is \(2,\), but the targets are \(\)"):
        run(make_config(settings), Monitor())
    metrics = run(make_config({**settings, "loss": "loss"}), Monitor())["metrics"]
    assert [of["output"] for of in metrics["targets"]] == ["kind"]
    assert metrics["parity_passed"]


@pytest.mark.parametrize("loss", [None, "loss"])
def test_a_run_of_several_targets(loss, tmp_path):
    (tmp_path / "mine.py").write_text(HEADS)
    steps = {"float_steps": 300, "search_steps": 150, "finetune_steps": 100, "estimate": "none"}
    out = tmp_path / "run"
    metrics = run(make_config({"task": f"{tmp_path}/mine.py:build", **steps, "loss": loss, "out": out}), Monitor())[
        "metrics"
    ]
    assert metrics["parity_passed"]
    assert metrics["qnet_accuracy"] is None
    assert 0 < metrics["qnet_loss"] < 1
    kind, size = metrics["targets"]
    assert [kind["output"], size["output"]] == ["kind", "size"]
    for of in ("float", "qnet"):
        assert kind[of]["accuracy"] > 0.6
        assert size[of]["r2"] > 0.5
    assert "kind: accuracy" in (out / "report.html").read_text()
    printed = StringIO()
    Console(file=printed, width=200).print(summary(out, read_record(out)))
    assert "size: R²" in printed.getvalue()


def test_bad_data_are_one_line(tmp_path, subtests):
    csv = {
        "word.csv": "a,b,y\n1,x,0\n",
        "short.csv": "a,b,y\n1,2\n",
        "one.csv": "y\n1\n",
        "hole.csv": "a,b,y\n1,2,1\n1,2,\n",
        "empty.csv": "",
    }
    for name, text in csv.items():
        (tmp_path / name).write_text(text)
    bad = X[TRAIN].copy()
    bad[3, 1] = np.nan
    loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), 8)

    class Endless(IterableDataset):
        def __iter__(self):
            return iter([])

    cases = [
        (tmp_path / "word.csv", {}, "word.csv: cannot be read as a table of numbers"),
        (tmp_path / "short.csv", {}, "short.csv: cannot be read as a table"),
        (tmp_path / "one.csv", {}, "one.csv: has 1 columns: needs features and a target"),
        (tmp_path / "hole.csv", {}, "hole.csv: column 'y': 1 targets are missing"),
        (tmp_path / "empty.csv", {}, "empty.csv: has 0 columns"),
        (tmp_path / "word.csv", {"target": "z"}, "word.csv: has no column 'z'; there are a, b, y"),
        (pd.DataFrame({"a": ["x"] * 9, "y": Y[:9]}), {}, "column 'a': samples are numbers"),
        (pd.DataFrame({"a": X[:9, 0], "y": ["u", None, "v"] * 3}), {}, "3 targets are missing"),
        ({**ARRAYS, "x_train": bad}, {}, "x_train: 1 values are NaN"),
        (folder(tmp_path / "nan", **{**ARRAYS, "x_train": bad}), {}, "x_train: 1 values are NaN"),
        (
            {"train": TensorDataset(*map(torch.from_numpy, (bad, Y[TRAIN]))), "test": loader},
            {},
            "x_train: 1 values are NaN",
        ),
        ({**ARRAYS, "w_train": np.ones(59)}, {}, "w_train: one weight a sample is needed"),
        ({**ARRAYS, "y_train": Y[:59]}, {}, "x_train has 60 samples and y_train 59 labels"),
        ({"train": loader}, {}, "has no 'test' split"),
        ({"train": loader, "test": loader, "dev": loader}, {}, "has 'dev'; there are train, val and test"),
        ({"train": loader, "test": loader}, {}, "there are no validation data, and a loader cannot be divided"),
        (loader, {}, "a loader cannot be divided"),
        ({"train": Endless(), "val": loader, "test": loader}, {}, "there are no samples"),
        (3, {}, "data: int is none of what is taken"),
        ((X, Y[:50]), {}, "has 90 samples and 50 labels"),
        ({**ARRAYS, "y_train": Y[TRAIN] * 1.0, "y_test": Y[TEST] * 1.0}, {}, "one integer class per sample"),
        (ARRAYS, {"kind": "labels"}, "labels are one integer class per sample"),
    ]
    for given, options, message in cases:
        with subtests.test(message), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's of an empty file
            with pytest.raises(InvalidInput) as caught:
                take(given, options=Options(**options))
            assert message in str(caught.value)
            assert ("cannot be read" in str(caught.value)) == ("cannot be read" in message)
            assert "\n" not in str(caught.value)


def test_mapped_arrays_are_never_loaded_whole(tmp_path, monkeypatch):
    """Of 40,000 samples at most a batch is read at once, and training is that of the arrays in memory."""
    x, y = RNG.normal(size=(40_000, 2, 8)).astype(np.float32) * 3 + 1, np.arange(40_000) % 3
    arrays = {"x_train": x, "y_train": y, "x_test": x[:50], "y_test": y[:50], "w_train": RNG.random(40_000)}
    held = take(arrays, options=Options(sequences=True))
    most = []
    read = np.memmap.__getitem__

    def spy(array, index):
        found = read(array, index)
        if isinstance(found, np.ndarray) and found.ndim == 3:
            most.append(len(found))
        return found

    monkeypatch.setattr(np.memmap, "__getitem__", spy, raising=False)
    mapped = take(folder(tmp_path / "big", **arrays), options=Options(sequences=True))
    normalizations = [Normalization.of(of.samples("train"), ()) for of in (held, mapped)]
    np.testing.assert_allclose(normalizations[0].mean, normalizations[1].mean, rtol=1e-12)
    np.testing.assert_allclose(normalizations[0].deviation, normalizations[1].deviation, rtol=1e-12)
    states = []
    for dataset in (held, mapped):
        check_scales(dataset.samples("train"), bits=8)
        task = training_task(normalizations[0].apply(dataset), 32)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        fit(model, task, steps=20, learning_rate=1e-2, seed=0)
        states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert isinstance(mapped.samples("train"), OnDisk)
    assert max(most) <= 64
    assert_same(mapped, held)


def test_training_task_takes_a_training_split_alone():
    tensors = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y + 1))
    for given, val in (
        (tensors, None),
        (DataLoader(tensors, 5), tensors),
        ((X, Y + 1), None),
        ((X, Y + 1, np.ones(90)), (X, Y + 1)),
    ):
        task = training_task(given, val=val, class_weights="balanced", label_smoothing=0.1)
        assert task.class_names == ("1", "2", "3")
        assert task.batch_size == (5 if isinstance(given, DataLoader) else 64)
        model = torch.nn.Linear(4, 3)
        assert np.isfinite(fit(model, task, steps=4, learning_rate=1e-2, seed=0)["val_loss"]).all()
    several = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))

    def pairs(batch):
        x, y = zip(*batch, strict=True)
        return torch.stack(x), {"class": torch.stack(y), "first": torch.stack(x)[:, :1]}

    loader = DataLoader(several, 8, collate_fn=pairs)
    task = training_task(loader, val=loader, output_shapes=((3,), (1,)))
    model = torch.nn.Linear(4, 4)
    history = fit(model, task, steps=200, learning_rate=3e-2, seed=0)
    assert history["val_loss"][-1] < history["val_loss"][0]
    with pytest.raises(InvalidInput, match="class_weights: 2 weights for 3 classes"):
        training_task((X, Y), class_weights=[1, 2])


MODEL = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

class Noisy(Dataset):
    def __init__(self, rows):
        generator = torch.Generator().manual_seed(rows.start)
        self.x = torch.randn(len(rows), 4, generator=generator)
        self.y = torch.stack([self.x[:, 0] > 0, self.x[:, 1] > 0.5, self.x[:, 2] + self.x[:, 3] > 0], 1).float()
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i] + 0.01 * torch.randn(4), self.y[i]

def build():
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

def data():
    test = Noisy(range(900, 1000))
    return {"train": DataLoader(Noisy(range(600)), 50, shuffle=True), "val": Noisy(range(600, 900)), "test": test}

def first_label(outputs, targets):
    return ((outputs[:, 0] > 0) == targets[:, 0]).float().mean()

def adam(parameters, rate):
    return torch.optim.Adam(parameters, rate)
"""


def test_a_run_of_loaders_several_labels_and_tries(tmp_path, subtests):
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    settings = {
        "task": f"{file}:build",
        "out": tmp_path / "run",
        "float_steps": 300,
        "search_steps": 150,
        "finetune_steps": 100,
        "tries": 2,
        "keep": "best",
        "metric": "first_label",
        "optimizer": "adam",
        "estimate": "none",
    }

    record = run(make_config(settings), Monitor())
    metrics = record["metrics"]
    assert metrics["parity_passed"]
    assert metrics["qnet_accuracy"] > 0.6 < metrics["float_accuracy"]
    for name in ("label_accuracy", "f1_micro", "f1_macro", "metric"):
        assert 0.8 < metrics[f"qnet_{name}"] <= 1, name
    assert record["data"]["samples"] == {"train": 600, "val": 300, "test": 100}
    assert "3 labels" in record["data"]["notes"][0]
    assert [of["seed"] for of in metrics["tries"]] == [0, 1]
    best = max(metrics["tries"], key=lambda of: (of["val_metric"], -of["val_loss"]))
    assert metrics["seed_kept"] == best["seed"]
    kept = tmp_path / "run" / f"try-seed{best['seed']}"
    for name in ("search.pt", "scheme.json", "finetune.pt"):
        assert (kept / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert "each label is there where" in json.loads((tmp_path / "run" / "outputs.json").read_text())["classes"]
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("best of 2 searches", "F1", "read as 3 labels"):
        with subtests.test(words):
            assert words in page
    again = Monitor()
    assert run(make_config(settings), again)["metrics"] == metrics
    assert {"float", "try-seed0", "try-seed1", "search", "finetune", "freeze", "parity"} <= set(again.done)
    own = runpy.run_path(str(file))["data"]()
    more = run(make_config({**settings, "tries": 3}), third := Monitor(), data=own)
    assert {"try-seed0", "try-seed1"} <= set(third.done)
    assert "try-seed2" not in third.done
    assert len(more["metrics"]["tries"]) == 3


def test_what_is_wrong_with_functions_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MODEL.replace("test = Noisy", "test = 1 / 0 or Noisy"))
    with pytest.raises(InvalidInput, match=r"mine\.py:data: fails in line 20: ZeroDivisionError"):
        resolve(f"{file}:build").load(None)
    with pytest.raises(InvalidInput, match="no function 'other' in it"):
        resolve(f"{file}:build").function("other")
    with pytest.raises(InvalidInput, match=r"function 'mine': give it in your own FILE\.py"):
        resolve("digits_mlp").function("mine")
    for settings, message in (
        ({"keep": "best", "luts": 900}, "keep best: luts prunes until the last step"),
        ({"scheduler": "s"}, "scheduler: give the optimizer"),
        ({"tries": 0}, "setting 'tries'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            make_config({"task": "digits_mlp", **settings})
