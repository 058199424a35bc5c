"""Zero weights, which R_w does not see and hardware does not build: as many as asked, or as a bound on a cost needs.

The task loss alone prefers small thresholds that saturate many weights. At the same bit-widths, hence the same R_w,
larger thresholds round more weights to zero, and pruning while fine-tuning takes out those that matter least: fully
unrolled logic shrinks at little loss. This is an option, no part of HMQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import Scheme, Widths
from hmq_fpga.ir.scheme import Tensor as SchemeTensor
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import fake_quantize, grid_of

WIDER = 3  # thresholds up to 2^3 times the one that was found
EVENTS = 100  # at which weights are pruned, over the whole training
PRUNED_BY = 0.6  # of the training: from here on the goal is reached
MEASUREMENTS = 8  # of a goal whose size is estimated in between


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
    """What is to shrink.

    Attributes:
        most: what is wanted of it.
    """

    most: float

    def size(self, model: QModel) -> float:
        """Of a model as it is, in any unit; may be an estimate."""

    def measured(self, model: QModel) -> float:
        """The same, exactly."""


class Nonzeros:
    """The share of weight codes that are not zero.

    Args:
        zeros: share that is to be zero.
    """

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
        most: what is wanted of it.
        measure: the figure that counts.
        estimate: a faster one.
    """

    def __init__(self, most: float, measure: Callable[[QNet], float], estimate: Callable[[QNet], float]) -> None:
        self.most = most
        self._measure, self._estimate, self._correction = measure, estimate, 1.0

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
    """Gradual magnitude pruning (Zhu, Gupta, "To prune, or not to prune", 2017): less and less of what is left.

    A weight's magnitude is in units of its format's step, over all layers together. What has been pruned stays zero.
    Called before each optimizer step and after the last, which keeps the goal by its exact measure.

    Args:
        model: with a scheme; its weights are pruned in place.
        goal: what is to shrink.
    """

    def __init__(self, model: QModel, goal: Goal) -> None:
        self._model, self._goal = model, goal
        self._kept = {name: torch.ones_like(weight) for name, weight in model.weights.items()}
        self._first = goal.measured(model)

    def __call__(self, step: int, steps: int) -> None:
        """Prune before `step` of `steps`."""
        weights = self._model.weights
        with torch.no_grad():
            for name, kept in self._kept.items():
                weights[name].mul_(kept)
        if step == steps:
            self._finish()
        elif step and step % max(steps // EVENTS, 1) == 0:
            if step // max(steps // EVENTS, 1) % (EVENTS // MEASUREMENTS) == 0:
                self._goal.measured(self._model)
            left = max(1 - step / (PRUNED_BY * steps), 0.0)
            self._shrink(self._goal.most + max(self._first - self._goal.most, 0) * left**3)

    def _shrink(self, wanted: float) -> None:
        """Prune the share of nonzero weights by which the goal is exceeded."""
        if (size := self._goal.size(self._model)) > wanted:
            magnitudes = self._magnitudes()
            self._prune(max(round(len(magnitudes) * (1 - wanted / size)), 1), magnitudes)

    def _finish(self) -> None:
        """Prune until the exact measure keeps the goal."""
        while (size := self._goal.measured(self._model)) > self._goal.most:
            magnitudes = self._magnitudes()
            if not len(magnitudes):
                return
            self._prune(max(round(len(magnitudes) * (1 - self._goal.most / size)), 1), magnitudes)

    def _magnitudes(self) -> Tensor:
        """Of all weights with nonzero codes, ascending."""
        found = [self._in_steps(name, weight).flatten() for name, weight in self._model.weights.items()]
        magnitudes = torch.cat(found)
        return magnitudes[magnitudes > 0].sort().values

    def _in_steps(self, name: str, weight: Tensor) -> Tensor:
        """Magnitudes in units of the step, of widths of elements their mean's; zero where the code is zero."""
        tensor, weight = self._model.scheme[name], weight.detach()
        codes = fake_quantize(weight, grid_of(tensor.format, tensor.widths, weight))
        step = tensor.format.step * math.pow(2, tensor.format.width - tensor.mean_width)
        return weight.abs() / step * (codes != 0)

    @torch.no_grad()
    def _prune(self, count: int, magnitudes: Tensor) -> None:
        least = magnitudes[min(count, len(magnitudes)) - 1]
        for name, weight in self._model.weights.items():
            self._kept[name][self._in_steps(name, weight) <= least] = 0  # and those that are zero anyway
            weight.mul_(self._kept[name])
