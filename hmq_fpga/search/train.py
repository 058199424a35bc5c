"""Training: the task, one loop, and the fine-tuning with frozen formats that every method shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import joined
from hmq_fpga.search.optimizer import RAdam

Loss = Callable[[Tensor, Tensor], Tensor]
History = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn. Choices are made on training and validation data; a test split has no place here.

    Attributes:
        x_train, y_train: inputs `(n, *sample shape)`, channels first, and class numbers `(n,)`, or real targets
            `(n, *output shape)` of a regression.
        x_val, y_val: validation split.
        custom_loss: mean loss of a batch of outputs and targets; None: cross entropy, of a regression squared error.
            Of a model with several outputs it gets them side by side, `(batch, values)`; see `graph.joined`.
        batch_size: samples per optimizer step.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    custom_loss: Loss | None = None
    batch_size: int = 64

    @property
    def regression(self) -> bool:
        """Whether targets are real numbers."""
        return self.y_train.is_floating_point()

    @property
    def loss(self) -> Loss:
        """Mean loss of a batch of outputs and targets."""
        return self.custom_loss or (F.mse_loss if self.regression else F.cross_entropy)

    def accuracies(self, split: str, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """`{"<split>_accuracy": share of right classes}`; of a regression nothing: its loss says all."""
        return {} if self.regression else {f"{split}_accuracy": accuracy(outputs, targets)}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, channels first."""
        return tuple(self.x_train.shape[1:])

    def epoch(self, step: int) -> float:
        """Passes over the training data after `step` optimizer steps."""
        return step * self.batch_size / len(self.x_train)

    @property
    def input_signed(self) -> bool:
        """Whether training inputs can be negative."""
        return bool(self.x_train.min() < 0)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimizer steps of each phase.

    Attributes:
        float_steps: training of the float baseline.
        search_steps: HMQ's phase one.
        finetune_steps: phase two, weights only.
        float_learning_rate: of the float baseline.
        learning_rate: of the weights in both phases.
    """

    float_steps: int = 3000
    search_steps: int = 1500
    finetune_steps: int = 1500
    float_learning_rate: float = 1e-2
    learning_rate: float = 2e-3


class Penalty(Protocol):
    """Something to minimize besides the task's loss."""

    def __call__(self, step: int, steps: int) -> Tensor:
        """Its value before `step` of `steps`, 0-d."""


class Listener(Protocol):
    """Hears of training: called now and then, and after the last step."""

    def __call__(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Take the figures after `step` of `steps`."""


def ignore(step: int, steps: int, values: dict[str, float]) -> None:
    """Do nothing with the news."""


@dataclass
class Recorder:
    """Collects figures into a history, passing them on."""

    listener: Listener = ignore
    history: History = field(default_factory=dict)

    def __call__(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Append `values` and `step`."""
        for key, value in {"step": step, **values}.items():
            self.history.setdefault(key, []).append(value)
        self.listener(step, steps, values)


def batches(task: Task, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` training batches, reshuffled each epoch; a last short batch is left out."""
    n, size = len(task.x_train), min(task.batch_size, len(task.x_train))
    done = 0
    while done < steps:
        order = torch.randperm(n, generator=generator).to(task.x_train.device)
        for start in range(0, min(n - size + 1, (steps - done) * size), size):
            index = order[start : start + size]
            yield task.x_train.index_select(0, index), task.y_train.index_select(0, index)
            done += 1


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outputs of a model for `x`, `(n, *sample shape)`, batch by batch; several in a row, see `graph.joined`."""
    return torch.cat([joined(model(batch)) for batch in x.split(1024)])


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], task: Task) -> dict[str, float]:
    """Loss, and of classes the accuracy, on the validation split."""
    outputs = predict(model, task.x_val)
    return {"val_loss": float(task.loss(outputs, task.y_val)), **task.accuracies("val", outputs, task.y_val)}


def accuracy(outputs: Tensor, classes: Tensor) -> float:
    """Share of samples whose largest output is that of their class."""
    return float((outputs.argmax(1) == classes).double().mean())


def fit(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    penalty: Penalty | None = None,
    listener: Listener = ignore,
) -> History:
    """Train all parameters with RAdam and a cosine schedule from `learning_rate` to zero; keep the last state.

    Args:
        model: trained in place.
        task: training and validation data.
        steps: optimizer steps.
        learning_rate: at the start.
        seed: of the order of the batches.
        penalty: added to the task's loss.
        listener: hears of the progress.

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    optimizer = RAdam((model.parameters(), learning_rate))
    recorder = Recorder(listener)
    every = max(steps // 50, 1)
    model.train()
    for step, (x, y) in enumerate(batches(task, steps, torch.Generator().manual_seed(seed)), 1):
        loss = task.loss(joined(model(x)), y)
        rate = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        optimizer.step(loss if penalty is None else loss + penalty(step - 1, steps), rate)
        if step % every == 0 or step == steps:
            model.eval()
            recorder(step, steps, {"epoch": task.epoch(step), "loss": finite(loss), **evaluate(model, task)})
            model.train()
    optimizer.release()
    model.eval()
    return recorder.history


def finetune(
    model: QModel,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    penalty: Penalty | None = None,
    listener: Listener = ignore,
) -> History:
    """Train weights and biases of a model whose scheme is set, in place (the paper's phase two); see `fit`."""
    if not model.formats:
        raise AssertionError("finetune() needs a scheme")
    return fit(model, task, steps=steps, learning_rate=learning_rate, seed=seed, penalty=penalty, listener=listener)


def finite(loss: Tensor) -> float:
    """The value of a loss.

    Raises:
        FloatingPointError: when it is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"training loss became {value}; lower the learning rate or check the data")
    return value
