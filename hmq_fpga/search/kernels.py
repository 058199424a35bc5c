"""The arithmetic of a uniform quantizer and of an optimizer: one pass over memory forward, one backward, one to step.

On a CPU these are compiled loops, on other devices plain tensor operations.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

BLOCK = 4096  # values whose sums are taken in their own precision, before they are added in double
PART = 1 << 17  # values for which a further thread is worth its start
MAGNITUDES = 257  # zero, and the least m of 2^m >= |x| from -126 to 129, the last for NaN

Array = np.ndarray[Any, Any]
Vectors = tuple[Tensor, Tensor, Tensor, Tensor]
Sums = tuple[float, float, float]  # gradients of step, lo and hi

# Sums may be reordered and multiply-adds fused, so that loops run on vectors; NaN and infinity keep their meaning.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function, which is kept on disk where a folder can be written."""
    try:
        compiled: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        compiled = njit(**_OPTIONS)(function)
    return compiled


def quantize(x: Tensor, step: float, lo: float, hi: float) -> Tensor:
    """`clip(step * round(x / step), lo, hi)`, ties to even, of `x` of any shape."""
    if not x.is_cpu:
        return _plain_quantize(x, step, lo, hi)
    x = _dense(x)
    y = torch.empty_like(x)
    _over(_quantize, (_values(x), _values(y)), (step, lo, hi))
    return y


def gradients(
    x: Tensor, grad: Tensor, step: float, lo: float, hi: float, floor: float, *, spend: bool = False
) -> tuple[Tensor, list[float]]:
    """What `quantize` of `max(x, floor)` passes back of `grad`, with a straight-through rounding.

    `spend`: `grad` is not needed any more, its memory may become the result's.

    Returns:
        The gradient of `x`: `grad` where the rounded level lies within `lo … hi`, else zero; and those of `step`, `lo`
        and `hi`.
    """
    if not x.is_cpu:
        return _plain_gradients(x, grad, step, lo, hi, floor)
    x = _dense(x)
    grad = grad.detach() if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad.detach())
    passed = grad if spend else torch.empty_like(x)
    arrays, grid = (_values(x), _values(grad), _values(passed)), (step, lo, hi, floor)
    parts = _over(_gradients_in_place, arrays[:2], grid) if spend else _over(_gradients, arrays, grid)
    return passed, [sum(part) for part in zip(*parts, strict=True)]


