"""HGQ: a width for each weight, learnt together with the weights.

High Granularity Quantization of Sun, Årrestad, Loncar, Ngadiuba, Spiropulu, "Gradient-based Automatic Mixed Precision
Quantization for Neural Networks On-Chip" (2024). There bits have a price on a schedule; here the price follows from
the bounds that have to be kept, and what a bound is missed by in the end is repaired exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme, Widths
from hmq_fpga.ir.scheme import Tensor as SchemeTensor
from hmq_fpga.search import parallel
from hmq_fpga.search.calibrate import SAMPLES as CALIBRATED
from hmq_fpga.search.calibrate import LeastError, max_thresholds_log2
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.training import NEWS
from hmq_fpga.search.methods.widths import SAMPLES
from hmq_fpga.search.quantizers import Grid, round_to_fractions
from hmq_fpga.search.samples import InMemory
from hmq_fpga.search.target import Bound, Target, activation_sites
from hmq_fpga.search.train import Budget, Figures, History, Listener, Task, finished, finite, learning, train

FALLING = 0.6  # of the steps, until the bits have to be those of the bounds
FALL_OF_A_WIDTH = 1 / 3  # of the steps, in which a width can go from the largest to zero
CALIBRATIONS = 10  # of the activations' thresholds, over the whole search
FIRST_PRICE = 1e-2  # of all bits that the bounds allow, in units of the task's loss
PRICE_GAIN = 200.0  # by which logarithm the price would grow over the whole search, were twice the bits spent
PRICE_DAMPING = 10.0  # by which logarithm it is larger while they are
PRICE_RANGE = 20.0  # of the logarithm, up and down
BETAS = (0.9, 0.99)  # of Adam, which moves the widths: a short memory, since the price changes
UNSEEN = 1e-3  # of the mean curvature, and of the error that is expected: part of a measured cost
SLACK = 1e-9

Granularity = Literal["weight", "channel", "tensor"]
Formats = Mapping[str, Fixed]
_Values = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class HgqOptions:
    """Options of `hgq`.

    Attributes:
        granularity: what has one width while widths are learnt: each weight, the weights of an output channel, or a
            tensor. In the end a weight whose code is zero has no bits, and the repair is of single weights.
        width_learning_rate: of the widths, in bits; by default such that one can go from the largest to zero in a third
            of the steps.
    """

    granularity: Granularity = "weight"
    width_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise InvalidInput(f"granularity {self.granularity!r}: choose from {', '.join(get_args(Granularity))}")
        if self.width_learning_rate is not None and not self.width_learning_rate > 0:
            raise InvalidInput(f"width_learning_rate = {self.width_learning_rate:g} is not positive")


def hgq(
    model: QModel,
    task: Task,
    budget: Budget,
    target: Target,
    options: HgqOptions,
    *,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,
) -> tuple[QModel, Scheme, History]:
    """Train weights and their widths together, at a price of bits that drives their cost to the bounds.

    A weight may have any width from zero to the largest that the target gives its tensor. Thresholds of weights are the
    least that cover them, but for outliers. Activations have the widths that R_a allows (Eq. 11 of the HMQ paper), and
    thresholds of least squared error.
    """
    steps, activation_bits = budget.search_steps, target.activation_bits(model)
    limits = max_thresholds_log2(model, task)
    widths = LearntWidths(model, target, limits, options.granularity)
    rate = options.width_learning_rate or widths.largest / (FALL_OF_A_WIDTH * steps)
    of_widths = torch.optim.Adam([widths.fractions], rate, betas=BETAS)
    activations = _Activations(model, task, activation_bits, limits, widths)
    bounds = target.bounds(model, activations.formats)
    prices = torch.from_numpy(widths.prices(bounds)).to(widths.fractions)
    price = _Price(steps=steps, first=float((prices @ widths()[1].detach()).max()))

    def step(number: int, x: Tensor, y: Tensor) -> Figures:
        if number and number % max(steps // CALIBRATIONS, 1) == 0:
            activations.calibrate()
        weights, bits = widths()
        returned, scores = finished(model, functional_call(model, weights, (x, _grids(activations.formats))))
        task_loss, shares = task.loss(returned, y, scores), prices @ bits
        of_widths.zero_grad()
        optimizer.step(task_loss + price.value * shares.max())
        parallel.average([parameter.grad for parameter in of_widths.param_groups[0]["params"]])
        of_widths.step()
        widths.keep_within()
        price.follow(number, shares.max().item())
        return lambda: {
            "loss": finite(task_loss),
            **task.accuracies("batch", scores, y),
            "rate_expected": bounds[0].rate / max(shares[0].item(), SLACK),
            "rate_actual": bounds[0].rate / max((prices[0] @ bits.detach().round()).item(), SLACK),
            "rate_target": bounds[0].rate / price.allowed(number),
            "price": price.value,
        }

    with learning(model, task.stepper(model.parameters(), budget.learning_rate, steps)) as optimizer:
        history = train(
            step,
            task,
            parts={
                "model": model,
                "optimizer": optimizer,
                "widths": widths,
                "optimizer of widths": of_widths,
                "price": price,
                "activations": activations,
            },
            steps=steps,
            seed=seed,
            news=NEWS,
            settings=("hgq", options, target, budget.learning_rate),
            listener=listener,
            checkpoint=checkpoint,
        )
    activations.calibrate()
    scheme = _scheme(model, task, widths, activations.formats, target.bounds(model, activations.formats), options)
    model.set_scheme(scheme)
    return model, scheme, history


@dataclass
class _Price:
    """Of bits: it rises while more of them are spent than the schedule allows, and falls while fewer are.

    Attributes:
        steps: of the search.
        first: what is spent before it, as a multiple of what the bounds allow.
        value: of all bits that they allow.
    """

    steps: int
    first: float
    value: float = field(default=FIRST_PRICE, init=False)
    _missed: float = field(default=0.0, init=False)

    def allowed(self, step: int) -> float:
        """What may be spent at a step, as a multiple of what the bounds allow: it falls to one, geometrically."""
        return float(max(self.first, 1.0) ** max(1 - step / (FALLING * self.steps), 0))

    def state_dict(self) -> dict[str, float]:
        """The price, and what has been missed."""
        return {"value": self.value, "missed": self._missed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with another's."""
        self.value, self._missed = state["value"], state["missed"]

    def follow(self, step: int, spent: float) -> None:
        miss = spent / self.allowed(step) - 1
        self._missed += miss / self.steps
        growth = PRICE_GAIN * self._missed + PRICE_DAMPING * miss
        self.value = FIRST_PRICE * math.exp(min(max(growth, -PRICE_RANGE), PRICE_RANGE))


