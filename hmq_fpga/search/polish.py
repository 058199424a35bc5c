"""Single weights that cost less logic, once all training is done.

A product with constant weights is as many additions as the weights have nonzero signed digits, less one. Training ends
with codes as 3, which is 4 - 1, where 2 or 4 would do as well: the loss hardly depends on one of them. So each of fewer
digits is tried, and stays where nothing is lost on the data that the network was made from; then where little is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmq_fpga.ir.logic import signed_digits
from hmq_fpga.search import parallel
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import fake_quantize, grid_of
from hmq_fpga.search.train import Split, Task, evaluate, rank

SPLITS: tuple[Split, ...] = ("val", "train")  # neither of which makes up for what is lost on the other
JUDGED_BY = (2048, 16_384)  # samples of each: what the first speak against, all need not see
TRIED = 4  # changes of which one stays, or more
VALUES = 1 << 24  # that these samples have at most
TOLERANCES = (0.0, 0.0, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of rounds: shares by which the loss may grow


def within_reach(task: Task, samples: float) -> float:
    """How many weights can be changed while so many samples are computed, of those that are tried one in `TRIED`."""
    first, all_ = (sum(min(len(task.samples(split)), most) for split in SPLITS) for most in JUDGED_BY)
    return samples / (TRIED * first + all_)


class Change(NamedTuple):
    """A value of fewer signed digits.

    Attributes:
        site: of a weight.
        element: where in it.
        value: for it.
        worth: by how many codes it changes, times what it multiplies, for each digit saved: the least goes first.
    """

    site: str
    element: tuple[int, ...]
    value: float
    worth: float


class Judge:
    """Tells whether a model is as good as it was, by score and loss on samples of a split; see `train.rank`.

    Attributes:
        seen: samples so far.
    """

    def __init__(self, model: QModel, task: Task, split: Split, samples: int) -> None:
        most = min(samples, max(VALUES // math.prod(task.x_train.shape[1:]), 1))
        x, y = task.samples(split).head(most)
        self._model, self._task = model, replace(task, x_val=x, y_val=y, w_val=None, streams={})
        self.seen = 0
        self._before = self._rank()

    def accepts(self, tolerance: float) -> bool:
        """Whether the loss has grown by no more than a share; where that is zero, the score counts, too: it jumps."""
        (score, merit), (score_before, merit_before) = self._rank(), self._before
        kept = merit >= merit_before - tolerance * abs(merit_before)
        return kept and (tolerance > 0 or score >= score_before)

    def _rank(self) -> tuple[float, float]:
        self.seen += len(self._task.x_val)
        return rank(evaluate(self._model, self._task))


@torch.no_grad()
def polish(
    model: QModel, task: Task, deviations: Mapping[str, Tensor], *, enough: Callable[[], bool], samples: float
) -> int:
    """Give weights values of fewer signed digits, one by one, until it is enough: first where nothing is lost at all.

    Args:
        model: with a scheme; its weights are changed in place.
        task: whose validation and training samples judge.
        deviations: of what weights multiply, see `input_deviations`.
        enough: asked after each change that stays.
        samples: that may be computed for it.

    Returns:
        How many weights were changed.
    """
    judges = [Judge(model, task, split, most) for most, split in product(JUDGED_BY, SPLITS)]
    weights, stayed = model.weights, list[Change]()

    def one_round(tolerance: float) -> bool:
        """Whether there may be more to find, and it is wanted."""
        changed = set[tuple[str, tuple[int, ...]]]()
        for change in changes(model, deviations):
            if sum(judge.seen for judge in judges) > samples:
                return False
            if (change.site, change.element) in changed:
                continue
            weight = weights[change.site]
            before = float(weight[change.element])
            weight[change.element] = change.value
            if not all(judge.accepts(tolerance) for judge in judges):
                weight[change.element] = before
                continue
            changed.add((change.site, change.element))
            stayed.append(change)
            if enough():
                return False
        return True

    begun: tuple[float, int] | None = None
    for tolerance in TOLERANCES:
        if begun == (tolerance, len(stayed)):
            continue  # the same again
        begun = tolerance, len(stayed)
        if not one_round(tolerance):
            break
    for weight in weights.values():
        parallel.take_from_first(weight)
    return len(stayed)


def changes(model: QModel, deviations: Mapping[str, Tensor]) -> list[Change]:
    """All that save digits: for each code the nearest of fewer ones on both sides, and zero."""
    found = (_changes(model, name, weight, deviations[name]) for name, weight in model.weights.items())
    return sorted(chain.from_iterable(found), key=lambda change: change.worth)


def _changes(model: QModel, name: str, weight: Tensor, deviations: Tensor) -> list[Change]:
    tensor, found = model.scheme[name], list[Change]()
    grid = grid_of(tensor.format, tensor.widths, weight)
    values, *of_grid, multiplied = (
        torch.as_tensor(each, dtype=torch.float64).expand_as(weight).cpu().numpy()
        for each in (fake_quantize(weight.detach(), grid), *grid, deviations)
    )
    step = of_grid[0]
    codes, lo, hi = (np.rint(each / step).astype(np.int64) for each in (values, *of_grid[1:]))
    for element in zip(*(axis.tolist() for axis in codes.nonzero()), strict=True):
        code = int(codes[element])
        for other, saved in cheaper(code, int(lo[element]), int(hi[element])):
            worth = abs(other - code) * multiplied[element] / saved
            found.append(Change(name, element, other * step[element], float(worth)))
    return found


@cache
def cheaper(code: int, lo: int, hi: int) -> tuple[tuple[int, int], ...]:
    """The codes of fewer signed digits next to `code`, within `lo … hi`, and zero; and how many digits each saves."""
    others = np.arange(lo, hi + 1)
    saved = signed_digits(np.array([code])) - signed_digits(others)
    below, above = (others[(saved > 0) & side] for side in (others < code, others > code))
    nearest = {*below[-1:].tolist(), *above[:1].tolist(), 0}
    return tuple((other, int(saved[other - lo])) for other in sorted(nearest))
