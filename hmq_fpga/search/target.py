"""The compression asked for, what it allows each tensor, and the promise that it is met."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from scipy.optimize import LinearConstraint, milp

from hmq_fpga.ir.cost import FLOAT_BITS, layer_costs
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.freeze import outline
from hmq_fpga.search.graph import QModel, Site

OVERSHOOT = 1.1  # a bound is used up to its part of this, where bit-widths allow it
DEFAULT_RATE = 8.0
RATE = "R_w"
_SLACK = 1e-9

_Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What the bit-widths of tensors may cost together, in most cases those of the weights.

    The cost is a sum over the tensors: of each its bit-width, times the price of one bit.

    Attributes:
        name: of the cost.
        prices: by name of the tensor.
        most: what the sum must not exceed.
        of: whose bit-widths; of each kind of tensors that has bounds, one is to be used up.
    """

    name: str
    prices: Mapping[str, float]
    most: float
    of: Literal["weights", "activations"] = "weights"

    @property
    def rate(self) -> float:
        """By which factor the cost of float weights has to shrink: R_w, where each element has the same price."""
        return FLOAT_BITS * sum(self.prices.values()) / self.most

    def cost(self, bits: Mapping[str, float]) -> float:
        """Of weights with these bit-widths, by name."""
        return sum(bits[name] * price for name, price in self.prices.items())

    def reached(self, bits: Mapping[str, float]) -> float:
        """The factor by which the cost of float weights shrinks with these bit-widths; `rate` asks for one."""
        return FLOAT_BITS * sum(self.prices.values()) / self.cost(bits)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a search has to reach: all bounds that are given; where none is given, R_w = 8.

    Attributes:
        weight_rate: R_w, bits of the float weights over bits of the quantized ones.
        weight_bits: most bits of all weights together, biases not counted.
        bops: most bit operations for one sample: products x weight bits x activation bits.
        luts, ebops: most LUTs of the fully unrolled network, and most effective bit operations, which pruning while
            fine-tuning keeps; where no other bound is given, the search has those of `logic.start`.
        activation_rate: R_a, bits of the largest float activation over those of the costliest quantized one.
        bits: B, the bit-widths that a weight may get.
        tensor_bits: B of single weights, by name or pattern of names; of the input and activations the largest is an
            upper bound.
        max_activation_bits: upper bound on the bit-width of activations and input.
    """

    weight_rate: float | None = None
    weight_bits: float | None = None
    bops: float | None = None
    luts: float | None = None
    ebops: float | None = None
    activation_rate: float = 4.0
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    tensor_bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_activation_bits: int = 8

    def __post_init__(self) -> None:
        if not self.bounded and not self.pruned:
            object.__setattr__(self, "weight_rate", DEFAULT_RATE)
        for of, bits in {"": self.bits, **{f" of {name!r}": bits for name, bits in self.tensor_bits.items()}}.items():
            if not bits or list(bits) != sorted(set(bits)) or not 1 <= bits[0] <= bits[-1] <= 16:
                raise InvalidInput(f"bit-widths {list(bits)}{of}: give ascending, different numbers from 1 to 16")
        if not 1 <= self.max_activation_bits <= 16:
            raise InvalidInput(f"activation bit-widths up to {self.max_activation_bits}: give a bound within 1 … 16")
        lowest, highest = FLOAT_BITS / self.bits[-1], FLOAT_BITS / self.bits[0]
        if self.weight_rate is not None and not lowest <= self.weight_rate <= highest:
            raise InvalidInput(
                f"R_w = {self.weight_rate:g} cannot be reached with bit-widths {self.bits[0]} … {self.bits[-1]}: "
                f"choose from {lowest:g} to {highest:g}"
            )
        if not self.activation_rate > 0:
            raise InvalidInput(f"R_a = {self.activation_rate:g} is not positive")

    @property
    def bounded(self) -> bool:
        """Whether there is a bound on the bit-widths of weights."""
        return any(bound is not None for bound in (self.weight_rate, self.weight_bits, self.bops))

    @property
    def pruned(self) -> bool:
        """Whether there is a bound that pruning has to keep."""
        return self.luts is not None or self.ebops is not None

    def check(self, model: QModel) -> None:
        """Raise `InvalidInput` when R_a leaves a tensor of `model` too few bits, naming it.

        Likewise when `tensor_bits` names a tensor that it does not have, or a bound is out of reach.
        """
        names = [site.name for site in model.sites]
        for pattern in self.tensor_bits:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InvalidInput(f"tensor_bits: no tensor is called {pattern!r}; there are {', '.join(names)}")
        self.activation_bits(model)
        choices = self.choices(model)
        narrowest = {name: bits[0] for name, bits in choices.items()}
        for bound in self.bounds(model):
            least, most = self.reach(model, bound)
            if bound.name == RATE and not least <= bound.rate <= most:
                raise InvalidInput(
                    f"R_w = {bound.rate:g} cannot be reached with the bit-widths that tensor_bits allows: "
                    f"choose from {math.ceil(100 * least) / 100:g} to {math.floor(100 * most) / 100:g}"
                )
            if bound.rate > most:
                raise InvalidInput(
                    f"{bound.most:,.0f} {bound.name} are out of reach: the narrowest weights need "
                    f"{math.ceil(bound.cost(narrowest)):,}"
                )

    def reach(self, model: QModel, bound: Bound) -> tuple[float, float]:
        """The least and the largest factor that the widest and the narrowest weights reach, see `Bound.reached`."""
        choices = self.choices(model)
        widest, narrowest = ({name: bits[end] for name, bits in choices.items()} for end in (-1, 0))
        return bound.reached(widest), bound.reached(narrowest)

    def bounds(self, model: QModel, formats: Mapping[str, Fixed] | None = None) -> tuple[Bound, ...]:
        """What the bit-widths of the weights of `model` may cost.

        Args:
            model: the instrumented network.
            formats: of its input and activations by name; by default of the bit-widths that R_a allows. They matter
                for bit operations: a layer that reads a sum reads as many bits as the formats of its terms make it.
        """
        sizes = {site.name: float(site.size) for site in weight_sites(model)}
        bounds = []
        if self.weight_rate is not None:
            bounds.append(rate_bound(model, self.weight_rate))
        if self.weight_bits is not None:
            bounds.append(Bound(name="weight bits", prices=sizes, most=self.weight_bits))
        if self.bops is not None:
            prices = bops_of_a_bit(model, formats or self.activation_bits(model))
            bounds.append(Bound(name="bit operations", prices=prices, most=self.bops))
        return tuple(bounds)

    def uniform_bits(self, model: QModel) -> int:
        """The widest single bit-width of all weights that keeps all bounds.

        Raises:
            InvalidInput: when the target has bit-widths of single tensors, or the narrowest breaks a bound.
        """
        if self.tensor_bits:
            raise InvalidInput("one bit-width for all weights: leave out tensor_bits, or use a method that mixes them")
        self.check(model)
        rate = max(bound.rate for bound in self.bounds(model))
        return max(bits for bits in self.bits if bits <= FLOAT_BITS / rate * (1 + _SLACK))

    def choices(self, model: QModel) -> dict[str, tuple[int, ...]]:
        """The bit-widths that each weight may get, by name."""
        return {site.name: self._own_bits(site.name) or self.bits for site in weight_sites(model)}

    def activation_choices(self, model: QModel) -> dict[str, tuple[int, ...]]:
        """The bit-widths that input and activations may get where R_a bounds them all together, by name."""
        return {site.name: tuple(range(1, self._most_bits(site.name) + 1)) for site in activation_sites(model)}

    def _most_bits(self, activation: str) -> int:
        return (self._own_bits(activation) or (self.max_activation_bits,))[-1]

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
            bits[site.name] = min(int(FLOAT_BITS * max(totals) / rate / size + 1e-9), self._most_bits(site.name))
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


def rate_bound(model: QModel, weight_rate: float) -> Bound:
    """R_w as a bound: every bit of every element has the same price."""
    sizes = {site.name: float(site.size) for site in weight_sites(model)}
    return Bound(name=RATE, prices=sizes, most=FLOAT_BITS * sum(sizes.values()) / weight_rate)


def memory_bound(model: QModel, target: Target) -> Bound:
    """Input and activations need together no more bits than Eq. 11 gives them."""
    sizes, bits = {site.name: float(site.size) for site in activation_sites(model)}, target.activation_bits(model)
    most = sum(bits[name] * size for name, size in sizes.items())
    return Bound(name="activation bits", prices=sizes, most=most, of="activations")


def bops_of_a_bit(model: QModel, activations: Mapping[str, Fixed | int]) -> dict[str, float]:
    """Bit operations for one sample that one more bit of a weight costs, by name of the weight.

    Args:
        model: the instrumented network.
        activations: formats, or bit-widths, of its input and activations by name.
    """
    net = outline(copy.deepcopy(model), activations)
    widths = {op.name: net.formats[op.source].width for op in net.linears}
    prices: dict[str, float] = {}
    for layer in layer_costs(net):
        site = model.weight_sites[layer.name]
        prices[site] = prices.get(site, 0.0) + layer.macs * widths[layer.name]
    return prices


def meets(bits: Mapping[str, float], bounds: Sequence[Bound]) -> bool:
    """Whether bit-widths keep the promise: all bounds, and one of each kind is used up but for `OVERSHOOT`."""
    shares: dict[str, list[float]] = {}
    for bound in bounds:
        shares.setdefault(bound.of, []).append(bound.cost(bits) / bound.most)
    return all(1 / OVERSHOOT - _SLACK <= max(of_kind) <= 1 + _SLACK for of_kind in shares.values())


def cheapest_bits(costs: Mapping[str, Mapping[int, float]], bounds: Sequence[Bound]) -> dict[str, int]:
    """Bit-widths of least total cost that keep the promise of `meets`, by name.

    A multiple-choice knapsack, solved exactly. Where no choice lies within the overshoot (one tensor holds nearly all
    weights, say), the one closest to a bound.

    Args:
        costs: of each tensor, by the bit-widths that it may get.
        bounds: on their bit-widths.

    Raises:
        InvalidInput: when no choice keeps all bounds.
    """
    rows = [(i, bits, cost) for i, choices in enumerate(costs.values()) for bits, cost in choices.items()]
    tensor, choice, cost = (np.array(column) for column in zip(*rows, strict=True))
    prices = np.array([[bound.prices.get(name, 0.0) / bound.most for name in costs] for bound in bounds])
    shares = prices[:, tensor] * choice
    one_each = LinearConstraint(tensor == np.arange(len(costs))[:, None], 1, 1)
    within = LinearConstraint(shares, -np.inf, 1 + _SLACK)

    def solve(objective: _Values, *used: LinearConstraint) -> tuple[float, _Values | None]:
        constraints = [one_each, within, *used]
        found = milp(objective, constraints=constraints, integrality=np.ones(len(choice)), bounds=(0, 1))
        return (math.inf, None) if found.x is None else (float(found.fun), found.x)

    kinds = sorted({bound.of for bound in bounds})
    one_of_each = list(product(*([i for i, bound in enumerate(bounds) if bound.of == kind] for kind in kinds)))
    used_up = [solve(cost, LinearConstraint(shares[[*i]], 1 / OVERSHOOT - _SLACK, np.inf)) for i in one_of_each]
    _, x = min(used_up, key=itemgetter(0))
    if x is None:
        _, x = min((solve(-shares[[*i]].sum(0)) for i in one_of_each), key=itemgetter(0))
    if x is None:
        raise InvalidInput(f"no bit-widths keep {' and '.join(bound.name for bound in bounds)}: allow more of one")
    return dict(zip(costs, choice[x > 0.5].tolist(), strict=True))
