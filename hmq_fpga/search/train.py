"""Training: the task, one loop, and the fine-tuning with frozen formats that every method shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search import parallel
from hmq_fpga.search.checkpoint import Checkpoint, Stateful
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import joined, parted, unwrapped
from hmq_fpga.search.metrics import ONE_NUMBER, figures, like
from hmq_fpga.search.optimizer import Group, OptimizerFactory, RAdam, SchedulerFactory, Stepper, Steps
from hmq_fpga.search.samples import Batch, InMemory, Samples, Targets, Weighted, endless, parts_of, together

Loss = Callable[..., Tensor]
Metric = Callable[[Any, Any], float | Tensor]
History = dict[str, list[float]]
Figures = Callable[[], dict[str, float]]  # of a step, computed where somebody wants to hear of them
Split = Literal["train", "val"]
Keep = Literal["last", "best"]
Kind = Literal["classes", "labels", "values", "several"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn. Choices are made on training and validation data; a test split has no place here.

    Attributes:
        x_train, y_train: inputs `(n, *sample shape)`, channels first, of several inputs see `input_shapes`; and class
            numbers `(n,)`, several labels for each sample as bool `(n, labels)`, or real targets `(n, *output shape)`
            of a regression. Classes 0 and 1 of a model with one output are told by its sign. Targets may be a tuple
            or dictionary of such, in the order of the model's outputs, see `output_shapes`.
        x_val, y_val: validation split.
        streams: a split that is not in memory, by name, "train" or "val". Its tensors above have no samples, `(0,
            *sample shape)`, and only tell shapes, types and device.
        w_train, w_val: how much each sample counts, `(n,)`.
        class_weights: how much the samples of each class count, `(classes,)`.
        label_smoothing: share of a class's probability that is spread over all of them, in cross entropy.
        input_noise: deviation of normal noise that training batches get, in deviations of each input value over the
            training split, within its least and largest (Bishop, "Training with Noise is Equivalent to Tikhonov
            Regularization", 1995). Samples of a stream have a transform of their own.
        custom_loss: mean loss of a batch of targets and of what the user's model returns, its final functions
            included; with weights, which it gets as a third argument, the weighted mean. None: of classes cross entropy
            (of one output the logistic loss) of the scores before a final softmax or sigmoid, of labels the logistic
            loss of each, of a regression squared error; of several targets the sum. Of a model with several outputs
            it gets a list of them where `output_shapes` are given, else they stand side by side, `(batch, values)`;
            see `layers.joined`.
        metric: a figure of what the user's model returns, as `custom_loss` gets it, and the targets of a whole split;
            the larger the better.
        optimizer: makes the optimizer of a model's parameters, given them and a learning rate; None: RAdam.
        scheduler: makes the schedule of such an optimizer, given it and the number of steps; None: a cosine to zero.
        batch_size: samples per optimizer step, where a stream does not decide.
        input_shapes: of one sample of each of several inputs, channels first; then samples hold them in a row,
            `(n, values)`, each flattened channels last. Empty where there is one input.
        output_shapes: of one sample of each of several outputs, channels first, in the order in which they stand in
            the tuples and dictionaries that the model returns.
        class_names: what the user calls the classes; empty where they are numbers from 0.
        notes: what was done to the user's data, a sentence each.
    """

    x_train: Tensor
    y_train: Targets
    x_val: Tensor
    y_val: Targets
    streams: Mapping[str, Samples] = field(default_factory=dict)
    w_train: Tensor | None = None
    w_val: Tensor | None = None
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    input_noise: float = 0.0
    custom_loss: Loss | None = None
    metric: Metric | None = None
    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    batch_size: int = 64
    input_shapes: tuple[Shape, ...] = ()
    output_shapes: tuple[Shape, ...] = ()
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def samples(self, split: Split) -> Samples:
        """A split, for passes through it."""
        if split in self.streams:
            return self.streams[split]
        x, y, w = (getattr(self, f"{name}_{split}") for name in "xyw")
        return InMemory(x, y if w is None else Weighted(y, w))

    def disturbed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A batch of training inputs with `input_noise`; `generator` is the CPU's."""
        if not self.input_noise:
            return x
        deviation, least, largest = self._spread
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return (x + self.input_noise * deviation * noise).clamp(least, largest)

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each input value over the training split: deviation, least and largest."""
        return self.x_train.std(0), self.x_train.amin(0), self.x_train.amax(0)

    @property
    def kind(self) -> Kind:
        """What targets are: classes, labels, real values, or several of these."""
        if not isinstance(self.y_train, Tensor):
            return "several"
        if self.y_train.is_floating_point():
            return "values"
        return "labels" if self.y_train.ndim > 1 else "classes"

    @property
    def regression(self) -> bool:
        """Whether targets are real numbers."""
        return all(t.is_floating_point() for t in tree_leaves(self.y_train))

    def loss(self, outputs: Tensor, targets: Targets, scores: Tensor | None = None) -> Tensor:
        """Mean loss of a batch.

        Args:
            outputs: what the user's model returns.
            targets: of a batch, with their weights where they have some.
            scores: the outputs before a final softmax or sigmoid; None where there is none.
        """
        targets, weights = parts_of(targets)
        if self.custom_loss:
            given = self.outputs(outputs)
            return self.custom_loss(given, targets) if weights is None else self.custom_loss(given, targets, weights)
        scores = outputs if scores is None else scores
        if isinstance(targets, Tensor):
            return self._loss(outputs, targets, scores, weights)
        of_each = zip(self.parts(outputs), tree_leaves(targets), self.parts(scores), strict=True)
        return torch.stack([self._loss(*each, weights) for each in of_each]).sum()

    def outputs(self, outputs: Tensor) -> Tensor | list[Tensor]:
        """Outputs as the user's loss and metric take them."""
        return self.parts(outputs) if self.output_shapes else outputs

    def parts(self, outputs: Tensor) -> list[Tensor]:
        """Several outputs, from their row.

        Raises:
            InvalidInput: where their shapes are not known.
        """
        found = parted(outputs, self.output_shapes)
        if len(found) < len(tree_leaves(self.y_train)):
            raise InvalidInput("task: there are several targets: give output_shapes, those of the model's outputs")
        return found

    def _loss(self, outputs: Tensor, targets: Tensor, scores: Tensor, weights: Tensor | None) -> Tensor:
        if self.class_weights is not None and targets.ndim == 1 and not targets.is_floating_point():
            of_class = self.class_weights.to(targets.device)[targets]
            weights = of_class if weights is None else weights * of_class
        if weights is None:
            return self._losses(outputs, targets, scores, "mean")
        losses = self._losses(outputs, targets, scores, "none")
        return (losses.flatten(1).mean(1) if losses.ndim > 1 else losses) @ weights / weights.sum()

    def _losses(self, outputs: Tensor, targets: Tensor, scores: Tensor, reduction: str) -> Tensor:
        if targets.is_floating_point():
            return F.mse_loss(like(outputs, targets), targets, reduction=reduction)
        if targets.ndim > 1 or scores.shape[1:] in ONE_NUMBER:
            scores = scores.reshape(targets.shape)
            wanted = targets.to(scores.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(scores, wanted, reduction=reduction)
        return F.cross_entropy(scores, targets, reduction=reduction, label_smoothing=self.label_smoothing)

    def accuracies(self, split: str, scores: Tensor, targets: Targets) -> dict[str, float]:
        """`{"<split>_accuracy": …}` of classes and labels that one output tells; else nothing: the loss says all."""
        targets, _ = parts_of(targets)
        if self.kind in ("values", "several") or self.output_shapes:
            return {}
        return {f"{split}_accuracy": figures(scores, scores, targets)["accuracy"]}

    @property
    def input_shape(self) -> Shape | tuple[Shape, ...]:
        """Shape of one sample, channels first; of several inputs a tuple of theirs."""
        return self.input_shapes or tuple(self.x_train.shape[1:])

    def epoch(self, step: int) -> float:
        """Passes over the training data after `step` optimizer steps."""
        return step * self.batch_size / len(self.samples("train"))

    @property
    def input_signed(self) -> bool:
        """Whether training inputs can be negative."""
        return self.samples("train").signed

    def stepper(self, parameters: Iterable[nn.Parameter], rate: float, steps: int, *others: Group) -> Stepper:
        """What descends: the task's optimizer for the parameters, and RAdam for others.

        Args:
            parameters: of the model.
            rate: their learning rate.
            steps: that there will be.
            others: further parameters and their learning rates.
        """
        if self.optimizer is None:
            return RAdam((parameters, rate), *others)
        return Steps(self.optimizer(list(parameters), rate), self.scheduler, steps, RAdam(*others))


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
    """Changes parameters while they are trained, in place; one that remembers anything is `Stateful`, too."""

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
        if task.kind != "classes" or task.custom_loss or scores.shape[1:] in ONE_NUMBER:
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

    def state_dict(self) -> dict[str, Any]:
        """The history so far."""
        return {key: list(values) for key, values in self.history.items()}

    def load_state_dict(self, state: History) -> None:
        """Go on with another's."""
        self.history.clear()
        self.history.update(state)


def rank(figures: Mapping[str, float]) -> tuple[float, float]:
    """What validation figures are compared by: the user's metric, or accuracy, then the loss; the larger the better."""
    first = figures.get("val_metric", figures.get("val_accuracy", 0.0))
    return first, -figures["val_loss"]


@dataclass
class Best:
    """Keeps the state of a model that is best on validation data, of those that a training tells of.

    Attributes:
        model: in training.
        listener: hears of the figures, too.
    """

    model: nn.Module
    listener: Listener = ignore
    _rank: tuple[float, float] | None = None
    _state: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Look at the figures after `step`; of equal states the later is kept."""
        if self._rank is None or rank(values) >= self._rank:
            self._rank = rank(values)
            self._state = {name: value.clone() for name, value in self._tensors()}
        self.listener(step, steps, values)

    def restore(self) -> None:
        """Give the model the state that was kept, in every process that of the first."""
        if self._state:
            self.model.load_state_dict(self._state, strict=False)  # but for what is no tensor
        for _, value in self._tensors():
            parallel.take_from_first(value)

    def state_dict(self) -> dict[str, Any]:
        """What is kept so far."""
        return {"rank": list(self._rank or ()), "state": self._state}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.model.state_dict().items() if isinstance(value, Tensor)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""
        self._rank, self._state = tuple(state["rank"]) or None, dict(state["state"])


def batches(task: Task, steps: int, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
    """The training batches of steps `start … steps - 1`, reshuffled each epoch; a last short batch is left out.

    Of several processes each gets its part of every batch.
    """
    passed = ((task.disturbed(x, generator), y) for x, y in endless(task.samples("train"), task.batch_size, generator))
    for x, y in islice(passed, start, steps):
        yield parallel.part(x), tree_map(parallel.part, y)


def train(
    step: Callable[[int, Tensor, Tensor], Figures],
    task: Task,
    *,
    parts: Mapping[str, Stateful],
    steps: int,
    seed: int,
    news: int,
    settings: object,
    listener: Listener = ignore,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Take `steps` steps on batches of training data, from where a checkpoint left them; see `repeat`.

    Args:
        step: takes one: gets its number from 0 and a batch.
        task: training data.
        parts: everything that steps change, by name.
        steps: in all.
        seed: of the order of the batches.
        news: how often the listener hears.
        settings: all else that decides what a step does; its `repr` tells it from others.
        listener: hears of the progress.
        checkpoint: where the state is kept meanwhile.
    """

    def feed(done: int) -> Iterable[Batch]:
        return batches(task, steps, torch.Generator().manual_seed(seed), done)

    def numbered(number: int, x: Tensor, y: Tensor) -> Figures:
        figures = step(number, x, y)
        return lambda: {"epoch": task.epoch(number + 1), **figures()}

    described = (settings, seed, task.batch_size)
    return repeat(
        numbered,
        feed,
        parts=parts,
        steps=steps,
        news=news,
        settings=described,
        listener=listener,
        checkpoint=checkpoint,
    )


def repeat(
    step: Callable[..., Figures],
    feed: Callable[[int], Iterable[tuple[Any, ...]]],
    *,
    parts: Mapping[str, Stateful],
    steps: int,
    news: int,
    settings: object,
    listener: Listener = ignore,
    checkpoint: Checkpoint | None = None,
) -> History:
    """The one loop of all that takes many steps: it goes on from a checkpoint, and says how far it has come.

    Of several processes only the first says so and has a history.

    Args:
        step: gets its number from 0 and what was fed for it.
        feed: what the steps get, from the number of those that are done.
        parts: as all that follows, see `train`.
        steps: in all.
        news: how often the listener hears.
        settings: what decides the steps.
        listener: hears of the progress.
        checkpoint: where the state is kept meanwhile.
    """
    recorder = Recorder(listener)
    kept = {**parts, "history": recorder}
    done = checkpoint.restore(kept, (settings, steps)) if checkpoint else 0
    every = max(steps // news, 1)
    for number, fed in enumerate(feed(done), done):
        figures = step(number, *fed)
        if ((number + 1) % every == 0 or number + 1 == steps) and parallel.number() == 0:
            recorder(number + 1, steps, figures())
        if checkpoint:
            checkpoint.offer(kept, number + 1, last=number + 1 == steps)
    return recorder.history


@contextmanager
def learning(model: nn.Module, optimizer: Stepper) -> Iterator[Stepper]:
    """Within, a model is in training, and parameters are an optimizer's; afterwards, and after an error, as before."""
    model.train()
    try:
        yield optimizer
    finally:
        optimizer.release()
        model.eval()


class Output(NamedTuple):
    """A batch of outputs, several of a model in a row; see `layers.joined`.

    Attributes:
        returned: what the user's model returns.
        scores: the same before a final softmax, sigmoid or argmax: what classes are judged by.
    """

    returned: Tensor
    scores: Tensor


_VALUES_AT_ONCE = 1 << 22  # of inputs
_VALUES_IN_CACHE = 1 << 18  # likewise, where a processor's caches are to hold what a network makes of them
_EVALUATIONS = (10, 50)  # of a training, at least and at most
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
    """How many of the samples `x` to compute at a time: fewer of images, which would need much memory."""
    return max((_VALUES_IN_CACHE if x.is_cpu else _VALUES_AT_ONCE) // x[0].numel(), 1)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, shapes: Sequence[Shape] = ()) -> Output:
    """`output_of` many samples, batch by batch."""
    outputs = [output_of(model, batch, shapes) for batch in x.split(min(at_once(x), 1024))]
    return Output(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, through: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Loss, of classes and labels the accuracy, and the user's metric, on the validation split.

    `through`: what computes the values of an instrumented model in its place.
    """
    samples, found = task.samples("val"), []
    size = min(at_once(task.x_val), 1024) if isinstance(samples, InMemory) else task.batch_size
    for x, y in samples.in_order(size):
        if through and isinstance(model, QModel):
            output = finished(model, through(x))
        else:
            output = output_of(model, x, task.input_shapes)
        found.append((output.returned, (output.scores, y)))
    returned, (scores, targets) = together(found)
    told = {"val_loss": float(task.loss(returned, targets, scores)), **task.accuracies("val", scores, targets)}
    if task.metric:
        told["val_metric"] = float(task.metric(task.outputs(returned), parts_of(targets)[0]))
    return told


def fit(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    shaping: Shaping | None = None,
    distillation: Distillation | None = None,
    keep: Keep = "last",
    autocast: torch.dtype | None = None,
    listener: Listener = ignore,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train all parameters with RAdam and a cosine schedule from `learning_rate` to zero, or as the task has it.

    Of several processes each has its part of every batch: gradients are averaged, and so are the running statistics
    of BatchNorms, which normalize a part by its own statistics.

    Args:
        model: trained in place.
        task: training and validation data.
        steps: optimizer steps.
        learning_rate: at the start.
        seed: of the order of the batches.
        shaping: acts between the steps.
        distillation: what to learn from beside the data.
        keep: the last state, or that which was best on validation data, see `rank`, of some fifty.
        autocast: lower precision of the forward pass, such as `torch.bfloat16`, where PyTorch takes it for safe.
        listener: hears of the progress.
        checkpoint: where the state is kept meanwhile, and from where this goes on.

    Raises:
        InvalidInput: when the best state is wanted of a shaping, whose work only the last one has all of.
        FloatingPointError: when the loss is no longer finite.
    """
    if shaping and keep == "best":
        raise InvalidInput(
            "keep 'best': pruning ends with the last step, whose state alone keeps its bound: keep 'last'"
        )
    best = Best(model, listener) if keep == "best" else None
    plain = False  # nothing to note, as the first batch shows: noting takes time
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]

    def step(number: int, x: Tensor, y: Tensor) -> Figures:
        nonlocal plain
        with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
            if plain:
                returned = scores = joined(model(*parted(x, task.input_shapes)))
            else:
                returned, scores = output_of(model, x, task.input_shapes)
            plain = returned is scores and not isinstance(model, QModel)
            loss = task.loss(returned, y, scores)
            if distillation:
                loss = distillation.mixed(loss, x, scores, task)
        optimizer.step(loss, falling(number, steps))
        parallel.average(buffers)
        if shaping:
            shaping(number + 1, steps)

        def figures() -> dict[str, float]:
            model.eval()
            found = {"loss": finite(loss), **evaluate(model, task)}
            model.train()
            return found

        return figures

    with learning(model, task.stepper(model.parameters(), learning_rate, steps)) as optimizer:
        taught = distillation and (distillation.share, distillation.temperature)
        formats = [(tensor.name, tensor.format) for tensor in model.scheme.tensors] if isinstance(model, QModel) else []
        shaped: dict[str, Stateful] = {"shaping": shaping} if isinstance(shaping, Stateful) else {}
        history = train(
            step,
            task,
            parts={"model": model, "optimizer": optimizer, **shaped, **({"best": best} if best else {})},
            steps=steps,
            seed=seed,
            news=max(_EVALUATIONS) if best else _evaluations(task, steps),
            settings=(learning_rate, keep, autocast, taught, formats),
            listener=best or listener,
            checkpoint=checkpoint,
        )
    if best:
        best.restore()
    return history


def _evaluations(task: Task, steps: int) -> int:
    """How often to look at the validation split in a training: where it is large, at half as many samples as learn."""
    least, most = _EVALUATIONS
    return min(max(steps * task.batch_size // (2 * max(len(task.samples("val")), 1)), least), most)


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
    keep: Keep = "last",
    listener: Listener = ignore,
    checkpoint: Checkpoint | None = None,
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
        keep=keep,
        listener=listener,
        checkpoint=checkpoint,
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