def quantize_each(x: Tensor, step: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """As `quantize`, each element of `x` to a grid of its own: tensors of the shape of `x`."""
    return torch.div(x.detach(), step).round_().mul_(step).clamp_(lo, hi)


def gradient_each(x: Tensor, grad: Tensor, step: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """What `quantize_each` passes back of `grad`: as `gradients` does, of `x` alone."""
    level = torch.div(x.detach(), step).round_().mul_(step)
    return grad.masked_fill((level > hi).logical_or_(level < lo), 0)


def descend(vectors: Vectors, betas: tuple[float, float], factor: float, eps: float | None) -> None:
    """Adam's step on contiguous vectors: value, gradient, and its running mean and mean square, all changed in place.

    `factor` is the learning rate with all corrections. Without `eps` the step is along the mean as it is. The gradient
    is zero afterwards.
    """
    if not vectors[0].is_cpu:
        _plain_descend(vectors, betas, factor, eps)
        return
    arrays = tuple(vector.detach().numpy() for vector in vectors)
    _over(_descend, arrays, (1 - betas[0], 1 - betas[1], factor, eps or 0.0, eps is not None))


def magnitudes(x: Tensor) -> Array:
    """How many values of `x`, of any shape, are zero, and how many need which threshold as float32.

    Returns:
        Counts `(MAGNITUDES,)`: at 0 of zeros, at `m + 127` of those with `2^(m-1) < |x| <= 2^m`.
    """
    x = x.detach().float()
    if not x.is_cpu:
        return np.asarray(torch.bincount(_plain_magnitudes(x), minlength=MAGNITUDES).numpy(force=True))
    counts: Array = np.sum(_over(_count, (_values(_dense(x)).view(np.int32),), ()), axis=0)
    return counts


def _dense(x: Tensor) -> Tensor:
    """`x`, or a copy, without gaps between its values in memory, in whatever order its dimensions are."""
    x = x.detach()
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _values(x: Tensor) -> Array:
    """Of a dense tensor, in the order of memory."""
    return x.as_strided((x.numel(),), (1,)).numpy()


def _plain_magnitudes(x: Tensor) -> Tensor:
    """Place of each value: the exponent of a float, less the last bit so that a power of two belongs to those below."""
    return (((x.contiguous().view(torch.int32) & 0x7FFFFFFF) - 1 >> 23) + 1).flatten()


def _plain_quantize(x: Tensor, step: float, lo: float, hi: float) -> Tensor:
    return torch.div(x, step).round_().mul_(step).clamp_(lo, hi)


def _plain_gradients(
    x: Tensor, grad: Tensor, step: float, lo: float, hi: float, floor: float
) -> tuple[Tensor, list[float]]:
    value = x.clamp(min=floor)
    level = torch.div(value, step).round_().mul_(step)
    above, below = level > hi, level < lo
    inside = grad.masked_fill(above | below, 0)
    by_step = torch.dot(inside.flatten(), (level - value).flatten()) / step
    by_grid = torch.stack((by_step, grad.masked_fill(~below, 0).sum(), grad.masked_fill(~above, 0).sum()))
    return inside.masked_fill(x <= floor, 0), by_grid.tolist()


def _plain_descend(vectors: Vectors, betas: tuple[float, float], factor: float, eps: float | None) -> None:
    value, grad, mean, square = vectors
    mean.lerp_(grad, 1 - betas[0])
    square.lerp_(grad.square_(), 1 - betas[1])
    if eps is None:
        value.add_(mean, alpha=-factor)
    else:
        value.addcdiv_(mean, torch.sqrt(square, out=grad).add_(eps), value=-factor)
    grad.zero_()


def _over(kernel: Callable[..., Any], arrays: tuple[Array, ...], numbers: tuple[float, ...]) -> list[Any]:
    """Results of a kernel on parts of arrays of one size, as many as PyTorch has threads to spare."""
    n = arrays[0].size
    if n < 2 * PART or (threads := min(torch.get_num_threads(), n // PART)) == 1:
        return [kernel(*arrays, *numbers)]
    bounds = [n * i // threads for i in range(threads + 1)]

    def part(i: int) -> Any:
        return kernel(*(array[bounds[i] : bounds[i + 1]] for array in arrays), *numbers)

    return list(_pool(threads).map(part, range(threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantizer")


@_loop
def _count(bits: Array) -> Array:
    counts = np.zeros((4, MAGNITUDES), np.int64)  # equal neighbours would wait for each other
    for i in range(bits.size):
        counts[i & 3, ((bits[i] & 0x7FFFFFFF) - 1 >> 23) + 1] += 1
    total: Array = counts.sum(0)
    return total


@_loop
def _quantize(x: Array, y: Array, step: float, lo: float, hi: float) -> None:
    real = x.dtype.type
    step, lo, hi = real(step), real(lo), real(hi)
    for i in range(x.size):
        level = np.rint(x[i] / step) * step
        if level < lo:
            level = lo
        if level > hi:
            level = hi
        y[i] = level


@njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]  # so that what is written in place is known to be
def _gradients_of_block(x: Array, grad: Array, passed: Array, step: float, lo: float, hi: float, floor: float) -> Sums:
    zero = x.dtype.type(0)
    by_step = by_lo = by_hi = zero
    for i in range(x.size):
        value = x[i] if x[i] > floor else floor
        level = np.rint(value / step) * step
        below = grad[i] if level < lo else zero
        above = grad[i] if level > hi else zero
        inside = grad[i] - below - above
        by_step += inside * (level - value)
        by_lo += below
        by_hi += above
        passed[i] = inside if x[i] > floor else zero
    return by_step / step, by_lo, by_hi


@_loop
def _gradients(x: Array, grad: Array, passed: Array, step: float, lo: float, hi: float, floor: float) -> Sums:
    real = x.dtype.type
    by_step = by_lo = by_hi = 0.0
    for start in range(0, x.size, BLOCK):
        block = slice(start, min(start + BLOCK, x.size))
        sums = _gradients_of_block(x[block], grad[block], passed[block], real(step), real(lo), real(hi), real(floor))
        by_step += sums[0]
        by_lo += sums[1]
        by_hi += sums[2]
    return by_step, by_lo, by_hi


@_loop
def _gradients_in_place(x: Array, grad: Array, step: float, lo: float, hi: float, floor: float) -> Sums:
    real = x.dtype.type
    by_step = by_lo = by_hi = 0.0
    for start in range(0, x.size, BLOCK):
        block = slice(start, min(start + BLOCK, x.size))
        part = grad[block]
        sums = _gradients_of_block(x[block], part, part, real(step), real(lo), real(hi), real(floor))
        by_step += sums[0]
        by_lo += sums[1]
        by_hi += sums[2]
    return by_step, by_lo, by_hi


@_loop
def _descend(
    value: Array,
    grad: Array,
    mean: Array,
    square: Array,
    new1: float,
    new2: float,
    factor: float,
    eps: float,
    adaptive: bool,
) -> None:
    real = value.dtype.type
    new1, new2, factor, eps, zero = real(new1), real(new2), real(factor), real(eps), real(0)
    for i in range(value.size):
        mean[i] += new1 * (grad[i] - mean[i])
        square[i] += new2 * (grad[i] * grad[i] - square[i])
        grad[i] = zero
        value[i] -= factor * (mean[i] / (np.sqrt(square[i]) + eps) if adaptive else mean[i])
