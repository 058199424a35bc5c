"""What the benchmarks of training share: a task's trained float model, and rows that are measured once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.metrics import accuracy
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Distillation, Shaping, Task, finetune, fit, predict
from hmq_fpga.study.budgets import pruning
from hmq_fpga.study.dataset import Dataset
from hmq_fpga.study.tasks import TASKS, training_task

Row = dict[str, Any]


class Baseline(NamedTuple):
    """A task with its trained float model, which is not to be changed."""

    model: nn.Module
    accuracy: float  # on the test split
    dataset: Dataset
    training: Task
    budget: Budget


def asked(doc: str) -> argparse.Namespace:
    """`tasks` and `seeds` of a script's command line; `doc` begins with what it is for."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS])
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


@lru_cache(maxsize=1)
def baseline(name: str, seed: int, label_smoothing: float = 0.0) -> Baseline:
    """Train the float model of a task."""
    task = TASKS[name]
    dataset = task.load(None)
    training = training_task(dataset, task.batch_size, label_smoothing=label_smoothing, input_noise=task.input_noise)
    torch.manual_seed(seed)
    model, budget = task.build(), task.budget
    fit(model, training, steps=budget.float_steps, learning_rate=budget.float_learning_rate, seed=seed)
    scores = predict(model, torch.from_numpy(dataset.x_test)).scores
    return Baseline(model, accuracy(scores, torch.from_numpy(dataset.y_test)), dataset, training, budget)


def instrumented(base: Baseline) -> QModel:
    """The float model with quantizers."""
    return instrument(base.model, base.training.input_shape, input_signed=base.training.input_signed)


def quantize(
    base: Baseline,
    target: Target,
    *,
    seed: int,
    distill: bool,
    method: str = "hmq",
    options: Mapping[str, Any] | None = None,
    shaping: Callable[[QModel, Target, Task], Shaping | None] = pruning,
) -> tuple[QModel, Scheme]:
    """Search and fine-tune, as `run` does."""
    model, training, budget = base.model, base.training, base.budget
    quantized, scheme, _ = find_scheme(
        instrumented(base), training, budget, target, method=method, options=options, seed=seed
    )
    finetune(
        quantized,
        training,
        steps=budget.finetune_steps,
        learning_rate=budget.learning_rate,
        seed=seed,
        shaping=shaping(quantized, target, training),
        distillation=Distillation(teacher=model) if distill else None,
    )
    return quantized, scheme


def fill(path: Path, wanted: Iterable[Row], measure: Callable[..., Row]) -> list[Row]:
    """The rows in a JSON file and those of `wanted` keys that are not there, each written as soon as it is measured."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    for key in missing(rows, wanted):
        rows.append(key | measure(**key))
        keep(path, rows)
    return rows


def keep(path: Path, rows: list[Row]) -> None:
    """Write rows in one step."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rows, indent=1) + "\n")
    new.replace(path)


def missing(rows: list[Row], wanted: Iterable[Row]) -> Iterator[Row]:
    """The keys of which there is no row."""
    return (key for key in wanted if not any(key.items() <= row.items() for row in rows))
