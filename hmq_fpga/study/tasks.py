"""Named tasks: a model, its data and a training budget."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.train import Budget
from hmq_fpga.search.train import Task as TrainingTask
from hmq_fpga.study import data
from hmq_fpga.study.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that can be run.

    Attributes:
        summary: one line for `hmq-fpga tasks`.
        build: makes the float model.
        load: makes the data, given the user's `--data` or None.
        batch_size: samples per optimizer step.
        budget: optimizer steps and learning rates.
        threads: of the training; more than one only slows a small network down.
        io_type: of the hls4ml project; streams where full unrolling is out of proportion.
        source: text of the user's file that builds the model; empty for a task of ours.
    """

    summary: str
    build: Callable[[], nn.Module]
    load: Callable[[Path | None], Dataset]
    batch_size: int = 64
    budget: Budget = field(default_factory=Budget)
    threads: int = 1
    io_type: Literal["io_parallel", "io_stream"] = "io_parallel"
    source: str = ""


def _mlp(*widths: int) -> nn.Module:
    """Dense layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _digits_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _mnist_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


TASKS = {
    "digits_mlp": Task(
        summary="64-64-32-32-10 on scikit-learn's 8x8 digits",
        build=lambda: _mlp(64, 64, 32, 32, 10),
        load=lambda path: data.load("digits", path),
    ),
    "digits_cnn": Task(
        summary="two convolutions with BatchNorm and pooling on scikit-learn's 8x8 digits",
        build=_digits_cnn,
        load=lambda path: data.as_images(data.load("digits", path), (1, 8, 8)),
    ),
    "pendigits_mlp": Task(
        summary="16-64-32-32-10 on the UCI pen digits",
        build=lambda: _mlp(16, 64, 32, 32, 10),
        load=lambda path: data.load("pendigits", path),
        budget=Budget(float_steps=8000, search_steps=4000, finetune_steps=6000),
    ),
    "mnist_cnn": Task(
        summary="three convolutions with BatchNorm on MNIST",
        build=_mnist_cnn,
        load=lambda path: data.load("mnist", path),
        batch_size=128,
        threads=os.cpu_count() or 1,
        budget=Budget(float_steps=3000, search_steps=1800, finetune_steps=1800, float_learning_rate=5e-3),
        io_type="io_stream",
    ),
}


def resolve(name: str) -> Task:
    """The named task, or the one of a user's `FILE.py:FUNCTION`, whose function returns the float module.

    Raises:
        InvalidInput: when there is no such task, file or function, or the function makes no module.
    """
    if name in TASKS:
        return TASKS[name]
    file, separator, function = name.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise InvalidInput(f"unknown task {name!r}; there are {', '.join(TASKS)}, or give FILE.py:FUNCTION")
    build = _function(Path(file), function)

    def module() -> nn.Module:
        made = build()
        if not isinstance(made, nn.Module):
            raise InvalidInput(f"{name}: must return a torch module, returned {type(made).__name__}")
        return made

    def load(path: Path | None) -> Dataset:
        if path is None:
            raise InvalidInput(f"{name}: give the data of your own model with --data FILE.npz")
        return data.load_npz(path)

    return Task(summary=name, build=module, load=load, source=Path(file).read_text())


def _function(file: Path, name: str) -> Callable[[], object]:
    if not file.is_file():
        raise InvalidInput(f"{file}: no such file; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code: anything can come out of it
        raise InvalidInput(f"{file}: cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidInput(f"{file}: no function {name!r} in it")
    return function


def training_task(dataset: Dataset, batch_size: int) -> TrainingTask:
    """The part of a data set that a search may see: its test split stays behind."""
    return TrainingTask(
        x_train=torch.from_numpy(dataset.x_train),
        y_train=torch.from_numpy(dataset.y_train),
        x_val=torch.from_numpy(dataset.x_val),
        y_val=torch.from_numpy(dataset.y_val),
        batch_size=batch_size,
    )
