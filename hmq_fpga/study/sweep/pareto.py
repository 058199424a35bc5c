"""What lies on the frontier: axes of the comparison, seeds taken together, and the choices that nothing beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import sqrt
from statistics import fmean, variance
from typing import Any, Literal

from hmq_fpga.study.run.config import bounds_in, told

Row = Mapping[str, Any]

STAGES = ("impl", "rtl_impl", "route", "vsynth", "csynth", "yosys", "trace", "model")  # the most telling first


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A figure of a run.

    Attributes:
        key: column of the table.
        label: what stands at the axis.
        better: which direction is.
        scale: of the value as it is shown.
    """

    key: str
    label: str
    better: Literal["more", "less"]
    scale: float = 1.0


ACCURACY = Axis(key="qnet_accuracy", label="test accuracy, %", better="more", scale=100.0)
ERROR = Axis(key="qnet_mse", label="test squared error", better="less")
LOSS = Axis(key="qnet_loss", label="test loss", better="less")
RATE = Axis(key="rw_actual", label="actual R_w", better="more")
BOPS = Axis(key="bops", label="bits · MACs", better="less")
_OTHERS = (
    Axis(key="ra_actual", label="actual R_a", better="more"),
    Axis(key="ebops", label="EBOPs", better="less"),
    Axis(key="weight_bits", label="bits of weights", better="less"),
    Axis(key="zero_weights", label="zero weights, %", better="more", scale=100.0),
)
_RESOURCES = {
    "lut": "LUT",
    "ff": "FF",
    "dsp": "DSP",
    "bram": "BRAM",
    "latency_cycles": "latency, cycles",
    "latency_ns": "latency, ns",
    "fmax_mhz": "Fmax, MHz",
}
_MORE = {"fmax_mhz"}  # of them, those that are better where they are more


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs that differ in their seed only.

    Attributes:
        method, asked, ra: what they have in common; the bounds on the weights in words, and R_a.
        rows: their rows of the table.
    """

    method: str
    asked: str
    ra: float
    rows: tuple[Row, ...]

    def values(self, axis: Axis) -> list[float] | None:
        """A figure of each run as it is shown; None where one is unknown."""
        known = [axis.scale * row[axis.key] for row in self.rows if row.get(axis.key) is not None]
        return known if len(known) == len(self.rows) else None

    def spread(self, axis: Axis) -> tuple[float, float, float] | None:
        """Mean, least and largest value of a figure; None where one is unknown."""
        values = self.values(axis)
        if not values:
            return None
        low, high = min(values), max(values)
        return min(max(fmean(values), low), high), low, high  # a rounded mean stays within


def groups(rows: Iterable[Row]) -> list[Group]:
    """Finished runs by method and targets, in the order of the table."""
    found: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        if row["state"] == "done":
            found.setdefault((row["method"], asked(row), row["ra_target"]), []).append(row)
    return [Group(method=m, asked=a, ra=ra, rows=tuple(members)) for (m, a, ra), members in found.items()]


def asked(row: Row) -> str:
    """The bounds on the weights of a run, in words."""
    return told(bounds_in(row, "_target"))


def lut_axis(rows: Sequence[Row]) -> Axis | None:
    """LUTs by the stage that knows most of the runs; figures of different stages do not compare."""
    known = {stage: sum(row.get(f"{stage}_lut") is not None for row in rows) for stage in STAGES}
    stage = max(STAGES, key=lambda stage: known[stage])  # the first of equals
    return Axis(key=f"{stage}_lut", label=f"LUT ({stage})", better="less") if known[stage] else None


def score_axis(rows: Iterable[Row]) -> Axis:
    """What the runs are judged by: accuracy, of a regression the squared error, of several targets the loss."""
    kept = list(rows)
    return next((axis for axis in (ERROR, LOSS) if any(row.get(axis.key) is not None for row in kept)), ACCURACY)


def axes(rows: Sequence[Row]) -> list[Axis]:
    """All figures that some run has, the usual ones first."""
    main = [RATE, lut_axis(rows), BOPS, score_axis(rows)]
    resources = [
        Axis(key=f"{stage}_{key}", label=f"{label} ({stage})", better="more" if key in _MORE else "less")
        for stage in STAGES
        for key, label in _RESOURCES.items()
    ]
    ordered = dict.fromkeys([axis for axis in main if axis] + [*_OTHERS, *resources])
    return [axis for axis in ordered if any(row.get(axis.key) is not None for row in rows)]


def front(points: Sequence[tuple[float, float] | None], x: Axis, y: Axis) -> list[int]:
    """Indices of the points that no other point beats, by rising x; None is no point.

    A point is beaten by one that is at least as good on both axes and better on one.
    """
    signs = [1 if axis.better == "more" else -1 for axis in (x, y)]
    known = [(i, signs[0] * p[0], signs[1] * p[1]) for i, p in enumerate(points) if p is not None]
    best = [i for i, a, b in known if not any((c >= a and d >= b) and (c, d) != (a, b) for _, c, d in known)]
    return sorted(best, key=lambda i: points[i] or ())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to take of a sweep, and why.

    Attributes:
        taken: the cheapest choice whose mean score is within one standard error of the best mean.
        best: the choice of the best mean score.
        error: standard error of that mean, in the units of `score`, by the variance over seeds within all choices;
            None where none has several seeds.
        cheaper: of all that cost less, the choice of the best score; None where nothing does.
        score, cost: the axes by which it was chosen.
    """

    taken: Group
    best: Group
    error: float | None
    cheaper: Group | None
    score: Axis
    cost: Axis

    def lost(self) -> float:
        """By how much the cheaper choice's score is worse, in the units of `score`."""
        return self._gain(self.taken) - self._gain(self.cheaper) if self.cheaper else 0.0

    def _gain(self, group: Group) -> float:
        return gain(group, self.score)


