"""HAWQ: bit-widths by the curvature of the loss, without training.

Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision" (2019) by eigenvalues, and
"HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks" (2020) by traces; Yao et al., "HAWQ-V3: Dyadic
Neural Network Quantization" (2021) chooses by an integer program, as is done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search import parallel
from hmq_fpga.search.calibrate import max_thresholds_log2, scheme_of
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.widths import Costs, activation_formats, cheapest, weight_candidates
from hmq_fpga.search.quantizers import Grid, fake_quantize
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, History, Listener, Recorder, Task, batches, finished

Sensitivity = Literal["trace", "eigenvalue"]


@dataclass(frozen=True, kw_only=True)
class HawqOptions:
    """Options of `hawq`.

    The cost of a bit-width is the sensitivity of a weight tensor times its squared quantization error (V2, Eq. 2.11).

    Attributes:
        sensitivity: `trace`, the mean of the Hessian's diagonal, by Hutchinson's estimate (V2); or
            `eigenvalue`, the largest one of the tensor's own block of the Hessian, by power iteration (HAWQ),
            which bounds what an error does to the loss.
        least_probes: random probes before the estimate may end; each reads the next training batch.
        most_probes: after which it ends; also of the power iterations of a tensor.
        tolerance: it ends when no estimate changes by more than this share.
    """

    sensitivity: Sensitivity = "trace"
    least_probes: int = 50
    most_probes: int = 200
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.sensitivity not in get_args(Sensitivity):
            raise InvalidInput(f"sensitivity {self.sensitivity!r}: choose from {', '.join(get_args(Sensitivity))}")
        if not 1 <= self.least_probes <= self.most_probes:
            raise InvalidInput(
                f"hawq: {self.least_probes} to {self.most_probes} probes: give at least 1, and no more than most_probes"
            )
        if not self.tolerance >= 0:
            raise InvalidInput(f"hawq: tolerance {self.tolerance:g} is negative")


def hawq(
    model: QModel,
    task: Task,
    budget: Budget,  # noqa: ARG001
    target: Target,
    options: HawqOptions,
    *,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,  # noqa: ARG001
) -> tuple[QModel, Scheme, History]:
    """The bit-widths that disturb the loss least to second order, and thresholds of least squared error; no training.

    A negative sensitivity, as where training has not converged, counts as zero; `found_by` names such tensors.
    """
    generator, recorder = torch.Generator().manual_seed(seed), Recorder(listener)
    model.eval()
    names, weights = list(model.weights), list(model.weights.values())
    if options.sensitivity == "trace":
        each = (_loss(model, *batch, task) for batch in batches(task, options.most_probes, generator))
        traces = mean_of((probe(loss, weights, generator) for loss in each), options, recorder)
        found = [trace / weight.numel() for trace, weight in zip(traces.tolist(), weights, strict=True)]
    else:
        loss = _loss(model, *next(batches(task, 1, generator)), task)
        found = eigenvalues(loss, weights, options, generator, recorder)
    sensitivities = dict(zip(names, found, strict=True))
    found_by: dict[str, Any] = {"method": "hawq", "sensitivity": options.sensitivity, "sensitivities": sensitivities}
    if negative := [name for name, value in sensitivities.items() if value < 0]:
        found_by["negative"] = negative

    limits = max_thresholds_log2(model, task)
    candidates, activations = weight_candidates(model, target, limits), activation_formats(model, task, target, limits)
    costs: Costs = {
        name: {
            bits: max(sensitivities[name], 0.0) * _squared_error(weight, Grid.of(f)) for bits, f in of_weight.items()
        }
        for (name, of_weight), weight in zip(candidates.items(), weights, strict=True)
    }
    widths = cheapest(candidates, costs, target.bounds(model, activations))
    scheme = scheme_of(model, {**activations, **widths}, found_by)
    model.set_scheme(scheme)
    return model, scheme, recorder.history


def _loss(model: QModel, x: Tensor, y: Tensor, task: Task) -> Tensor:
    """Of the float model, 0-d."""
    returned, scores = finished(model, model(x, grids={}))
    return task.loss(returned, y, scores)


def _squared_error(x: Tensor, grid: Grid) -> float:
    return float((fake_quantize(x.detach(), grid) - x.detach()).square().sum())


def probe(loss: Tensor, tensors: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """`v' H v` with random signs `v`, whose mean is the trace of the Hessian `H` of `loss`, a 0-d tensor.

    All tensors are probed at once: what they add to each other's figure has mean zero.

    Returns:
        Of each tensor's own block of the Hessian, `(tensors,)`.
    """
    signs = [2 * torch.randint(2, t.shape, generator=generator).to(t) - 1 for t in tensors]
    products = _Hessian(loss, tensors).times(signs)
    return torch.stack([(sign * product).sum() for sign, product in zip(signs, products, strict=True)])


def mean_of(figures: Iterator[Tensor], options: HawqOptions, recorder: Recorder) -> Tensor:
    """The mean of random figures, each `(tensors,)`, over as many as the options ask for."""
    mean = torch.zeros(())
    for n, figure in enumerate(figures, 1):
        before, mean = mean, mean + (figure - mean) / n
        change = float(((mean - before).abs() / (mean.abs() + torch.finfo(mean.dtype).tiny)).max())
        recorder(n, options.most_probes, {"change": change})
        if n >= options.least_probes and change < options.tolerance:
            break
    return mean


def eigenvalues(
    loss: Tensor, tensors: Sequence[Tensor], options: HawqOptions, generator: torch.Generator, recorder: Recorder
) -> list[float]:
    """The eigenvalue of largest magnitude of each tensor's own block of the Hessian of `loss`."""
    hessian, found = _Hessian(loss, tensors), []
    for i, tensor in enumerate(tensors):
        vector = torch.randn(tensor.shape, generator=generator).to(tensor)
        value = 0.0
        for _ in range(options.most_probes):
            vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
            product = hessian.block_times(i, vector)
            before, value = value, float((vector * product).sum())
            vector = product
            if abs(value - before) <= options.tolerance * abs(value):
                break
        found.append(value)
        recorder(i + 1, len(tensors), {"eigenvalue": value})
    return found


class _Hessian:
    """Of a loss, 0-d, with respect to tensors, known by its products with vectors; of the mean over all processes."""

    def __init__(self, loss: Tensor, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._grads = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)

    def times(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        products = torch.autograd.grad(self._grads, self._tensors, vectors, retain_graph=True, materialize_grads=True)
        parallel.average(products)
        return products

    def block_times(self, i: int, vector: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            self._grads[i], self._tensors[i], vector, retain_graph=True, materialize_grads=True
        )
        parallel.average([product])
        return product
