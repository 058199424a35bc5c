"""Fake quantization, and the HMQ block that searches for its parameters.

Equation numbers are those of Habi, Jennings, Netzer, "HMQ: Hardware Friendly Mixed Precision Quantization
Block for CNNs" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Widths
from hmq_fpga.search import kernels

THRESHOLDS = 9  # candidates per tensor: 2^M … 2^(M-8)
RECOMPUTED = 1 << 14  # elements from which on a tensor is quantized again rather than kept
INITIAL_SHARE = 0.9  # of the pair (largest threshold, largest bit-width) in the initial distribution


class Grid(NamedTuple):
    """A uniform quantizer's step and smallest and largest level."""

    step: float
    lo: float
    hi: float

    @classmethod
    def of(cls, format_: Fixed) -> Grid:
        """The grid of a fixed-point format."""
        return cls(format_.step, format_.lo * format_.step, format_.hi * format_.step)

    @classmethod
    def unbounded(cls, step: float) -> Grid:
        """All multiples of `step`: rounding without clipping, as for a bias on its accumulator's grid."""
        return cls(step, -math.inf, math.inf)


class GridOfEach(NamedTuple):
    """A grid for each element of a tensor: tensors of its shape, of the elements' steps and levels."""

    step: Tensor
    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, format_: Fixed, widths: Widths, like: Tensor) -> GridOfEach:
        """Of the elements of `like`, of formats narrowed to `widths`, `(elements,)`; of width 0 it is zero alone."""
        grids = [Grid(1.0, 0.0, 0.0), *(Grid.of(format_.narrowed(width)) for width in range(1, format_.width + 1))]
        table = torch.tensor(grids, dtype=like.dtype)[torch.from_numpy(widths.astype(np.int64))]
        return cls(*(column.reshape(like.shape).to(like) for column in table.unbind(1)))


def grid_of(format_: Fixed, widths: Widths | None, like: Tensor) -> Grid | GridOfEach:
    """The grid of the elements of `like`, which have a format, and widths of their own if these are given."""
    return Grid.of(format_) if widths is None else GridOfEach.of(format_, widths, like)


class TrainedGrid(NamedTuple):
    """A grid that gets a gradient: a tensor `(3,)` of step and smallest and largest level, and its values."""

    tensor: Tensor
    values: Grid


