"""Training: the task, one loop, and the fine-tuning with frozen formats that every method shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import joined, parted, unwrapped
from hmq_fpga.search.optimizer import RAdam

Loss = Callable[[Tensor, Tensor], Tensor]
History = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn. Choices are made on training and validation data; a test split has no place here.

    Attributes:
        x_train, y_train: inputs `(n, *sample shape)`, channels first, of several inputs see `input_shapes`; and class
            numbers `(n,)`, or real targets `(n, *output shape)` of a regression. Classes 0 and 1 of a model with one
            output are told by its sign.
        x_val, y_val: validation split.
        custom_loss: mean loss of a batch of targets and of what the user's model returns, its final functions
            included; None: of classes cross entropy (of one output the logistic loss) of the scores before a final
            softmax or sigmoid, of a regression squared error. Of a model with several outputs it gets them side by
            side, `(batch, values)`; see `layers.joined`.
        batch_size: samples per optimizer step.
        input_shapes: of one sample of each of several inputs, channels first; then samples hold them in a row,
            `(n, values)`, each flattened channels last. Empty where there is one input.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    custom_loss: Loss | None = None
    batch_size: int = 64
    input_shapes: tuple[Shape, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether targets are real numbers."""
        return self.y_train.is_floating_point()

    def loss(self, outputs: Tensor, targets: Tensor, scores: Tensor | None = None) -> Tensor:
        """Mean loss of a batch.

        Args:
            outputs: what the user's model returns.
            targets: classes or real targets.
            scores: the outputs before a final softmax or sigmoid; None where there is none.
        """
        if self.custom_loss:
            return self.custom_loss(outputs, targets)
        if self.regression:
            return F.mse_loss(like(outputs, targets), targets)
        scores = outputs if scores is None else scores
        if scores.shape[1:] in _ONE_NUMBER:
            return F.binary_cross_entropy_with_logits(scores.flatten(), targets.to(scores.dtype))
        return F.cross_entropy(scores, targets)

    def accuracies(self, split: str, scores: Tensor, targets: Tensor) -> dict[str, float]:
        """`{"<split>_accuracy": share of right classes}`; of a regression nothing: its loss says all."""
        return {} if self.regression else {f"{split}_accuracy": accuracy(scores, targets)}

    @property
    def input_shape(self) -> Shape | tuple[Shape, ...]:
        """Shape of one sample, channels first; of several inputs a tuple of theirs."""
        return self.input_shapes or tuple(self.x_train.shape[1:])

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


class Shaping(Protocol):
    """Changes parameters while they are trained, in place."""

    def __call__(self, step: int, steps: int) -> None:
        """Act before optimizer step `step` of `steps`, counted from 0, and with `step == steps` after the last."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Learning from a float model beside the data (Hinton, Vinyals, Dean, 2015, Section 2).

    The loss is `(1 - share)` of the task's and `share` of the divergence from the teacher: of classes T^2 times the
    Kullback-Leibler divergence of the softmaxes at temperature T, of one score for two classes and of a regression the
    squared error.

    Attributes:
        teacher: the float model, as it is in evaluation.
        share: of the divergence, from 0 to 1.
        temperature: T.
    """

    teacher: nn.Module
    share: float = 0.5
    temperature: float = 2.0

    def mixed(self, loss: Tensor, x: Tensor, scores: Tensor, task: Task) -> Tensor:
        """The loss of a batch `x` of which the student has `scores`."""
        with torch.no_grad():
            taught = output_of(self.teacher, x, task.input_shapes).scores
        if task.regression or task.custom_loss or scores.shape[1:] in _ONE_NUMBER:
            divergence = F.mse_loss(scores, taught)
        else:
            student, teacher = (F.log_softmax(values / self.temperature, 1) for values in (scores, taught))
            divergence = self.temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return (1 - self.share) * loss + self.share * divergence


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


class Output(NamedTuple):
    """A batch of outputs, several of a model in a row; see `layers.joined`.

    Attributes:
        returned: what the user's model returns.
        scores: the same before a final softmax, sigmoid or argmax: what classes are judged by.
    """

    returned: Tensor
    scores: Tensor


