"""The compression asked for, what it allows each tensor, and the promise that it is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint, milp

from hmq_fpga.ir.cost import FLOAT_BITS
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.graph import QModel, Site

OVERSHOOT = 1.1  # the actual weight rate is at most this many times the target, where bit-widths allow it

_Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a search has to reach.

    Attributes:
        weight_rate: R_w, bits of the float weights over bits of the quantized ones.
        activation_rate: R_a, bits of the largest float activation over those of the costliest quantized one.
        bits: B, the bit-widths that a weight may get.
        tensor_bits: B of single weights, by name or pattern of names; of the input and activations the largest is an
            upper bound.
        max_activation_bits: upper bound on the bit-width of activations and input.
    """

    weight_rate: float = 8.0
    activation_rate: float = 4.0
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    tensor_bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_activation_bits: int = 8

    def __post_init__(self) -> None:
        for of, bits in {"": self.bits, **{f" of {name!r}": bits for name, bits in self.tensor_bits.items()}}.items():
            if not bits or list(bits) != sorted(set(bits)) or not 1 <= bits[0] <= bits[-1] <= 16:
                raise InvalidInput(f"bit-widths {list(bits)}{of}: give ascending, different numbers from 1 to 16")
        if not 1 <= self.max_activation_bits <= 16:
            raise InvalidInput(f"activation bit-widths up to {self.max_activation_bits}: give a bound within 1 … 16")
        lowest, highest = FLOAT_BITS / self.bits[-1], FLOAT_BITS / self.bits[0]
        if not lowest <= self.weight_rate <= highest:
            raise InvalidInput(
                f"R_w = {self.weight_rate:g} cannot be reached with bit-widths {self.bits[0]} … {self.bits[-1]}: "
                f"choose from {lowest:g} to {highest:g}"
            )
        if not self.activation_rate > 0:
            raise InvalidInput(f"R_a = {self.activation_rate:g} is not positive")

    def check(self, model: QModel) -> None:
        """Raise `InvalidInput` when R_a leaves a tensor of `model` too few bits, naming it.

        Likewise when `tensor_bits` names a tensor that it does not have, or puts R_w out of reach.
        """
        names = [site.name for site in model.sites]
        for pattern in self.tensor_bits:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InvalidInput(f"tensor_bits: no tensor is called {pattern!r}; there are {', '.join(names)}")
        self.activation_bits(model)
        sizes, choices = [site.size for site in weight_sites(model)], list(self.weight_bits(model).values())
        highest, lowest = rate([bits[0] for bits in choices], sizes), rate([bits[-1] for bits in choices], sizes)
        if not lowest <= self.weight_rate <= highest:
            raise InvalidInput(
                f"R_w = {self.weight_rate:g} cannot be reached with the bit-widths that tensor_bits allows: "
                f"choose from {math.ceil(100 * lowest) / 100:g} to {math.floor(100 * highest) / 100:g}"
            )

    def weight_bits(self, model: QModel) -> dict[str, tuple[int, ...]]:
        """The bit-widths that each weight may get, by name."""
        return {site.name: self._own_bits(site.name) or self.bits for site in weight_sites(model)}

    def _own_bits(self, name: str) -> tuple[int, ...] | None:
        """Of the last pattern that a name matches."""
        return next((bits for p, bits in reversed(list(self.tensor_bits.items())) if fnmatchcase(name, p)), None)

    def activation_bits(self, model: QModel, activation_rate: float | None = None) -> dict[str, int]:
        """Bit-width of the input and every activation, by name (Eq. 10-11).

        What counts for a tensor is the largest moment in which it is held (see `cost.moments`): alone in a chain,
        together with the shortcut's tensor inside a residual block.

        Args:
            model: the instrumented network.
            activation_rate: in place of R_a, for a schedule that approaches it.
        """
        rate = activation_rate or self.activation_rate
        totals = [sum(held.values()) for held in model.moments]
        bits = {}
        for site in activation_sites(model):
            size = max(total for held, total in zip(model.moments, totals, strict=True) if site.name in held)
            most_bits = (self._own_bits(site.name) or (self.max_activation_bits,))[-1]
            bits[site.name] = min(int(FLOAT_BITS * max(totals) / rate / size + 1e-9), most_bits)
            if bits[site.name] < 1:
                raise InvalidInput(
                    f"R_a = {rate:g} leaves tensor {site.name!r} (held among {size} values) under 1 bit: "
                    f"choose R_a up to {FLOAT_BITS * max(totals) / size:g}"
                )
        return bits


def activation_sites(model: QModel) -> list[Site]:
    """The input and all activations."""
    return [site for site in model.sites if site.kind != "weight"]


def weight_sites(model: QModel) -> list[Site]:
    """All weights."""
    return [site for site in model.sites if site.kind == "weight"]


def rate(bits: Sequence[int], sizes: Sequence[int]) -> float:
    """R_w of weight tensors with these bit-widths and sizes (Eq. 7)."""
    return FLOAT_BITS * sum(sizes) / sum(b * n for b, n in zip(bits, sizes, strict=True))


def meets(bits: Sequence[int], sizes: Sequence[int], weight_rate: float) -> bool:
    """Whether the actual rate keeps the promise: at least the target, at most `OVERSHOOT` times it."""
    return weight_rate <= rate(bits, sizes) <= OVERSHOOT * weight_rate


def cheapest_bits(costs: Sequence[Mapping[int, float]], sizes: Sequence[int], weight_rate: float) -> list[int]:
    """Bit-widths of least total cost that keep the promise of `meets`.

    A multiple-choice knapsack, solved exactly. Where no choice lies within the overshoot (one tensor holds nearly all
    weights, say), the one closest above the target.

    Args:
        costs: of each tensor, by the bit-widths that it may get.
        sizes: elements per tensor.
        weight_rate: R_w.
    """
    rows = [(i, bits, cost) for i, choices in enumerate(costs) for bits, cost in choices.items()]
    tensor, choice, cost = (np.array(column) for column in zip(*rows, strict=True))
    bits = np.array(sizes)[tensor] * choice / sum(sizes)  # mean bits per weight that each choice contributes
    one_each = LinearConstraint(tensor == np.arange(len(sizes))[:, None], 1, 1)
    most = FLOAT_BITS / weight_rate

    def solve(objective: _Values, least: float) -> _Values | None:
        slack = 1e-9
        within = LinearConstraint(bits, least - slack, most + slack)
        found = milp(objective, constraints=[one_each, within], integrality=np.ones(len(bits)), bounds=(0, 1))
        values: _Values | None = found.x
        return values

    x = solve(cost, most / OVERSHOOT)
    if x is None:
        x = solve(-bits, 0)
    if x is None:
        raise AssertionError("Target checks that the smallest bit-widths reach the rate")
    chosen: list[int] = choice[x > 0.5].tolist()
    return chosen
