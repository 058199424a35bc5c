"""Fake quantization, and the HMQ block that searches for its parameters.

Equation numbers are those of Habi, Jennings, Netzer, "HMQ: Hardware Friendly Mixed Precision Quantization
Block for CNNs" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hmq_fpga.ir.fixed import Fixed

THRESHOLDS = 9  # candidates per tensor: 2^M … 2^(M-8)
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


class _FakeQuantize(torch.autograd.Function):
    """`clip(step * round(x / step), lo, hi)`, with exact derivatives but for the rounding.

    Keeps `x`, which the layer before it keeps anyway, and computes the rest again. `trained` is the grid as a
    tensor, or None for constants. Comparisons that make booleans cost several times what fused kernels on floats do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor | None, grid: Grid) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x)
        ctx.grid = grid
        return torch.div(x, grid.step).round_().mul_(grid.step).clamp_(grid.lo, grid.hi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        step, lo, hi = ctx.grid
        scaled = torch.div(x, step)
        rounded = torch.round(scaled)
        level = rounded * step
        real = np.float64 if x.dtype == torch.float64 else np.float32
        below, above = (float(np.nextafter(real(end), real(to))) for end, to in ((lo, -np.inf), (hi, np.inf)))
        inside = torch.ops.aten.hardtanh_backward(grad, level, below, above)  # strictly between them: ends included
        by_grid = None
        if ctx.needs_input_grad[1]:
            outside = grad - inside
            by_hi = torch.ops.aten.threshold_backward(outside, level, hi).sum()
            by_step = torch.dot(inside.flatten(), rounded.sub_(scaled).flatten())
            by_grid = torch.stack((by_step, outside.sum() - by_hi, by_hi))
        return (inside if ctx.needs_input_grad[0] else None), by_grid, None


def fake_quantize(x: Tensor, grid: Grid | Tensor) -> Tensor:
    """Quantize `x` of any shape to `grid` (Eq. 2–3, with the hardware's two's-complement clip).

    `grid` is constant, or a tensor `(3,)` of step and smallest and largest level, which gets a gradient. Half
    precision, as mixed-precision training makes it, is computed and returned in float32.

    Backward: straight-through for the rounding only. Gradient reaches every `x` whose rounded level lies within
    `lo … hi`, end levels included; with respect to the step it is `round(x / step) - x / step` there, and with
    respect to `lo` and `hi` it is one where `x` is clipped to them. By `lo = -t`, `hi = t - step` these are the
    exact derivatives with respect to the step and the threshold `t`.
    """
    if x.dtype.itemsize < 4:
        x = x.float()
    if isinstance(grid, Tensor):
        return _FakeQuantize.apply(x, grid, Grid(*grid.tolist()))
    return _FakeQuantize.apply(x, None, grid)


class HMQ(nn.Module):
    """The HMQ blocks of several tensors, evaluated in one batch.

    One trainable logit per tensor and pair (threshold, bit-width): `logits` is `(tensors, thresholds, bit-widths)`.
    The search space of each tensor is `{2^M, …, 2^(M-8)} x B`; all tensors of a bank have equally many candidates.

    Args:
        signed: per tensor, whether its format is signed.
        max_threshold_log2: per tensor, M.
        bits: per tensor, B in ascending order.
    """

    table: Tensor
    widths: Tensor

    def __init__(
        self, signed: Sequence[bool], max_threshold_log2: Sequence[int], bits: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self._signed, self._m = tuple(signed), tuple(max_threshold_log2)
        pairs = THRESHOLDS * len(bits[0])
        logits = torch.full((len(bits), THRESHOLDS, len(bits[0])), math.log((1 - INITIAL_SHARE) / (pairs - 1)))
        logits[:, 0, -1] = math.log(INITIAL_SHARE)
        self.logits = nn.Parameter(logits)
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
        like_logits = {"dtype": self.logits.dtype, "device": self.logits.device}
        table = [[Grid.of(f) for row in block for f in row] for block in self.candidates]
        self.register_buffer("table", torch.tensor(table, **like_logits), persistent=False)
        widths = torch.tensor(bits, **like_logits)
        self.register_buffer("widths", widths, persistent=False)

    def sample(self, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """One draw of the joint distribution over pairs, `(tensors, thresholds, bit-widths)` (Eq. 4)."""
        log_p = torch.log_softmax(self.logits.flatten(1), dim=1)
        gumbel = -torch.empty_like(log_p).exponential_(generator=generator).log_()
        return torch.softmax((log_p + gumbel) / temperature, dim=1).view_as(self.logits)

    def grids(self, p: Tensor) -> tuple[Tensor, ...]:
        """Expected step and levels of each tensor under `p`, `(3,)` each (Eq. 5–6).

        The levels are linear in threshold and step, so these are `-t̂` and `t̂ - Δ̂`.
        """
        return (p.flatten(1).unsqueeze(2) * self.table).sum(1).unbind()

    def expected_bits(self, p: Tensor) -> Tensor:
        """Expected bit-width of each tensor under `p`, `(tensors,)`."""
        return (p.sum(1) * self.widths).sum(1)

    def probabilities(self) -> Tensor:
        """The distribution over pairs without noise, `(tensors, thresholds, bit-widths)`."""
        return torch.softmax(self.logits.flatten(1), dim=1).view_as(self.logits)

    def chosen(self) -> list[Fixed]:
        """The format of each tensor's most probable pair: what evaluation and phase two use."""
        best = self.logits.flatten(1).argmax(1).tolist()
        n_bits = self.logits.shape[2]
        return [block[i // n_bits][i % n_bits] for block, i in zip(self.candidates, best, strict=True)]


def least_threshold_log2(maximum: float) -> int:
    """The least M with `2^M >= maximum`; 0 for a tensor that is zero."""
    if maximum <= 0:
        return 0
    mantissa, exponent = math.frexp(maximum)
    return exponent - (mantissa == 0.5)
