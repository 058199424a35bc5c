"""Zero weights, which R_w does not see and hardware does not build: as many as asked, or as a bound on a cost needs.

The task loss alone prefers small thresholds that saturate many weights. At the same bit-widths, hence the same R_w,
larger thresholds round more weights to zero, and pruning while fine-tuning takes out those that matter least: fully
unrolled logic shrinks at little loss. This is an option, no part of HMQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import Scheme, Widths
from hmq_fpga.ir.scheme import Tensor as SchemeTensor
from hmq_fpga.search.checkpoint import Stateful
from hmq_fpga.search.deviations import input_deviations
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.polish import polish, within_reach
from hmq_fpga.search.quantizers import fake_quantize, grid_of
from hmq_fpga.search.train import Task

WIDER = 3  # thresholds up to 2^3 times the one that was found
EVENTS = 100  # at which weights are pruned, over the whole training
PRUNED_BY = 0.6  # of the training: from here on the goal is reached
MEASUREMENTS = 8  # of a goal whose size is estimated in between, and of what weights multiply
PARTS = 4  # of what is too much at the end, by the exact measure, that are pruned one after another
ROOM = 1.1  # by which a cost of the integer network may exceed the goal, until weights are polished
SAMPLES = 2048  # that show what weights multiply
POLISHING = 8  # times the samples of training that polishing may compute


def share_of_zeros(weight: Tensor, format_: Fixed, widths: Widths | None = None) -> float:
    """Share of a weight's codes that are zero, in a format, or where elements have widths of their own in theirs."""
    return float((fake_quantize(weight.detach(), grid_of(format_, widths, weight)) == 0).double().mean())


def widen_thresholds(model: QModel, scheme: Scheme, zeros: float) -> Scheme:
    """The scheme with each weight's threshold enlarged until its share of zeros is nearest to `zeros`."""
    weights = model.weights

    def widened(tensor: SchemeTensor) -> SchemeTensor:
        found, weight = tensor.format, weights[tensor.name]
        wider = [found.with_threshold(found.threshold_log2 + k) for k in range(WIDER + 1)]
        nearest = min(wider, key=lambda f: abs(share_of_zeros(weight, f, tensor.widths) - zeros))
        return replace(tensor, format=nearest)

    tensors = (widened(tensor) if tensor.kind == "weight" else tensor for tensor in scheme.tensors)
    return Scheme(tuple(tensors), {**scheme.found_by, "zeros": zeros})


class Goal(Protocol):
    """What is to shrink; one that learns from its measurements is `Stateful`, too.

    Attributes:
        name: what it counts, for messages.
        most: what is wanted of it.
        room: by which training may exceed that, since single weights are polished afterwards; 1: they are not.
    """

    name: str
    most: float
    room: float

    def size(self, model: QModel) -> float:
        """Of a model as it is, in any unit; may be an estimate."""

    def measured(self, model: QModel) -> float:
        """The same, exactly."""


class Nonzeros:
    """The share of weight codes that are not zero.

    Args:
        zeros: share that is to be zero.
    """

    name = "as a share of weights that are not zero"
    room = 1.0

    def __init__(self, zeros: float) -> None:
        self.most = 1 - zeros

    def size(self, model: QModel) -> float:
        """Counted."""
        weights, tensors = model.weights, model.scheme.of_kind("weight")
        zeros = sum(share_of_zeros(weights[t.name], t.format, t.widths) * t.size for t in tensors)
        return 1 - zeros / sum(t.size for t in tensors)

    measured = size


class NetworkCost:
    """A cost of the integer network: between two measurements by an estimate, corrected by the last one.

    Args:
        name: what it counts.
        most: what is wanted of it.
        measure: the figure that counts.
        estimate: a faster one.
    """

    room = ROOM

    def __init__(
        self, name: str, most: float, measure: Callable[[QNet], float], estimate: Callable[[QNet], float]
    ) -> None:
        self.name, self.most = name, most
        self._measure, self._estimate, self._correction = measure, estimate, 1.0

    def state_dict(self) -> dict[str, float]:
        """The correction."""
        return {"correction": self._correction}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with another's."""
        self._correction = state["correction"]

    def size(self, model: QModel) -> float:
        """By the estimate."""
        return self._estimate(freeze(model)) * self._correction

    def measured(self, model: QModel) -> float:
        """By the figure that counts."""
        net = freeze(model)
        size = self._measure(net)
        self._correction = size / max(self._estimate(net), 1)
        return size


