"""Whether an input drives a value of a network to a level: by branch and bound over what its quantizers do.

To the variables of a `Relaxation` come the sums that are quantized, and for each end at which a quantizer can saturate
a binary variable that says whether it does (as in Tjeng et al., arXiv:1711.07356). HiGHS, as `scipy.optimize.milp`,
then finds a point or none.

It computes in floating point. So each inequality is relaxed by `SPARE`, and the level by half a code: what an input
really does satisfies all of them, in integers, with that to spare, which is ten thousand times the tolerance to which
HiGHS keeps inequalities. A point need not be an input that does it, since inputs and codes in between are any real
number there: that is for the caller to see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from hmq_fpga.deploy.bounds import Relaxation, Step
from hmq_fpga.ir.fixed import Codes

SPARE = 1 / 64  # of a code, or of what an inequality was multiplied by
WORK = 4e7  # of one search, nodes times the entries of its matrix to the power 1.5: up to some four seconds
LEAST_NODES = 200  # a search of fewer is not begun
_WHOLE = 25  # nodes for one where all is whole
_INFEASIBLE = 2  # status of `milp`


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What came of a search.

    Attributes:
        state: whether no input reaches the level, a point of the relaxed network does, or the search was given up.
        inputs: codes of all inputs in a row at that point, rounded.
    """

    state: Literal["excluded", "point", "open"]
    inputs: Codes | None = None


def reach(relaxation: Relaxation, tensor: str, element: int, sign: int, level: int, *, whole: bool = False) -> Reach:
    """Whether `sign` times a value can be `level` or more; the search is given up after `WORK`.

    Args:
        relaxation: of the network.
        tensor: whose `bounds` were computed.
        element: the value, counted in a row.
        sign: 1 to drive it up, -1 to drive it down.
        level: a code, times `sign`.
        whole: whether inputs and codes in between are whole numbers, too; which takes many more nodes.
    """
    values = relaxation.tensors[tensor]
    row = values.matrix.getrow(element)
    target = {int(v): sign * int(c) for v, c in zip(row.indices, row.data, strict=True)}
    program, columns = _program(relaxation, target)
    program.add(
        {columns[v]: c for v, c in target.items()}, level - sign * int(values.constant[element]) - 0.5, math.inf
    )
    nodes = int(WORK / sum(map(len, program.rows)) ** 1.5)
    if nodes < LEAST_NODES:
        return Reach(state="open")
    if whole:
        program.whole += columns.values()
    state, point = program.solved(nodes // _WHOLE if whole else nodes)
    return Reach(state=state, inputs=None if point is None else _inputs(relaxation, columns, point))


@dataclass
class _Program:
    """Linear constraints; some of the variables are whole."""

    lo: list[int] = field(default_factory=list)
    hi: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rows: list[Mapping[int, int]] = field(default_factory=list)
    limits: list[tuple[float, float]] = field(default_factory=list)

    def variable(self, lo: int, hi: int) -> int:
        self.lo.append(lo)
        self.hi.append(hi)
        return len(self.lo) - 1

    def add(self, terms: Mapping[int, int], lo: float, hi: float) -> None:
        self.rows.append(terms)
        self.limits.append((lo - SPARE, hi + SPARE))

    def solved(self, nodes: int) -> tuple[Literal["excluded", "point", "open"], npt.NDArray[np.float64] | None]:
        """A point; None where there is none, or none was found."""
        lengths = np.cumsum([0, *map(len, self.rows)])
        indices = np.concatenate([np.fromiter(row, np.int64, len(row)) for row in self.rows])
        data = np.array([float(c) for row in self.rows for c in row.values()])
        matrix = csr_matrix((data, indices, lengths), shape=(len(self.rows), len(self.lo)))
        solved = milp(
            np.zeros(len(self.lo)),
            constraints=LinearConstraint(matrix, *np.array(self.limits).T),
            bounds=Bounds(self.lo, self.hi),
            integrality=np.isin(np.arange(len(self.lo)), self.whole).astype(int),
            options={"node_limit": nodes},
        )
        if solved.status == _INFEASIBLE:
            return "excluded", None
        return ("open", None) if solved.x is None else ("point", solved.x)

    def quantizer(self, step: Step, columns: Mapping[int, int]) -> None:
        """Of a sum and its code: within half a code of each other, but for saturation."""
        total = self.variable(step.low - step.constant, step.high - step.constant)
        self.add({**{columns[v]: c for v, c in step.terms.items()}, total: -1}, 0, 0)
        unit, codes, q = step.step.denominator, step.step.numerator, columns[step.q]
        span = step.q_high - step.q_low
        for sign, end, low in ((1, step.q_low, step.low), (-1, step.q_high, -step.high)):
            # `rise`, codes from this end, is at most `above`, the sum's way from half a code before it; both doubled
            rise, above = {q: 2 * sign * codes}, {total: 2 * sign * unit}
            offset = -2 * sign * codes * end
            constant = 2 * sign * unit * step.constant + offset + codes
            least = 2 * unit * low + offset + codes
            limit = {**rise, **{v: -c for v, c in above.items()}}
            if least < 0:
                binary = self.variable(0, 1)
                self.whole.append(binary)
                limit[binary] = least
                self.add({**rise, binary: 2 * codes * span}, -math.inf, 2 * codes * span - offset)
            self.add(limit, -math.inf, constant - offset)


def _program(relaxation: Relaxation, target: Mapping[int, int]) -> tuple[_Program, dict[int, int]]:
    """The part of a relaxation that a value depends on, and its variables' columns there."""
    program, kept = _Program(), sorted(_cone(relaxation, target))
    columns = {v: program.variable(relaxation.lo[v], relaxation.hi[v]) for v in kept}
    steps = {step.q: step for step in relaxation.steps if step.q in columns}
    for step in steps.values():
        program.quantizer(step, columns)
    for terms, most in zip(relaxation.rows, relaxation.limits, strict=True):
        if (last := max(terms)) in columns and last not in steps:
            program.add({columns[v]: c for v, c in terms.items()}, -math.inf, most)
    return program, columns


def _cone(relaxation: Relaxation, target: Mapping[int, int]) -> set[int]:
    """The variables that a value depends on: a row bounds its last variable by the others."""
    by_last: dict[int, list[int]] = {}
    for number, row in enumerate(relaxation.rows):
        by_last.setdefault(max(row), []).append(number)
    kept, left = set(target), sorted(target)
    while left:
        for number in by_last.get(left.pop(), ()):
            new = relaxation.rows[number].keys() - kept
            kept |= new
            left += new
    return kept


def _inputs(relaxation: Relaxation, columns: Mapping[int, int], point: npt.NDArray[np.float64]) -> Codes:
    """Codes of all inputs in a row; those that do not matter are zero, or what is nearest to it."""
    parts = []
    for op in relaxation.net.inputs:
        codes = np.clip(np.zeros(math.prod(op.shape), np.int64), op.format.lo, op.format.hi)
        if op.name in relaxation.tensors:
            for i, variable in enumerate(relaxation.tensors[op.name].matrix.indices.tolist()):
                if variable in columns:
                    codes[i] = round(point[columns[variable]])
        parts.append(codes)
    return np.concatenate(parts)