class TrainedGrids(NamedTuple):
    """Grids of the slices of a tensor along a dimension, which get a gradient: step and levels of each, `(slices, 3)`.

    A dimension that a reshape made longer than that has several positions in a row for each.
    """

    tensor: Tensor
    dim: int

    def quantize(self, x: Tensor, *, relu: bool) -> Tensor:
        """As `fake_quantize`, by operations of PyTorch's own."""
        x = x.relu() if relu else x
        of_each = self.tensor.repeat_interleave(x.shape[self.dim] // len(self.tensor), 0)
        sizes = [-1 if d == self.dim else 1 for d in range(x.ndim)]
        step, lo, hi = (column.reshape(sizes) for column in of_each.unbind(1))
        ratio = x / step
        level = step * (ratio + (ratio.round() - ratio).detach())
        return torch.where(level < lo, lo, torch.where(level > hi, hi, level))


AnyGrid = Grid | GridOfEach | TrainedGrid | TrainedGrids


class _FakeQuantize(torch.autograd.Function):
    """`clip(step * round(x / step), lo, hi)` of several tensors, with exact derivatives but for the rounding.

    Only `x` is kept for the backward pass, which rounds it again.
    """

    @staticmethod
    def forward(ctx: Any, grids: Sequence[Grid | GridOfEach], relu: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` are the values; if the grids are trained, then their tensors."""
        xs = tensors[: len(grids)]
        ctx.save_for_backward(*xs)
        ctx.grids, ctx.floor, ctx.trained = grids, 0.0 if relu else -math.inf, len(tensors) > len(xs)
        return tuple(_on(grid, x) for x, grid in zip(xs, grids, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2 : 2 + len(grads)]
        passed, by_grids = zip(
            *(
                _passed(x, grad, grid, ctx.floor, spend=False) if ctx.trained or want else (None, None)
                for x, grad, grid, want in zip(ctx.saved_tensors, grads, ctx.grids, wanted, strict=True)
            ),
            strict=True,
        )
        return None, None, *passed, *(passed[0].new_tensor(by_grids).unbind() if ctx.trained else ())


def fake_quantize_all(xs: Sequence[Tensor], grids: Sequence[AnyGrid]) -> tuple[Tensor, ...]:
    """Quantize tensors of any shapes, each to its grid, as `fake_quantize` does one; all grids are trained or none."""
    return _quantize(xs, grids, relu=False)


def fake_quantize(x: Tensor, grid: AnyGrid, *, relu: bool = False) -> Tensor:
    """Quantize `x` of any shape to `grid` (Eq. 2–3, with the hardware's two's-complement clip).

    `grid` is constant or gets a gradient. Half precision, as mixed-precision training makes it, is computed and
    returned in float32. `relu`: quantize `relu(x)`, to a grid that begins at zero.

    Backward: straight-through for the rounding only. Gradient reaches every `x` whose rounded level lies within
    `lo … hi`, end levels included; with respect to the step it is `round(x / step) - x / step` there, and with
    respect to `lo` and `hi` it is one where `x` is clipped to them. By `lo = -t`, `hi = t - step` these are the
    exact derivatives with respect to the step and the threshold `t`.
    """
    return _quantize((x,), (grid,), relu=relu)[0]


def _quantize(xs: Sequence[Tensor], grids: Sequence[AnyGrid], *, relu: bool) -> tuple[Tensor, ...]:
    xs = [x.float() if x.dtype.itemsize < 4 else x for x in xs]
    if any(isinstance(grid, TrainedGrids) for grid in grids):
        return tuple(
            grid.quantize(x, relu=relu) if isinstance(grid, TrainedGrids) else _quantize((x,), (grid,), relu=relu)[0]
            for x, grid in zip(xs, grids, strict=True)
        )
    trained = [grid.tensor for grid in grids if isinstance(grid, TrainedGrid)]
    values = [grid.values if isinstance(grid, TrainedGrid) else grid for grid in grids]
    quantized: tuple[Tensor, ...] = _FakeQuantize.apply(values, relu, *xs, *trained)  # type: ignore[no-untyped-call]
    return quantized


class _QuantizedLinear(torch.autograd.Function):
    """`F.linear` of an input, a weight and a bias, each quantized or not; keeps these, and quantizes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        grids: Sequence[Grid | GridOfEach | None],
        relu: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """`trained`: of the grids that are not None, if they are trained, their tensors."""
        ctx.save_for_backward(x, weight, bias)
        ctx.grids, ctx.floor, ctx.trained = grids, 0.0 if relu else -math.inf, bool(trained)
        return torch.addmm(_on(grids[2], bias), _on(grids[0], x), _on(grids[1], weight).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.grids

        # The weight first, whose gradient is small once the input is given up again
        by_weight, weight_grid = _passed(weight, grad.t() @ _on(of_x, x), of_weight)
        by_bias, bias_grid = _passed(bias, grad.sum(0), of_bias)
        by_x, x_grid = None, None
        if ctx.needs_input_grad[2] or (ctx.trained and of_x):
            by_x, x_grid = _passed(x, grad @ _on(of_weight, weight), of_x, ctx.floor)
        by_grids = [by_grid for by_grid in (x_grid, weight_grid, bias_grid) if by_grid]
        return None, None, by_x, by_weight, by_bias, *(grad.new_tensor(by_grids).unbind() if ctx.trained else ())


def _passed(
    x: Tensor, grad: Tensor, grid: Grid | GridOfEach | None, floor: float = -math.inf, *, spend: bool = True
) -> tuple[Tensor, list[float] | None]:
    """Gradients of a tensor and of its grid, of that of what was made of it, which may be spent."""
    if grid is None:
        return grad, None
    if isinstance(grid, GridOfEach):
        return kernels.gradient_each(x, grad, *grid), None
    return kernels.gradients(x, grad, *grid, floor, spend=spend)


def _on(grid: Grid | GridOfEach | None, x: Tensor) -> Tensor:
    if grid is None:
        return x
    return kernels.quantize_each(x, *grid) if isinstance(grid, GridOfEach) else kernels.quantize(x, *grid)


def quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, grids: Sequence[AnyGrid | None], relu: bool = False
) -> Tensor:
    """`F.linear` of `x`, `(batch, n)`, weight and bias, each quantized as by `fake_quantize` if it has a grid.

    `relu`: of `relu(x)`. None of the quantized tensors is kept for the backward pass, but where slices have grids.
    """
    if any(isinstance(grid, TrainedGrids) for grid in grids):
        floors = (relu, False, False)
        return F.linear(
            *(
                fake_quantize(value, grid, relu=floor) if grid else value
                for value, grid, floor in zip((x, weight, bias), grids, floors, strict=True)
            )
        )
    trained = [grid.tensor for grid in grids if isinstance(grid, TrainedGrid)]
    values = [grid.values if isinstance(grid, TrainedGrid) else grid for grid in grids]
    result: Tensor = _QuantizedLinear.apply(values, relu, x, weight, bias, *trained)  # type: ignore[no-untyped-call]
    return result


class _RoundToFractions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fractions: Tensor, thresholds: Tensor) -> Tensor:
        step = torch.exp2(-torch.round(fractions))
        value = torch.clamp(x, -thresholds, thresholds)
        level = torch.div(value, step).round_().mul_(step).minimum((thresholds - step).clamp_(min=0))
        ctx.save_for_backward(level - value, value == x)
        return level

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        error, within = ctx.saved_tensors
        return grads[0] * within, grads[0] * error * -math.log(2), None


def round_to_fractions(x: Tensor, fractions: Tensor, thresholds: Tensor) -> Tensor:
    """Each of `x`, `(n,)`, rounded to its own number of bits behind the point, within its own `-t … t - step`.

    Backward: straight-through for `x`, within `-t … t`. A rounding error `d` shrinks by half with each bit, hence
    `∂d/∂f = -ln 2 · d` for the fraction bits `f`: the surrogate of HGQ (Sun et al. 2024), which takes errors as spread
    evenly over a step. What an `x` beyond `t` is clipped by has no part in it.

    Args:
        x: real values.
        fractions: real, rounded to a whole number of bits.
        thresholds: powers of two.
    """
    rounded: Tensor = _RoundToFractions.apply(x, fractions, thresholds)  # type: ignore[no-untyped-call]
    return rounded


def recomputed(y: Tensor, x: Tensor, grid: AnyGrid) -> AbstractContextManager[None]:
    """Let operations inside keep `x`, as the quantizer does anyway, where they would keep `y = fake_quantize(x, grid)`.

    `y` may have been flattened since. Backward quantizes `x` again, which costs little beside the layer that reads it.
    Small tensors are kept, and those of mixed precision, whose `x` was converted.
    """
    if y.numel() < RECOMPUTED or y.dtype != x.dtype or not torch.is_grad_enabled() or isinstance(grid, TrainedGrids):
        return nullcontext()
    x, values = x.detach(), grid.values if isinstance(grid, TrainedGrid) else grid
    address, size, shape = y.data_ptr(), y.numel(), y.shape

    def pack(kept: Tensor) -> Any:
        return (kept.shape, kept.stride()) if (kept.data_ptr(), kept.numel()) == (address, size) else kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return _on(values, x).reshape(shape).as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


def initial_gap(pairs: int) -> float:
    """How far the first logit of a tensor is above each of the others, initially."""
    return math.log(INITIAL_SHARE * (pairs - 1) / (1 - INITIAL_SHARE))


class HMQ(nn.Module):
    """The HMQ blocks of all tensors of a network, evaluated in one batch.

    One trainable logit per tensor and pair: `logits` is `(tensors, pairs)`, by falling threshold, then rising
    bit-width. The search space of each tensor is `{2^M, …, 2^(M-8)} x B`; where B is smaller than that of others,
    the pairs that are missing have a logit of -inf.

    Args:
        signed: per tensor, whether its format is signed.
        max_threshold_log2: per tensor, M.
        bits: per tensor, B in ascending order.
        prices: per cost that `expected_costs` tells, and per tensor, what a bit costs.
    """

    table: Tensor
    costs: Tensor  # of a tensor by pair, `(costs, tensors * pairs)`

    def __init__(
        self,
        signed: Sequence[bool],
        max_threshold_log2: Sequence[int],
        bits: Sequence[Sequence[int]],
        prices: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__()
        self._signed, self._m = tuple(signed), tuple(max_threshold_log2)
        self._prices = torch.tensor(prices, dtype=torch.float64).view(len(prices), len(bits), 1)
        self._choices = max(len(b) for b in bits)
        logits = torch.full((len(bits), THRESHOLDS, self._choices), -math.inf)
        for tensor, b in zip(logits, bits, strict=True):
            pairs = THRESHOLDS * len(b)
            tensor[:, : len(b)] = math.log((1 - INITIAL_SHARE) / (pairs - 1))
            tensor[0, len(b) - 1] += initial_gap(pairs)
        self.logits = nn.Parameter(logits.flatten(1))
        self.set_bits(bits)

    def set_bits(self, bits: Sequence[Sequence[int]]) -> None:
        """Replace B of every tensor, keeping the logits: R_a changes the bit-width of activations (Eq. 11)."""
        self.candidates = [
            [
                [Fixed.from_threshold(signed=s, bits=b, threshold_log2=m - k) for b in tensor_bits]
                for k in range(THRESHOLDS)
            ]
            for s, m, tensor_bits in zip(self._signed, self._m, bits, strict=True)
        ]
        table = torch.zeros(len(bits), THRESHOLDS, self._choices, 4)
        for tensor, block in zip(table, self.candidates, strict=True):
            tensor[:, : len(block[0])] = torch.tensor([[(*Grid.of(f), f.width) for f in row] for row in block])
        table = table.flatten(1, 2)
        self.register_buffer("table", table[:, :, :3].contiguous().to(self.logits), persistent=False)
        costs = (self._prices * table[:, :, 3]).flatten(1)
        self.register_buffer("costs", costs.to(self.logits), persistent=False)

    def sample(self, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """One draw of the joint distribution over pairs, `(tensors, pairs)` (Eq. 4); `generator` is the CPU's."""
        return _drawn(self.logits, temperature, generator)

    def sample_slices(
        self, temperature: float, slices: Sequence[int], generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """As many draws for each tensor as it has slices, `(slices, pairs)`."""
        return [
            _drawn(logits.expand(n, -1), temperature, generator)
            for logits, n in zip(self.logits.unbind(), slices, strict=True)
        ]

    def grids(self, p: Tensor) -> list[TrainedGrid]:
        """Expected step and levels of each tensor under `p` (Eq. 5–6).

        The levels are linear in threshold and step, so these are `-t̂` and `t̂ - Δ̂`.
        """
        expected = (p.unsqueeze(2) * self.table).sum(1)
        pairs = zip(expected.unbind(), expected.tolist(), strict=True)
        return [TrainedGrid(tensor, Grid(*values)) for tensor, values in pairs]

    def grids_of_slices(self, p: Sequence[Tensor], dims: Sequence[int]) -> list[TrainedGrids]:
        """The same of each slice of each tensor, along a dimension of it."""
        return [TrainedGrids(of @ table, dim) for of, table, dim in zip(p, self.table, dims, strict=True)]

    def expected_costs(self, p: Tensor) -> list[Tensor]:
        """Each cost of all tensors together under `p`, 0-d: with sizes as prices the bits of Eq. 7."""
        return [torch.dot(p.flatten(), costs) for costs in self.costs]

    def probabilities(self) -> Tensor:
        """The distribution over pairs without noise, `(tensors, pairs)`."""
        return torch.softmax(self.logits, dim=1)

    def chosen(self) -> list[Fixed]:
        """The format of each tensor's most probable pair: what evaluation and phase two use."""
        best = self.logits.argmax(1).tolist()
        return [block[i // self._choices][i % self._choices] for block, i in zip(self.candidates, best, strict=True)]


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    minus_gumbel = torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=generator).log_()
    return torch.softmax((logits - minus_gumbel.to(logits.device)) / temperature, dim=1)


def least_threshold_log2(maximum: float) -> int:
    """The least M with `2^M >= maximum`; 0 for a tensor that is zero."""
    if maximum <= 0:
        return 0
    mantissa, exponent = math.frexp(maximum)
    return exponent - (mantissa == 0.5)
