"""ZeroQ: bit-widths and ranges without any data, by inputs made to look right to the network's BatchNorms.

Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework" (2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.calibrate import max_thresholds_log2, scheme_of
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel, Statistics
from hmq_fpga.search.methods.widths import Costs, activation_formats, cheapest, weight_candidates
from hmq_fpga.search.quantizers import Grid
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Figures, History, Listener, Task, finished, ignore, repeat

Distance = Literal["kl", "squared"]


@dataclass(frozen=True, kw_only=True)
class ZeroqOptions:
    """Options of `zeroq`, by default those of the authors' code.

    Attributes:
        samples: how many inputs are made.
        steps: of Adam, which makes them: it minimizes the sum of `|mean - stored mean|² + |deviation - stored
            deviation|²` over what BatchNorms read.
        learning_rate: of Adam at the start; it falls to zero along a cosine.
        normalized: whether inputs have mean 0 and deviation 1, which is then asked of them, too.
        distance: what a bit-width of a layer costs: how far the outputs come to be from the float model's when it
            alone is quantized, `KL(float, quantized)` of the classes' probabilities; or `squared`, for a regression.
    """

    samples: int = 32
    steps: int = 500
    learning_rate: float = 0.5
    normalized: bool = False
    distance: Distance = "kl"

    def __post_init__(self) -> None:
        if self.samples < 2 or self.steps < 0 or not self.learning_rate > 0:
            raise InvalidInput("zeroq: give at least 2 samples, 0 steps or more and a positive learning_rate")
        if self.distance not in get_args(Distance):
            raise InvalidInput(f"distance {self.distance!r}: choose from {', '.join(get_args(Distance))}")


def zeroq(
    model: QModel,
    task: Task,
    budget: Budget,  # noqa: ARG001
    target: Target,
    options: ZeroqOptions,
    *,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,
) -> tuple[QModel, Scheme, History]:
    """The bit-widths that change the outputs for made inputs least, and thresholds of least squared error on them.

    None of the task's data are read.

    Raises:
        InvalidInput: for a network without BatchNorm.
    """
    if not model.statistics:
        raise InvalidInput(
            "method 'zeroq' makes data from the statistics of BatchNorms, and the model has none: use hawq or another"
        )
    model.eval()
    x, history = distil(model, options, seed=seed, listener=listener, checkpoint=checkpoint)
    made = Task(x_train=x, y_train=x, x_val=x, y_val=x, batch_size=len(x), input_shapes=task.input_shapes)
    limits = max_thresholds_log2(model, made)
    candidates, activations = weight_candidates(model, target, limits), activation_formats(model, made, target, limits)
    costs: Costs = {
        name: {bits: distance(model, x, {name: Grid.of(f)}, options.distance) for bits, f in formats.items()}
        for name, formats in candidates.items()
    }
    widths = cheapest(candidates, costs, target.bounds(model, activations))
    scheme = scheme_of(model, {**activations, **widths}, {"method": "zeroq", "distance": options.distance})
    model.set_scheme(scheme)
    return model, scheme, history


def distil(
    model: QModel,
    options: ZeroqOptions,
    *,
    seed: int,
    listener: Listener = ignore,
    checkpoint: Checkpoint | None = None,
) -> tuple[Tensor, History]:
    """Inputs `(samples, *input_shape)` for which tensors have the statistics that BatchNorms stored of them.

    They begin as Gaussian noise; of inputs that cannot be negative the absolute value is taken.
    """
    random = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    noise = torch.randn(options.samples, *model.input_shape, generator=random)
    made = nn.ParameterList([noise.to(like)])
    signed = any(site.signed for site in model.sites if site.kind == "input")

    def inputs() -> Tensor:
        found: Tensor = made[0]
        return found if signed else found.abs()

    optimizer = torch.optim.Adam(made, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(options.steps, 1))

    def step(_number: int) -> Figures:
        error = mismatch(model, inputs(), normalized=options.normalized)
        (made[0].grad,) = torch.autograd.grad(error, [made[0]])
        optimizer.step()
        schedule.step()
        return lambda: {"statistics_error": float(error.detach())}

    history = repeat(
        step,
        lambda done: [()] * (options.steps - done),
        parts={"model": model, "inputs": made, "optimizer": optimizer, "schedule": schedule},
        steps=options.steps,
        news=50,
        settings=("zeroq", options),
        listener=listener,
        checkpoint=checkpoint,
    )
    return inputs().detach(), history


def mismatch(model: QModel, x: Tensor, *, normalized: bool = False) -> Tensor:
    """Squared differences of means and deviations from those that BatchNorms stored, summed, 0-d."""
    known = dict(model.statistics)
    terms = []

    def follow(name: str, tensor: Tensor) -> None:
        if name in known:
            terms.extend(_differences(known[name].of(tensor), known[name]))
        if normalized and name in model.inputs:
            terms.extend([tensor.mean().square(), (tensor.std(correction=0) - 1).square()])

    model(x, grids={}, follow=follow)
    return torch.stack(terms).sum()


def _differences(found: Statistics, stored: Statistics) -> list[Tensor]:
    pairs = (found.mean, stored.mean), (found.deviation, stored.deviation)
    return [(a - b.to(a)).square().sum() for a, b in pairs]


@torch.no_grad()
def distance(model: QModel, x: Tensor, grids: Mapping[str, Grid], kind: Distance) -> float:
    """Of the outputs for `x` with some sites quantized from those of the float model, mean over the samples."""
    wanted, found = (finished(model, model(x, on)) for on in ({}, grids))
    if kind == "squared":
        return float((wanted.returned - found.returned).square().sum() / len(x))
    before, after = (_log_probabilities(scores) for scores in (wanted.scores, found.scores))
    return float(F.kl_div(after, before, reduction="sum", log_target=True) / len(x))


def _log_probabilities(scores: Tensor) -> Tensor:
    """Of the classes, `(batch, classes, …)`; a single score tells two apart by its sign."""
    scores = scores.reshape(len(scores), scores.shape[1] if scores.ndim > 1 else 1, -1).double()
    if scores.shape[1] == 1:
        scores = torch.cat((torch.zeros_like(scores), scores), 1)
    return scores.log_softmax(1)