class LearntWidths:
    """The widths of all weights of a model, which stand in a row here: tensor by tensor, each flattened.

    Attributes:
        fractions: bits behind the point of each weight, channel or tensor, which are learnt. With the integer bits of
            the tensor they are the width.
        largest: of the widths that a weight may get.
    """

    def __init__(self, model: QModel, target: Target, limits: Mapping[str, int], granularity: Granularity) -> None:
        self._weights = model.weights
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._parameters = [names[weight] for weight in self._weights.values()]  # type: ignore[index]
        self._sizes = [weight.numel() for weight in self._weights.values()]
        groups = _groups(model, granularity)
        device = groups.device
        self._group_of = None if granularity == "weight" else groups
        self._tensor_of = torch.repeat_interleave(torch.tensor(self._sizes)).to(device)
        self._tensor_of_group = self._tensor_of.new_zeros(int(groups.max()) + 1).scatter_(0, groups, self._tensor_of)
        self._limits = torch.tensor([limits[name] for name in self._weights], device=device)
        self._most = torch.tensor([float(bits[-1]) for bits in target.choices(model).values()], device=device)
        self.largest = float(self._most.max())
        self.fractions = nn.Parameter((self._most - self._integers())[self._tensor_of_group])

    def state_dict(self) -> dict[str, Tensor]:
        """What is learnt."""
        return {"fractions": self.fractions.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with another's."""
        self.fractions.copy_(state["fractions"])

    def __call__(self) -> tuple[dict[str, Tensor], Tensor]:
        """The quantized weights by parameter of the model, and in a row their widths before these are rounded.

        A weight that is rounded to zero has no bits.
        """
        integers = self._integers()[self._tensor_of]
        fractions = self.fractions if self._group_of is None else self.fractions.index_select(0, self._group_of)
        levels = round_to_fractions(self._row(), fractions, torch.exp2(integers - 1))
        widths = (fractions + integers) * (levels.detach() != 0)
        parts = zip(self._parameters, levels.split(self._sizes), self._weights.values(), strict=True)
        return {name: part.view_as(weight) for name, part, weight in parts}, widths

    @torch.no_grad()
    def keep_within(self) -> None:
        """Give no weight less than zero bits or more than its tensor may have."""
        fewest = -self._integers()
        lo, hi = (limits[self._tensor_of_group] for limits in (fewest, fewest + self._most))
        self.fractions.clamp_(lo, hi)

    def prices(self, bounds: Sequence[Bound]) -> _Values:
        """Of one bit of each weight, as a share of what each bound allows: `(bounds, weights)`."""
        rows = [[bound.prices[name] / bound.most for name in self._weights] for bound in bounds]
        return np.repeat(np.array(rows) / self._sizes, self._sizes, axis=1)

    @torch.no_grad()
    def costs(self, curvature: Tensor) -> _Values:
        """What each width costs each weight: `(weights, widths)`, from 0 bits up; infinite where it may not have it.

        Half the curvature of the loss, `(weights,)`, times the square of the rounding error; and a small part of what
        that would be on average, of a weight anywhere: it will move yet.
        """
        row, integers, most = self._row(), self._integers()[self._tensor_of], self._most[self._tensor_of]
        columns = []
        for width in range(int(self.largest) + 1):
            fractions = width - integers
            error = (round_to_fractions(row, fractions, torch.exp2(integers - 1)) - row).square()
            expected = torch.exp2(-2 * fractions) / 12
            columns.append(((error + UNSEEN * expected) * curvature / 2).masked_fill(width > most, math.inf))
        return torch.stack(columns, 1).double().cpu().numpy()

    def formats(self, widths: Widths) -> dict[str, tuple[Fixed, Widths]]:
        """By tensor, the format that encloses all its weights, of the given widths in a row, and their part of these.

        A format has two bits at least: one of a single bit would have no sign.
        """
        parts = np.split(widths, np.cumsum(self._sizes)[:-1])
        integers = [int(n) for n in self._integers().tolist()]
        enclosing = [max(int(part.max()), 2) for part in parts]
        return {
            name: (Fixed(signed=True, width=width, frac=width - n), part)
            for name, width, n, part in zip(self._weights, enclosing, integers, parts, strict=True)
        }

    def _row(self) -> Tensor:
        return torch.cat([weight.flatten() for weight in self._weights.values()])

    def _integers(self) -> Tensor:
        """Bits before the point of each tensor, its sign among them.

        The threshold is the least that covers all weights, within the limit that it had before the search.
        """
        largest = torch.stack([weight.detach().abs().max() for weight in self._weights.values()])
        mantissas, exponents = torch.frexp(largest)
        return torch.minimum(exponents - (mantissas == 0.5).int(), self._limits).to(largest.dtype) + 1


def _groups(model: QModel, granularity: Granularity) -> Tensor:
    """For each weight, in a row, the number of what it shares its width with."""
    layers = dict(zip((node.name for node in model.nodes), model.layers, strict=True))
    groups, start = [], 0
    for site, weight in model.weights.items():
        if granularity == "weight":
            own = torch.arange(weight.numel(), device=weight.device)
        elif granularity == "tensor":
            own = torch.zeros(weight.numel(), dtype=torch.long, device=weight.device)
        else:
            transposed = isinstance(layers[site.removesuffix(".weight")], (nn.ConvTranspose1d, nn.ConvTranspose2d))
            channels = weight.movedim(1, 0) if transposed else weight
            numbers = torch.arange(len(channels), device=weight.device).view(-1, *(1,) * (weight.ndim - 1))
            numbers = numbers.expand_as(channels)
            own = (numbers.movedim(0, 1) if transposed else numbers).flatten()
        groups.append(start + own)
        start = int(groups[-1].max()) + 1
    return torch.cat(groups)


def _grids(formats: Formats) -> dict[str, Grid]:
    return {name: Grid.of(format_) for name, format_ in formats.items()}


class _Activations:
    """Formats of the input and every activation, of the widths that R_a allows.

    Attributes:
        formats: of least error within limits, for the weights at the last calibration.
    """

    def __init__(
        self, model: QModel, task: Task, bits: Mapping[str, int], limits: Mapping[str, int], widths: LearntWidths
    ) -> None:
        self._model, self._task, self._widths = model, task, widths
        self._bits, self._limits = bits, limits
        self.calibrate()

    @torch.no_grad()
    def calibrate(self) -> None:
        """Choose thresholds anew, for the weights as they are."""
        found = {
            s.name: LeastError(signed=s.signed, bits=self._bits[s.name], max_threshold_log2=self._limits[s.name])
            for s in activation_sites(self._model)
        }
        settings = {"grids": {}, "observe": lambda name, x: found[name].add(x)}
        weights, _ = self._widths()
        for batch in self._task.samples("train").head(CALIBRATED)[0].split(self._task.batch_size):
            functional_call(self._model, weights, (batch,), settings)
        self.formats = {name: errors.format for name, errors in found.items()}

    def state_dict(self) -> dict[str, int]:
        """Logarithms of the thresholds."""
        return {name: f.threshold_log2 for name, f in self.formats.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with another's."""
        self.formats = {name: f.with_threshold(state[name]) for name, f in self.formats.items()}


def _curvature(model: QModel, task: Task, widths: LearntWidths, formats: Formats) -> Tensor:
    """Of the loss with respect to each weight, up to a factor: mean squares of gradients, those of training batches."""
    levels, bits = widths()
    weights = {name: weight.detach().requires_grad_() for name, weight in levels.items()}
    squares = torch.zeros_like(bits, requires_grad=False)
    for x, y in InMemory(*task.samples("train").head(SAMPLES)).in_order(task.batch_size):
        returned, scores = finished(model, functional_call(model, weights, (x, _grids(formats))))
        gradients = torch.autograd.grad(task.loss(returned, y, scores), list(weights.values()))
        squares += torch.cat([gradient.flatten() for gradient in gradients]).square()
    return squares / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny) + UNSEEN


def nearest_within(found: Widths, costs: _Values, prices: _Values) -> Widths:
    """Widths that keep all bounds and use one of them up, but for less than one weight's bits.

    Where the widths that were found keep them, all stay or grow, else all stay or shrink. At one rate of exchange
    between cost and bits each weight takes its best width, which is the least total cost of all that spend as much; the
    rate is the one at which the bounds are just kept.

    Args:
        found: `(weights,)`.
        costs: of each width, `(weights, widths)`.
        prices: of a bit of each weight as a share of each bound, `(bounds, weights)`.
    """
    bits, price = np.arange(costs.shape[1]), prices.sum(0)[:, None]
    fit = (prices @ found).max() <= 1 + SLACK
    costs = np.where(bits >= found[:, None] if fit else bits <= found[:, None], costs, math.inf)

    def best(log2_rate: float) -> Widths:
        chosen: Widths = np.argmin(costs + 2.0**log2_rate * price * bits, axis=1)
        return chosen

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if (prices @ best(middle)).max() <= 1 + SLACK:
            high = middle
        else:
            low = middle
    widths, wider = best(high), best(low)
    differing = np.flatnonzero(wider > widths)  # those for which the two rates make a difference, one by one
    spent = np.cumsum(prices[:, differing] * (wider - widths)[differing], axis=1) + (prices @ widths)[:, None]
    fitting = differing[(spent <= 1 + SLACK).all(0)]
    widths[fitting] = wider[fitting]
    return widths


def _scheme(
    model: QModel, task: Task, widths: LearntWidths, formats: Formats, bounds: Sequence[Bound], options: HgqOptions
) -> Scheme:
    """The scheme of what was learnt, repaired where that does not keep the bounds or leaves bits that they allow."""
    found = widths()[1].detach().round().long().cpu().numpy()
    costs = widths.costs(_curvature(model, task, widths, formats))
    kept = nearest_within(found, costs, widths.prices(bounds))
    made = {
        name: SchemeTensor(name=name, kind="weight", format=format_, size=len(part), widths=part)
        for name, (format_, part) in widths.formats(kept).items()
    }
    before = {name: round(float(part.mean()), 2) for name, (_, part) in widths.formats(found).items()}
    repaired = {
        name: [mean, after] for name, mean in before.items() if (after := round(made[name].mean_width, 2)) != mean
    }
    tensors = (
        made.get(s.name) or SchemeTensor(name=s.name, kind=s.kind, format=formats[s.name], size=s.size)
        for s in model.sites
    )
    found_by = {"method": "hgq", "granularity": options.granularity, **({"repaired": repaired} if repaired else {})}
    return Scheme(tuple(tensors), found_by)