class Pruning:
    """Gradual pruning (Zhu, Gupta, "To prune, or not to prune", 2017) of what matters least: less and less of the rest.

    A weight matters by its magnitude in units of its format's step, over all layers together, times the deviation of
    the values that it multiplies, as a ratio to its layer's (after Sun, Liu, Bair, Kolter, "A Simple and Effective
    Pruning Approach for Large Language Models", 2024, Eq. 1, who take norms): a pixel at the border that is always dark
    needs no weight, however large. What has been pruned stays zero. Called before each optimizer step and after the
    last, which keeps the goal by its exact measure: single weights are polished, and where that is not enough, more of
    them are pruned.

    Args:
        model: with a scheme; its weights are pruned in place.
        goal: what is to shrink.
        task: whose training samples show what weights multiply.
    """

    def __init__(self, model: QModel, goal: Goal, task: Task) -> None:
        self._model, self._goal, self._task = model, goal, task
        self._samples = task.samples("train").head(SAMPLES)[0]
        self._deviations = input_deviations(model, self._samples)
        self._kept = {name: torch.ones_like(weight) for name, weight in model.weights.items()}
        self._smallest = math.inf  # of the sizes measured at which outputs depended on inputs
        self._first = self._measured()

    def state_dict(self) -> dict[str, Any]:
        """What has been pruned, and what the goal has measured."""
        goal = self._goal.state_dict() if isinstance(self._goal, Stateful) else {}
        return {"kept": self._kept, "deviations": self._deviations, "goal": goal, "smallest": self._smallest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""
        if isinstance(self._goal, Stateful):
            self._goal.load_state_dict(state["goal"])
        self._deviations, self._smallest = state["deviations"], state["smallest"]
        for name, kept in self._kept.items():
            kept.copy_(state["kept"][name])

    def __call__(self, step: int, steps: int) -> None:
        """Prune before `step` of `steps`.

        Raises:
            InvalidInput: after the last, when nothing of the inputs reaches the outputs of what is left.
        """
        weights = self._model.weights
        with torch.no_grad():
            for name, kept in self._kept.items():
                weights[name].mul_(kept)
        if step == steps:
            self._finish(self._polishing(steps))
        elif step and step % max(steps // EVENTS, 1) == 0:
            if step // max(steps // EVENTS, 1) % (EVENTS // MEASUREMENTS) == 0:
                self._measured()
                self._deviations = input_deviations(self._model, self._samples)
            left, reached = max(1 - step / (PRUNED_BY * steps), 0.0), self._room(steps) * self._goal.most
            self._shrink(reached + max(self._first - reached, 0) * left**3)

    def _shrink(self, wanted: float) -> None:
        """Prune the share of nonzero weights by which the goal is exceeded."""
        if (size := self._goal.size(self._model)) > wanted:
            worth = self._worth()
            self._prune(max(round(len(worth) * (1 - wanted / size)), 1), worth)

    def _polishing(self, steps: int) -> float:
        """Samples that polishing may compute."""
        return POLISHING * steps * self._task.batch_size

    def _room(self, steps: int) -> float:
        """By which training may exceed the goal: no more than polishing takes out with half its samples."""
        if self._goal.room == 1:
            return 1.0
        share = within_reach(self._task, self._polishing(steps) / 2) / max(len(self._worth()), 1)
        return min(self._goal.room, 1 + share)

    def _finish(self, samples: float) -> None:
        """Polish and prune until the exact measure keeps the goal, bit by bit: a few weights may be enough."""
        goal, size = self._goal, self._measured()

        def reached() -> bool:
            """Whether the goal is kept: measured once half of what was too much is gone by the estimate."""
            nonlocal size
            if goal.size(self._model) - goal.most <= (size - goal.most) / 2:
                size = self._measured()
            return size <= goal.most

        if goal.room > 1 and size > goal.most:
            deviations = input_deviations(self._model, self._samples)
            polish(self._model, self._task, deviations, enough=reached, samples=samples)
            size = self._measured()
        while size > goal.most and len(worth := self._worth()):
            self._prune(max(round(len(worth) * (1 - goal.most / size) / PARTS), 1), worth)
            size = self._measured()
        if not self._tells():
            raise InvalidInput(
                f"{self._goal.most:,.6g} {self._goal.name} are out of reach: pruned that far, no output depends on an "
                f"input; the smallest network on the way whose outputs did has {self._smallest:,.6g}: "
                "allow that many, or give a smaller model"
            )

    def _measured(self) -> float:
        """The goal's exact size."""
        size = self._goal.measured(self._model)
        if self._tells():
            self._smallest = min(self._smallest, size)
        return size

    @torch.no_grad()
    def _tells(self) -> bool:
        """Whether outputs differ between samples."""
        outputs = self._model(self._samples)
        return bool((outputs != outputs[:1]).any())

    def _worth(self) -> Tensor:
        """Of all weights with nonzero codes, ascending."""
        worth = torch.cat([self._worth_of(name, weight).flatten() for name, weight in self._model.weights.items()])
        return worth[worth > 0].sort().values

    def _worth_of(self, name: str, weight: Tensor) -> Tensor:
        """How much weights matter, in units of the step, of widths of elements their mean's; zero where codes are."""
        tensor, weight = self._model.scheme[name], weight.detach()
        codes = fake_quantize(weight, grid_of(tensor.format, tensor.widths, weight))
        step = tensor.format.step * math.pow(2, tensor.format.width - tensor.mean_width)
        return weight.abs() / step * self._deviations[name] * (codes != 0)

    @torch.no_grad()
    def _prune(self, count: int, worth: Tensor) -> None:
        least = worth[min(count, len(worth)) - 1]
        for name, weight in self._model.weights.items():
            self._kept[name][self._worth_of(name, weight) <= least] = 0  # and those that are zero anyway
            weight.mul_(self._kept[name])
