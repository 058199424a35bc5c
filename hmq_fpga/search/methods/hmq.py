"""HMQ: a Gumbel-softmax search over pairs of bit-width and power-of-two threshold, one pair per tensor.

Phase one of Habi, Jennings, Netzer (2020). Their schedules count epochs of large data sets; here they are
expressed in optimizer steps, and the learning rate of the logits follows from the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.calibrate import least_error_format, leaves_nothing, max_thresholds_log2, scheme_of
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.training import NEWS
from hmq_fpga.search.methods.widths import cheapest, rises, weight_candidates
from hmq_fpga.search.optimizer import Stepper
from hmq_fpga.search.quantizers import HMQ, THRESHOLDS, AnyGrid, Grid, initial_gap
from hmq_fpga.search.target import Target, activation_sites, meets, memory_bound, weight_sites
from hmq_fpga.search.train import (
    Best,
    Budget,
    Figures,
    History,
    Keep,
    Listener,
    Task,
    evaluate,
    finished,
    finite,
    train,
)

CYCLES = 6
RISING_CYCLES = 4  # the targets reach their final values at the start of this one
TEMPERATURE_UPDATES = 125  # per cycle: 25 an epoch, 5 epochs
MIN_STEPS = CYCLES * 25
INITIAL_RATE = 4.0

Expectation = Literal["gumbel", "softmax"]
Noise = Literal["tensor", "slice"]
ActivationWidths = Literal["given", "learnt"]


@dataclass(frozen=True, kw_only=True)
class HmqOptions:
    """Options of `hmq`, by default the paper's where it gives them.

    Attributes:
        penalty: lambda of Eq. 8, the weight of a missed R_w.
        temperature_rate: r of the temperature `max(exp(-r * i), min_temperature)` after i updates.
        min_temperature: its lower bound.
        logit_learning_rate: of the logits; by default so large that the initial gap between two logits
            closes in a third of a cycle.
        expected_bits: whether the expected rate is taken under the Gumbel-softmax sample, as in Eq. 7, or
            under the distribution without noise, as in the authors' code.
        noise: one Gumbel sample for each tensor, as in Eq. 4, or as in the authors' code for each input channel of a
            weight and each sample of an activation.
        weight_decay: by which weights shrink at each step, in learning rates (Loshchilov, Hutter, "Decoupled Weight
            Decay Regularization", 2019, Eq. 9).
        headroom: octaves from M to the largest threshold of a weight; the authors' code has one.
        activation_widths: those that R_a gives each tensor (Eq. 11), or learnt as those of weights are, from one bit to
            the most that the target allows, of as many bits together as Eq. 11 would give all.
        keep: the last weights and formats, or those that were best on validation data of all within the bounds, once
            the targets have risen.
    """

    penalty: float = 32.0
    temperature_rate: float = 1e-2
    min_temperature: float = 0.5
    logit_learning_rate: float | None = None
    expected_bits: Expectation = "gumbel"
    noise: Noise = "tensor"
    weight_decay: float = 0.0
    headroom: int = 0
    activation_widths: ActivationWidths = "given"
    keep: Keep = "last"

    def __post_init__(self) -> None:
        for name, kind in (
            ("expected_bits", Expectation),
            ("noise", Noise),
            ("activation_widths", ActivationWidths),
            ("keep", Keep),
        ):
            if (given := getattr(self, name)) not in get_args(kind):
                raise InvalidInput(f"{name} {given!r}: choose from {', '.join(get_args(kind))}")
        if not (self.penalty > 0 and self.temperature_rate > 0 and 0 < self.min_temperature <= 1):
            raise InvalidInput("hmq: penalty, temperature_rate and min_temperature (at most 1) must be positive")
        if self.weight_decay < 0 or not 0 <= self.headroom <= 8:
            raise InvalidInput("hmq: weight_decay must not be negative, and headroom be from 0 to 8")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Temperature and targets by optimizer step (Section 3.3 of the paper)."""

    steps: int
    options: HmqOptions

    def cycle(self, step: int) -> int:
        """Number of the cycle, from 0."""
        return step * CYCLES // self.steps

    def temperature(self, step: int) -> float:
        """Temperature: reset at the start of each cycle."""
        updates = step * CYCLES % self.steps * TEMPERATURE_UPDATES // self.steps
        return max(math.exp(-self.options.temperature_rate * updates), self.options.min_temperature)

    def rising(self, final: float, step: int) -> float:
        """R_w or R_a, rising in equal steps from 4."""
        first = min(INITIAL_RATE, final)
        return first + (final - first) * min(self.cycle(step) + 1, RISING_CYCLES) / RISING_CYCLES


class HmqSearch(nn.Module):
    """Phase one for any training loop: it quantizes the forward pass, pulls at the loss, and ends in a scheme.

    In training mode each forward pass is through newly drawn quantizers of the present step's temperature and targets;
    in evaluation mode through those of the largest logits. With the search's own optimizer a loop is

        search = HmqSearch(quantized, target, steps, task=task, seed=0)
        for x, y in batches:
            search.step(loss(search(x), y))
        scheme = search.finish()

    With any other it adds `penalty` to the loss and calls `advance` after each step:

        optimizer = torch.optim.RAdam(search.parameter_groups())
        for x, y in batches:
            (loss(search(x), y) + search.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            search.advance()

    Its state dict holds all that a search needs to go on, but for the state of another optimizer.

    Args:
        model: the instrumented network, with the float model's parameters; trained in place.
        target: bounds on the bit-widths of weights, and R_a.
        steps: optimizer steps of the search.
        task: whose training data give the ranges of activations, and with their loss what a repair costs.
        seed: of the noise; processes that train together have the same.
        options: by default the paper's.
        learning_rate: of the weights.

    Raises:
        InvalidInput: for too few steps, or a target out of reach; nothing has been changed then.
    """

    def __init__(
        self,
        model: QModel,
        target: Target,
        steps: int,
        *,
        task: Task,
        seed: int = 0,
        options: HmqOptions | None = None,
        learning_rate: float = Budget.learning_rate,
    ) -> None:
        if steps < MIN_STEPS:
            raise InvalidInput(f"{steps} steps: a search by hmq needs at least {MIN_STEPS}")
        if not target.bounded:
            raise InvalidInput("a bound on LUTs or EBOPs alone: give HmqSearch R_w too, or use find_scheme")
        target.check(model)
        super().__init__()
        self.model, self.target, self.steps, self.learning_rate = model, target, steps, learning_rate
        self._task, self._options = task, options or HmqOptions()
        self._schedule = Schedule(steps=steps, options=self._options)
        weights, self._activations = weight_sites(model), activation_sites(model)
        self._limits = max_thresholds_log2(model, task)
        self._limits |= {site.name: self._limits[site.name] + self._options.headroom for site in weights}
        sites = (*weights, *self._activations)
        self._names = [site.name for site in sites]
        self._bounds = target.bounds(model)
        self._choices = target.choices(model)
        if self._options.activation_widths == "learnt":
            if target.bops is not None:
                raise InvalidInput("activation_widths 'learnt': what a bit operation costs depends on them: give R_w")
            self._bounds = (*self._bounds, memory_bound(model, target))
            self._choices |= target.activation_choices(model)
        self._done = 0
        self.blocks = HMQ(
            [site.signed for site in sites],
            [self._limits[name] for name in self._names],
            self._bits(),
            [[bound.prices.get(name, 0.0) for name in self._names] for bound in self._bounds],
        ).to(next(model.parameters()))
        self.logit_learning_rate = self._options.logit_learning_rate or _logit_learning_rate(len(target.bits), steps)
        self._noise = torch.Generator().manual_seed(seed)
        self._drawn: Tensor | None = None
        self._found: dict[str, float] = {}
        self._own: Stepper | None = None

    @property
    def done(self) -> int:
        """Steps that have been taken."""
        return self._done

    @property
    def temperature(self) -> float:
        """Of the present step."""
        return self._schedule.temperature(self._done)

    @property
    def settled(self) -> bool:
        """Whether the targets have risen, and the formats of the largest logits are within the bounds."""
        risen = self._schedule.cycle(self._done) + 1 >= RISING_CYCLES
        return risen and meets({name: f.width for name, f in self.formats().items()}, self._bounds)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the quantized network, as `model(x)` gives it."""
        grids: Mapping[str, AnyGrid]
        if self.training:
            grids = dict(zip(self._names, self._draw(len(x)), strict=True))
        else:
            grids = {name: Grid.of(f) for name, f in self.formats().items()}
        output: Tensor = self.model(x, grids)
        return output

    def _draw(self, samples: int) -> Sequence[AnyGrid]:
        """New grids of all tensors, in the order of their names."""
        if self._options.noise == "tensor":
            self._drawn = self.blocks.sample(self.temperature, self._noise)
            return self.blocks.grids(self._drawn)
        weights = self.model.weights
        slices = [weights[name].shape[1] if name in weights else samples for name in self._names]
        drawn = self.blocks.sample_slices(self.temperature, slices, self._noise)
        self._drawn = torch.stack([of_slices.mean(0) for of_slices in drawn])
        return self.blocks.grids_of_slices(drawn, [int(name in weights) for name in self._names])

    def formats(self) -> dict[str, Fixed]:
        """Of the largest logits, by tensor."""
        return dict(zip(self._names, self.blocks.chosen(), strict=True))

    def penalty(self) -> Tensor:
        """What the last forward pass misses of the present targets, 0-d, with the gradient of the term in Eq. 8."""
        if self._drawn is None:
            raise InvalidInput("the penalty is that of a forward pass in training mode: compute the output before it")
        under = self._drawn if self._options.expected_bits == "gumbel" else self.blocks.probabilities()
        penalty, rates = torch.zeros_like(under[0, 0]), []
        for bound, cost in zip(self._bounds, self.blocks.expected_costs(under), strict=True):
            expected = cost.item()
            rates.append((bound.rate * bound.most / expected, self._schedule.rising(bound.rate, self._done)))
            if pull := self._options.penalty * missed_rate_slope(*rates[-1]) / expected:
                penalty = penalty + pull * cost
        rate, target = rates[0]
        self._found = {"rate_expected": rate, "rate_target": target, "temperature": self.temperature}
        return penalty

    def figures(self) -> dict[str, float]:
        """At the last penalty the expected rate, of the first bound, its target and the temperature; its rate now."""
        bits = {name: format_.width for name, format_ in self.formats().items()}
        return {**self._found, "rate_actual": self._bounds[0].reached(bits)}

    def advance(self) -> None:
        """Go on to the next step's temperature and targets; weights decay, if they are to."""
        if self._options.weight_decay:
            with torch.no_grad():
                for weight in self.model.weights.values():
                    weight.mul_(1 - self.learning_rate * self._options.weight_decay)
        before = self._activation_rate()
        self._done += 1
        if self._activation_rate() != before:
            self.blocks.set_bits(self._bits())

    def step(self, loss: Tensor) -> None:
        """Add the penalty to a loss, take a step of the task's optimizer along the gradient, and advance."""
        total = loss + self.penalty()
        self._optimizer().step(total)
        self.advance()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimizer of `torch.optim`: the weights, and the logits, which need a larger learning rate."""
        return [
            {"params": list(self.model.parameters()), "lr": self.learning_rate},
            {"params": [self.blocks.logits], "lr": self.logit_learning_rate},
        ]

    def release(self) -> None:
        """End the search where it is: parameters are no optimizer's any more, the network is in evaluation mode."""
        if self._own:
            self._own.release()
        self._own = None
        self.eval()

    def finish(self) -> Scheme:
        """Choose the formats, repair what is still missing of the bounds, and set the scheme of the network."""
        self.release()
        found_by: dict[str, Any] = {"method": "hmq", "logit_learning_rate": self.logit_learning_rate}
        formats = self.formats()
        if restored := self._restored(formats):
            found_by["restored"] = {
                name: [formats[name].threshold_log2, f.threshold_log2] for name, f in restored.items()
            }
        formats, repairs = self._repaired({**formats, **restored})
        if repairs:
            found_by["repaired"] = repairs
        scheme = scheme_of(self.model, formats, found_by)
        self.model.set_scheme(scheme)
        return scheme

    def _restored(self, formats: Mapping[str, Fixed]) -> dict[str, Fixed]:
        """Of weights of which the search's threshold leaves nothing, the formats of least error and the same width.

        A mixture of formats has the mean of their steps: towards the smallest threshold it can become finer and lose
        little, until that is all of it; from there no gradient leads back. The rest of the network has learnt without
        the layer: where a shortcut leads around it, it stays away unless the loss on training samples is less with it.
        """
        restored: dict[str, Fixed] = {}
        for name, weight in self.model.weights.items():
            bits, limit = formats[name].width, self._limits[name]
            if not leaves_nothing(weight, formats[name], limit):
                continue
            least = least_error_format(weight, signed=True, bits=bits, max_threshold_log2=limit)
            if self.model.bypassed(name):
                rise = rises(self.model, self._task, {**formats, **restored}, {name: {bits: least}})[name][bits]
                if rise >= 0:
                    continue
            restored[name] = least
        return restored

    def _repaired(self, formats: dict[str, Fixed]) -> tuple[dict[str, Fixed], dict[str, list[int]]]:
        """Formats that keep the promise on the bounds, and `{tensor: [bit-width before, after]}` of those that changed.

        The moves are those of least total cost, where the cost of giving a tensor another bit-width is the measured
        rise of the loss on training samples when it alone is changed.
        """
        given = {site.name: formats[site.name] for site in self._activations}
        learnt = self._options.activation_widths == "learnt"
        bounds = self._bounds if learnt else self.target.bounds(self.model, given)
        if meets({name: f.width for name, f in formats.items()}, bounds):
            return formats, {}
        candidates = weight_candidates(self.model, self.target, self._limits)
        if learnt:
            candidates |= {name: {bits: formats[name].narrowed(bits) for bits in self._choices[name]} for name in given}
        for name, formats_of in candidates.items():
            formats_of[formats[name].width] = formats[name]
        repaired = cheapest(candidates, rises(self.model, self._task, formats, candidates), bounds)
        changes = {n: [formats[n].width, f.width] for n, f in repaired.items() if f.width != formats[n].width}
        return {**formats, **repaired}, changes

    def get_extra_state(self) -> dict[str, Any]:
        """What is neither parameter nor buffer."""
        own = self._own.state_dict() if self._own else None
        return {"done": self._done, "noise": self._noise.get_state(), "optimizer": own}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""
        self._done = state["done"]
        self._noise.set_state(state["noise"].cpu())
        self.blocks.set_bits(self._bits())
        if state["optimizer"]:
            self._optimizer().load_state_dict(state["optimizer"])

    def _optimizer(self) -> Stepper:
        if self._own is None:
            (weights, rate), logits = ((group["params"], group["lr"]) for group in self.parameter_groups())
            self._own = self._task.stepper(weights, rate, self.steps, logits)
        return self._own

    def _activation_rate(self) -> float:
        return self._schedule.rising(self.target.activation_rate, self._done)

    def _bits(self) -> list[tuple[int, ...]]:
        given = self.target.activation_bits(self.model, self._activation_rate())
        return [self._choices[name] if name in self._choices else (given[name],) for name in self._names]


def hmq(
    model: QModel,
    task: Task,
    budget: Budget,
    target: Target,
    options: HmqOptions,
    *,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,
) -> tuple[QModel, Scheme, History]:
    """Train weights and formats together until the targets are met, and repair what is still missing."""
    steps, rate = budget.search_steps, budget.learning_rate
    search = HmqSearch(model, target, steps, task=task, seed=seed, options=options, learning_rate=rate)
    best = Best(search) if options.keep == "best" else None

    def step(_number: int, x: Tensor, y: Tensor) -> Figures:
        returned, scores = finished(model, search(x))
        loss = task.loss(returned, y, scores)
        search.step(loss)

        def figures() -> dict[str, float]:
            if best and search.settled:
                search.eval()
                best(search.done, steps, evaluate(model, task, search))
                search.train()
            return {"loss": finite(loss), **task.accuracies("batch", scores, y), **search.figures()}

        return figures

    try:
        history = train(
            step,
            task,
            parts={"search": search.train(), **({"best": best} if best else {})},
            steps=steps,
            seed=seed,
            news=NEWS,
            settings=(options, target, rate),
            listener=listener,
            checkpoint=checkpoint,
        )
    finally:
        search.release()
    if best:
        best.restore()
    return model, search.finish(), history


def missed_rate_slope(expected: float, target: float) -> float:
    """Derivative of Eq. 8's square of the missed share of R_w with respect to the logarithm of the expected bits."""
    return 2 * max(1 - expected / target, 0.0) * expected / target


def _logit_learning_rate(choices: int, steps: int) -> float:
    """A rate at which RAdam closes the initial gap in a third of a cycle: it moves a logit by about its rate a step.

    A much larger one saturates the distribution early and stops the search, a much smaller one never changes an argmax.
    """
    return initial_gap(THRESHOLDS * choices) / (steps / CYCLES / 3)
