"""HMQ: a Gumbel-softmax search over pairs of bit-width and power-of-two threshold, one pair per tensor.

Phase one of Habi, Jennings, Netzer (2020). Their schedules count epochs of large data sets; here they are
expressed in optimizer steps, and the learning rate of the logits follows from the number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.calibrate import max_thresholds_log2, scheme_of
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.widths import cheapest, rises, weight_candidates
from hmq_fpga.search.optimizer import RAdam
from hmq_fpga.search.quantizers import HMQ, THRESHOLDS, initial_gap
from hmq_fpga.search.target import Target, activation_sites, meets, weight_sites
from hmq_fpga.search.train import Budget, History, Listener, Recorder, Task, batches, finished, finite

CYCLES = 6
RISING_CYCLES = 4  # the targets reach their final values at the start of this one
TEMPERATURE_UPDATES = 125  # per cycle: 25 an epoch, 5 epochs
MIN_STEPS_PER_CYCLE = 25
INITIAL_RATE = 4.0

Expectation = Literal["gumbel", "softmax"]


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
    """

    penalty: float = 32.0
    temperature_rate: float = 1e-2
    min_temperature: float = 0.5
    logit_learning_rate: float | None = None
    expected_bits: Expectation = "gumbel"

    def __post_init__(self) -> None:
        if self.expected_bits not in get_args(Expectation):
            raise InvalidInput(f"expected_bits {self.expected_bits!r}: choose from {', '.join(get_args(Expectation))}")
        if not (self.penalty > 0 and self.temperature_rate > 0 and 0 < self.min_temperature <= 1):
            raise InvalidInput("hmq: penalty, temperature_rate and min_temperature (at most 1) must be positive")


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


def hmq(
    model: QModel,
    task: Task,
    budget: Budget,
    target: Target,
    options: HmqOptions,
    *,
    seed: int,
    listener: Listener,
) -> tuple[QModel, Scheme, History]:
    """Train weights and formats together until the targets are met, and repair what is still missing."""
    steps = budget.search_steps
    schedule = Schedule(steps=steps, options=options)
    limits = max_thresholds_log2(model, task)
    weights, activations = weight_sites(model), activation_sites(model)
    sites = (*weights, *activations)
    names = [site.name for site in sites]
    bounds = target.bounds(model)
    prices = [[bound.prices.get(name, 0.0) for name in names] for bound in bounds]
    choices = list(target.choices(model).values())

    def activation_rate(step: int) -> float:
        return schedule.rising(target.activation_rate, step)

    def bits(step: int) -> list[tuple[int, ...]]:
        activation_bits = target.activation_bits(model, activation_rate(step))
        return [*choices, *((activation_bits[site.name],) for site in activations)]

    blocks = HMQ([s.signed for s in sites], [limits[s.name] for s in sites], bits(0), prices).to(task.x_train.device)
    logit_rate = options.logit_learning_rate or _logit_learning_rate(len(target.bits), steps)
    optimizer = RAdam((model.parameters(), budget.learning_rate), ([blocks.logits], logit_rate))
    recorder = Recorder(listener)
    noise = torch.Generator().manual_seed(seed)
    every = max(steps // (CYCLES * 25), 1)
    model.train()
    for step, (x, y) in enumerate(batches(task, steps, torch.Generator().manual_seed(seed))):
        if step and activation_rate(step) != activation_rate(step - 1):
            blocks.set_bits(bits(step))
        temperature = schedule.temperature(step)
        p = blocks.sample(temperature, noise)
        returned, scores = finished(model, model(x, dict(zip(names, blocks.grids(p), strict=True))))
        task_loss = task.loss(returned, y, scores)
        under = p if options.expected_bits == "gumbel" else blocks.probabilities()
        loss, expected_rates = task_loss, []
        for bound, cost in zip(bounds, blocks.expected_costs(under), strict=True):
            expected = cost.item()
            expected_rates.append(bound.rate * bound.most / expected)
            missed = missed_rate_slope(expected_rates[-1], schedule.rising(bound.rate, step))
            if pull := options.penalty * missed / expected:
                loss = loss + pull * cost
        optimizer.step(loss)
        if step % every == 0 or step == steps - 1:
            chosen_bits = {name: f.width for name, f in zip(names, blocks.chosen(), strict=True)}
            recorder(
                step + 1,
                steps,
                {
                    "epoch": task.epoch(step + 1),
                    "loss": finite(task_loss),
                    **task.accuracies("batch", scores, y),
                    "rate_expected": expected_rates[0],
                    "rate_actual": bounds[0].reached(chosen_bits),
                    "rate_target": schedule.rising(bounds[0].rate, step),
                    "temperature": temperature,
                },
            )
    optimizer.release()
    model.eval()
    formats = dict(zip(names, blocks.chosen(), strict=True))
    found_by: dict[str, Any] = {"method": "hmq", "logit_learning_rate": logit_rate}
    formats, repairs = _repair(model, task, target, formats, limits)
    if repairs:
        found_by["repaired"] = repairs
    scheme = scheme_of(model, formats, found_by)
    model.set_scheme(scheme)
    return model, scheme, recorder.history


def missed_rate_slope(expected: float, target: float) -> float:
    """Derivative of Eq. 8's square of the missed share of R_w with respect to the logarithm of the expected bits."""
    return 2 * max(1 - expected / target, 0.0) * expected / target


def _logit_learning_rate(choices: int, steps: int) -> float:
    """A rate at which RAdam closes the initial gap in a third of a cycle: it moves a logit by about its rate a step.

    A much larger one saturates the distribution early and stops the search, a much smaller one never changes an argmax.
    """
    return initial_gap(THRESHOLDS * choices) / (steps / CYCLES / 3)


def _repair(
    model: QModel, task: Task, target: Target, formats: dict[str, Fixed], limits: dict[str, int]
) -> tuple[dict[str, Fixed], dict[str, list[int]]]:
    """Formats that keep the promise on the bounds, and `{tensor: [bit-width before, after]}` of those that changed.

    The moves are those of least total cost, where the cost of giving a tensor another bit-width is the measured rise of
    the loss on training samples when it alone is changed.
    """
    bounds = target.bounds(model, {site.name: formats[site.name] for site in activation_sites(model)})
    if meets({name: f.width for name, f in formats.items()}, bounds):
        return formats, {}
    candidates = weight_candidates(model, target, limits)
    for name, formats_of in candidates.items():
        formats_of[formats[name].width] = formats[name]
    repaired = cheapest(candidates, rises(model, task, formats, candidates), bounds)
    changes = {n: [formats[n].width, f.width] for n, f in repaired.items() if f.width != formats[n].width}
    return {**formats, **repaired}, changes