def gain(group: Group, axis: Axis) -> float:
    """The mean of a figure, larger where it is better."""
    return (1 if axis.better == "more" else -1) * fmean(group.values(axis) or ())


def recommended(rows: Sequence[Row]) -> Choice | None:
    """What to take, by LUTs where all choices have them, else by bits · MACs; None where nothing bit-exact is done.

    A difference of scores within the standard error is no reason to pay more.
    """
    score = score_axis(rows)
    exact = [group for group in groups(rows) if all(row["parity_passed"] for row in group.rows)]
    cost = next((axis for axis in (lut_axis(rows), BOPS) if axis and all(g.values(axis) for g in exact)), None)
    if not exact or not cost or not all(group.values(score) for group in exact):
        return None
    by_score = sorted(exact, key=lambda group: (-gain(group, score), -gain(group, cost)))
    best, error = by_score[0], _standard_error(by_score, score)
    near = [group for group in by_score if gain(group, score) >= gain(best, score) - (error or 0)]
    taken = max(near, key=lambda group: gain(group, cost))
    less = [group for group in by_score if gain(group, cost) > gain(taken, cost)]
    return Choice(taken=taken, best=best, error=error, cheaper=less[0] if less else None, score=score, cost=cost)


def _standard_error(found: Sequence[Group], axis: Axis) -> float | None:
    """Of the first group's mean; seeds scatter alike in all groups, and each of them has few."""
    several = [values for group in found if len(values := group.values(axis) or []) > 1]
    if not several:
        return None
    pooled = sum((len(v) - 1) * variance(v) for v in several) / sum(len(v) - 1 for v in several)
    return sqrt(pooled / len(found[0].rows))


def mean_front(found: Sequence[Group], x: Axis, y: Axis) -> list[int]:
    """The front of the groups' means: a lucky seed alone does not reach it."""
    means = [(a[0], b[0]) if (a := g.spread(x)) and (b := g.spread(y)) else None for g in found]
    return front(means, x, y)


def all_fronts(found: Sequence[Group], choices: Sequence[Axis]) -> dict[str, list[int]]:
    """The front for every choice of two axes, by `x|y`."""
    return {f"{x.key}|{y.key}": mean_front(found, x, y) for x, y in permutations(choices, 2)}
