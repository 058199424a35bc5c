"""Thresholds of least squared error that follow the weights while these learn.

One of the power-of-two quantizers compared by Park, You, Nagel, Chang, "A Closer Look at Hardware-Friendly Weight
Quantization" (2022), with remedies for what they find wrong with it: outliers drag the threshold along, and it jumps
between two powers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search import parallel
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.training import train_through
from hmq_fpga.search.methods.widths import Widths, initial_formats
from hmq_fpga.search.quantizers import THRESHOLDS, Grid, fake_quantize, least_threshold_log2
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, History, Listener, Task, finished

OUTLIERS = 1e-3  # share of the weights that `robust="outliers"` leaves out
_NEW = 0.1  # share of the newest squared gradients in their running mean

Robust = Literal["none", "outliers", "gradient"]


@dataclass(frozen=True, kw_only=True)
class MsqeOptions:
    """Options of `msqe`.

    Attributes:
        widths: `mixed`, by the knapsack with measured costs; or `uniform`, one for all weights, as in the paper.
        robust: which weights' errors count: `none`, all alike; `outliers`, all but the largest 0.1 %; `gradient`, by
            the squared gradient of the loss, a running mean.
        every: steps between two looks at the thresholds.
        margin: share by which another power of two must lessen the error to be taken,
        patience: at so many looks in a row.
        freeze: share of the steps, at the end, in which thresholds stay.
    """

    widths: Widths = "mixed"
    robust: Robust = "none"
    every: int = 5
    margin: float = 0.02
    patience: int = 2
    freeze: float = 0.25

    def __post_init__(self) -> None:
        for name, value, choices in (("widths", self.widths, Widths), ("robust", self.robust, Robust)):
            if value not in get_args(choices):
                raise InvalidInput(f"{name} {value!r}: choose from {', '.join(get_args(choices))}")
        if not (self.every >= 1 and self.patience >= 1 and 0 <= self.margin < 1 and 0 <= self.freeze <= 1):
            raise InvalidInput("msqe: every and patience must be at least 1, margin and freeze within 0 … 1")


def msqe(
    model: QModel,
    task: Task,
    budget: Budget,
    target: Target,
    options: MsqeOptions,
    *,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,
) -> tuple[QModel, Scheme, History]:
    """Choose bit-widths, then train weights through quantizers whose thresholds follow them; activations' stay.

    Raises:
        InvalidInput: where all weights are to have one bit-width, and the target has some of single tensors.
    """
    formats = initial_formats(model, task, target, options.widths)
    followers = {name: Follower(formats[name], options) for name in model.weights}
    fixed = {name: Grid.of(f) for name, f in formats.items() if name not in followers}
    moving = budget.search_steps * (1 - options.freeze)

    def grids(step: int, x: Tensor, y: Tensor) -> dict[str, Grid]:
        if step % options.every == 0 and step < moving:
            weights = model.weights
            if options.robust == "gradient":
                _feel(model, task, x, y, followers, fixed)
            for name, follower in followers.items():
                follower.look(weights[name].detach())
        return fixed | {name: Grid.of(follower.format) for name, follower in followers.items()}

    history = train_through(
        model,
        task,
        budget,
        grids,
        parts={f"format of {name}": follower for name, follower in followers.items()},
        settings=("msqe", options, target),
        seed=seed,
        listener=listener,
        checkpoint=checkpoint,
    )
    found = {**formats, **{name: follower.format for name, follower in followers.items()}}
    scheme = scheme_of(model, found, {"method": "msqe", "widths": options.widths, "robust": options.robust})
    model.set_scheme(scheme)
    return model, scheme, history


class Follower:
    """The format of a weight, whose threshold follows it reluctantly.

    Attributes:
        format: the present one.
    """

    def __init__(self, format_: Fixed, options: MsqeOptions) -> None:
        self.format, self._options = format_, options
        self._better_for = 0
        self._squared_gradient: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Its threshold, and what it has seen."""
        return {
            "threshold_log2": self.format.threshold_log2,
            "better_for": self._better_for,
            "squared_gradient": self._squared_gradient,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""
        self.format = self.format.with_threshold(state["threshold_log2"])
        self._better_for = state["better_for"]
        self._squared_gradient = state["squared_gradient"]

    def feel(self, gradient: Tensor) -> None:
        """Take a gradient of the loss into the running mean of its square."""
        old, new = self._squared_gradient, gradient.square()
        self._squared_gradient = new if old is None else old.to(new.device).lerp(new, _NEW)

    def look(self, weight: Tensor) -> None:
        """Change to the threshold of least error, once it has been better for long enough."""
        errors = squared_errors(weight, self.format, self._importance(weight))
        best = min(errors, key=errors.__getitem__)
        is_better = errors[best] < (1 - self._options.margin) * errors[self.format.threshold_log2]
        self._better_for = self._better_for + 1 if is_better else 0
        if self._better_for >= self._options.patience:
            self.format, self._better_for = self.format.with_threshold(best), 0

    def _importance(self, weight: Tensor) -> Tensor | None:
        if self._options.robust == "outliers":
            return without_outliers(weight)
        return None if self._squared_gradient is None else self._squared_gradient.to(weight.device)


def without_outliers(weight: Tensor) -> Tensor:
    """One for each weight, but zero for the largest 0.1 % of them."""
    importance = torch.ones_like(weight)
    largest = weight.abs().flatten().topk(int(OUTLIERS * weight.numel())).indices
    importance.view(-1)[largest] = 0
    return importance


def squared_errors(weight: Tensor, format_: Fixed, importance: Tensor | None = None) -> dict[int, float]:
    """Squared error of quantizing a weight to formats like this one, by the logarithm of their threshold.

    The thresholds are the present one, and powers of two from twice the least that clips nothing of importance down.

    Args:
        weight: of any shape.
        format_: gives sign and bit-width.
        importance: factors of the single errors, of the same shape.
    """
    if importance is None or not importance.any():
        importance = torch.ones_like(weight)
    top = least_threshold_log2(float((weight * (importance > 0)).abs().max())) + 1

    def error(threshold_log2: int) -> float:
        quantized = fake_quantize(weight, Grid.of(format_.with_threshold(threshold_log2)))
        return float(((quantized - weight).square() * importance).sum())

    thresholds: Iterable[int] = {*range(top, top - THRESHOLDS - 2, -1), format_.threshold_log2}
    return {m: error(m) for m in sorted(thresholds, reverse=True)}


def _feel(
    model: QModel, task: Task, x: Tensor, y: Tensor, followers: Mapping[str, Follower], fixed: Mapping[str, Grid]
) -> None:
    """Let followers know the gradient at the float weights, which clipping does not hide."""
    weights = model.weights
    returned, scores = finished(model, model(x, fixed))
    gradients = torch.autograd.grad(task.loss(returned, y, scores), list(weights.values()))
    parallel.average(gradients)
    for name, gradient in zip(weights, gradients, strict=True):
        followers[name].feel(gradient)
