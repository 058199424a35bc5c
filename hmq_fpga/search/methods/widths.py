"""Bit-widths of weights by what they cost, and the formats that they lead to: what several methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.calibrate import least_error_format, least_error_formats, max_thresholds_log2
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import Grid
from hmq_fpga.search.samples import InMemory
from hmq_fpga.search.target import Bound, Target, cheapest_bits
from hmq_fpga.search.train import Task, at_once, finished

SAMPLES = 4096  # of the training set, for measuring what bit-widths cost
_LARGEST_COST = 1e3  # the solver of the knapsack takes 1e-6 for nothing

Candidates = Mapping[str, Mapping[int, Fixed]]
Costs = Mapping[str, Mapping[int, float]]
Widths = Literal["mixed", "uniform"]


def weight_candidates(model: QModel, target: Target, limits: Mapping[str, int]) -> dict[str, dict[int, Fixed]]:
    """Formats of least squared error of each weight, by name and bit-width that it may get; `limits` has its M."""
    weights, choices = model.weights, target.choices(model)
    return {
        name: {
            bits: least_error_format(weights[name], signed=True, bits=bits, max_threshold_log2=limits[name])
            for bits in choices[name]
        }
        for name in weights
    }


def activation_formats(model: QModel, task: Task, target: Target, limits: Mapping[str, int]) -> dict[str, Fixed]:
    """Formats of least squared error of the input and activations, their bit-widths by Eq. 11, M in `limits`."""
    return least_error_formats(model, task, target.activation_bits(model), limits)


@torch.no_grad()
def rises(model: QModel, task: Task, formats: Mapping[str, Fixed], candidates: Candidates) -> Costs:
    """How much the loss on training samples rises when one tensor alone changes from `formats` to a candidate."""
    samples = InMemory(*task.samples("train").head(SAMPLES))
    grids = {name: Grid.of(f) for name, f in formats.items()}
    order = [node.name for node in model.nodes]
    before = {name: order[:place] for place, name in enumerate(order)}
    before |= {site: before[first] for first, site in reversed(model.weight_sites.items())}

    def loss(output: Tensor, targets: Tensor) -> float:
        returned, scores = finished(model, output)
        return float(task.loss(returned, targets, scores)) * len(targets)

    found = {name: dict.fromkeys(formats_of, 0.0) for name, formats_of in candidates.items()}
    for batch, targets in samples.in_order(at_once(samples.x)):
        made: dict[str, Tensor] = {}
        unchanged = loss(model(batch, grids, follow=made.__setitem__), targets)
        for name, formats_of in candidates.items():
            known = {tensor: made[tensor] for tensor in before.get(name, ())}
            for bits, f in formats_of.items():
                output = model(batch, {**grids, name: Grid.of(f)}, known=known)
                found[name][bits] += (loss(output, targets) - unchanged) / len(samples)
    return found


def cheapest(candidates: Candidates, costs: Costs, bounds: Sequence[Bound]) -> dict[str, Fixed]:
    """The candidates of least total cost within the bounds, by name of the tensor; see `cheapest_bits`."""
    largest = max(abs(cost) for of_weight in costs.values() for cost in of_weight.values())
    unit = largest / _LARGEST_COST or 1.0
    scaled = {name: {bits: cost / unit for bits, cost in of_weight.items()} for name, of_weight in costs.items()}
    return {name: candidates[name][bits] for name, bits in cheapest_bits(scaled, bounds).items()}


def initial_formats(model: QModel, task: Task, target: Target, widths: Widths) -> dict[str, Fixed]:
    """Formats of all sites of the float model, for training to start from.

    Args:
        model: the instrumented network.
        task: training data.
        target: what bit-widths may cost.
        widths: of weights: one for all, or those of least total rise of the loss, measured one weight at a time while
            the others are as wide as they may be.

    Raises:
        InvalidInput: where all are to have one bit-width, and the target has some of single tensors.
    """
    limits = max_thresholds_log2(model, task)
    candidates, activations = weight_candidates(model, target, limits), activation_formats(model, task, target, limits)
    if widths == "uniform":
        bits = target.uniform_bits(model)
        return {**activations, **{name: formats[bits] for name, formats in candidates.items()}}
    widest = {name: formats[max(formats)] for name, formats in candidates.items()}
    costs = rises(model, task, {**activations, **widest}, candidates)
    return {**activations, **cheapest(candidates, costs, target.bounds(model, activations))}