def like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs in the shape of targets, where they are one number for each sample."""
    return outputs.reshape(targets.shape) if outputs.shape[1:] in _ONE_NUMBER and targets[0].numel() == 1 else outputs


_VALUES_AT_ONCE = 1 << 22
_ONE_NUMBER = ((1,), ())  # for each sample
_RESHAPES = ("squeeze", "unsqueeze", "flatten", "view", "reshape")
_JUDGED_BEFORE = ("softmax", "logsoftmax", "log_softmax", "sigmoid", "argmax")


class _Noting(TorchFunctionMode):
    """Remembers what softmaxes and sigmoids were given, also where their results are then reshaped."""

    NAMES = (*_JUDGED_BEFORE, "special_softmax", "special_log_softmax", "special_expit")

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self._made.append((result, self._before(args[0] if args else kwargs["input"])))
        elif name in _RESHAPES and args and (before := self._before(args[0])) is not args[0]:
            self._made.append((result, before))
        return result

    def _before(self, value: Tensor) -> Tensor:
        return next((given for made, given in self._made if made is value), value)

    def output(self, returned: Tensor) -> Output:
        return Output(returned, self._before(returned))


def finished(model: QModel, values: Tensor) -> Output:
    """Output of the user's model, from the values that its `QModel` puts out."""
    returned = model.finish(values)
    judged = any(final and final.name.lower() in _JUDGED_BEFORE for final in model.finals)
    return Output(returned, values if judged else returned)


def output_of(model: nn.Module, x: Tensor, shapes: Sequence[Shape] = ()) -> Output:
    """Output of a float model, or of a `QModel` with the final functions of the user's; see `Task.input_shapes`."""
    if isinstance(model, QModel):
        return finished(model, model(x))
    noting = _Noting()
    with noting:  # which does not see what is compiled
        returned = joined(unwrapped(model)(*parted(x, shapes)))
    return noting.output(returned)


def at_once(x: Tensor) -> int:
    """How many of the samples `x` to compute at a time: all but of large images, which would need much memory."""
    return max(_VALUES_AT_ONCE // x[0].numel(), 1)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, shapes: Sequence[Shape] = ()) -> Output:
    """`output_of` many samples, batch by batch."""
    outputs = [output_of(model, batch, shapes) for batch in x.split(min(at_once(x), 1024))]
    return Output(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """Loss, and of classes the accuracy, on the validation split."""
    returned, scores = predict(model, task.x_val, task.input_shapes)
    loss = task.loss(returned, task.y_val, scores)
    return {"val_loss": float(loss), **task.accuracies("val", scores, task.y_val)}


def accuracy(scores: Tensor, classes: Tensor) -> float:
    """Share of samples whose largest score is that of their class; a single score is positive for class 1."""
    found = scores.flatten() > 0 if scores.shape[1:] in _ONE_NUMBER else scores.argmax(1)
    return float((found == classes).double().mean())


def fit(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    shaping: Shaping | None = None,
    distillation: Distillation | None = None,
    listener: Listener = ignore,
) -> History:
    """Train all parameters with RAdam and a cosine schedule from `learning_rate` to zero; keep the last state.

    Args:
        model: trained in place.
        task: training and validation data.
        steps: optimizer steps.
        learning_rate: at the start.
        seed: of the order of the batches.
        shaping: acts between the steps.
        distillation: what to learn from beside the data.
        listener: hears of the progress.

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    optimizer = RAdam((model.parameters(), learning_rate))
    recorder = Recorder(listener)
    every = max(steps // 50, 1)
    plain = False  # nothing to note, as the first batch shows: noting takes time
    model.train()
    for step, (x, y) in enumerate(batches(task, steps, torch.Generator().manual_seed(seed)), 1):
        if plain:
            returned = scores = joined(model(*parted(x, task.input_shapes)))
        else:
            returned, scores = output_of(model, x, task.input_shapes)
        plain = returned is scores and not isinstance(model, QModel)
        loss = task.loss(returned, y, scores)
        if distillation:
            loss = distillation.mixed(loss, x, scores, task)
        optimizer.step(loss, falling(step - 1, steps))
        if shaping:
            shaping(step, steps)
        if step % every == 0 or step == steps:
            model.eval()
            recorder(step, steps, {"epoch": task.epoch(step), "loss": finite(loss), **evaluate(model, task)})
            model.train()
    optimizer.release()
    model.eval()
    return recorder.history


def falling(step: int, steps: int) -> float:
    """Share of the learning rate before `step` of `steps`: a cosine from one to zero."""
    return (1 + math.cos(math.pi * step / max(steps, 1))) / 2


def finetune(
    model: QModel,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    shaping: Shaping | None = None,
    distillation: Distillation | None = None,
    listener: Listener = ignore,
) -> History:
    """Train weights and biases of a model whose scheme is set, in place (the paper's phase two); see `fit`."""
    if not model.formats:
        raise AssertionError("finetune() needs a scheme")
    return fit(
        model,
        task,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        shaping=shaping,
        distillation=distillation,
        listener=listener,
    )


def finite(loss: Tensor) -> float:
    """The value of a loss.

    Raises:
        FloatingPointError: when it is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"training loss became {value}; lower the learning rate, normalize the inputs, or check the data"
        )
    return value
