"""Whether an input drives a value of a network to a level: a program for `branch` of what its quantizers do.

To the variables of a `Relaxation` come binary ones that say whether a quantizer saturates at an end (as in Tjeng et
al., arXiv:1711.07356), only where it matters: of what is to be large an upper bound is enough, and so of what it reads,
by the signs of the weights. In all, what no input does is excluded, but a point need not be an input that does it,
since inputs and codes in between may be any real number: that is for the caller to see.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from hmq_fpga.deploy.bounds import Relaxation, Step
from hmq_fpga.deploy.branch import Program, Search
from hmq_fpga.ir.fixed import Codes

Sides = Mapping[int, set[int]]  # by variable, whether it is to be bounded from above (1) or from below (-1)


class Reach:
    """A search for inputs with which `sign` times a value is `level` or more.

    Attributes:
        search: over the points of the relaxed network.
    """

    def __init__(self, relaxation: Relaxation, tensor: str, element: int, sign: int, level: int) -> None:
        """Set out.

        Args:
            relaxation: of the network.
            tensor: whose `bounds` were computed.
            element: the value, counted in a row.
            sign: 1 to drive it up, -1 to drive it down.
            level: a code, times `sign`.
        """
        values = relaxation.tensors[tensor]
        row = values.matrix.getrow(element)
        target = {int(v): sign * int(c) for v, c in zip(row.indices, row.data, strict=True)}
        program, self._columns = _program(relaxation, target)
        self._relaxation = relaxation
        objective = {self._columns[v]: c for v, c in target.items()}
        self.search = Search(program, objective, level - sign * int(values.constant[element]))

    @property
    def inputs(self) -> Codes:
        """The codes of all inputs in a row, rounded, at the points of the search: `(n, values)`.

        Those that do not matter are zero, or what is nearest to it.
        """
        points, parts = self.search.points, []
        for op in self._relaxation.net.inputs:
            codes = np.full((len(points), math.prod(op.shape)), np.clip(0, op.format.lo, op.format.hi), np.int64)
            if op.name in self._relaxation.tensors:
                for i, variable in enumerate(self._relaxation.tensors[op.name].matrix.indices.tolist()):
                    if variable in self._columns:
                        codes[:, i] = np.rint(points[:, self._columns[variable]])
            parts.append(codes)
        return np.concatenate(parts, axis=1)


def _program(relaxation: Relaxation, target: Mapping[int, int]) -> tuple[Program, dict[int, int]]:
    """The part of a relaxation that bounds a value from above, and its variables' columns there."""
    steps = {step.q: step for step in relaxation.steps}
    rows = defaultdict(list)
    for terms, limit in zip(relaxation.rows, relaxation.limits, strict=True):
        if (last := max(terms)) not in steps:
            rows[last].append((terms, limit))
    sides: dict[int, set[int]] = defaultdict(set)
    _mark(sides, target, 1)
    program, found = Program(), []
    for variable in range(len(relaxation.lo) - 1, -1, -1):
        for side in sorted(sides.get(variable, ())):
            if variable in steps:
                _mark(sides, steps[variable].terms, side)
            for terms, limit in rows[variable]:
                if terms[variable] * side > 0:
                    _mark(sides, {v: -c for v, c in terms.items() if v != variable}, 1)
                    found.append((terms, limit))
    columns = {v: program.variable(relaxation.lo[v], relaxation.hi[v]) for v in sorted(sides)}
    inputs = {int(v) for op in relaxation.net.inputs for v in relaxation.tensors[op.name].matrix.indices}
    if all(variable in inputs or variable in steps or rows[variable] for variable in sides):
        program.decisive = [columns[v] for v in sides if v in inputs]
    for variable, wanted in sorted(sides.items()):
        for side in sorted(wanted) if variable in steps else ():
            _saturating(program, steps[variable], columns, side)
    for terms, limit in found:
        program.add({columns[v]: c for v, c in terms.items()}, limit)
    return program, columns


def _mark(sides: dict[int, set[int]], terms: Mapping[int, int], side: int) -> None:
    """Bounding a sum from one side takes bounds of its terms, by their signs."""
    for variable, c in terms.items():
        sides[variable].add(side if c > 0 else -side)


def _saturating(program: Program, step: Step, columns: Mapping[int, int], side: int) -> None:
    """A quantizer's code is at most half a code beyond its sum, but for saturation at the end that this passes."""
    unit, codes, q = step.step.denominator, step.step.numerator, columns[step.q]
    end, low = (step.q_low, step.low) if side > 0 else (step.q_high, -step.high)
    # `rise`, codes from this end, is at most the sum's way from half a code before it; both doubled
    rise = {q: 2 * side * codes}
    offset = -2 * side * codes * end
    limit = {**rise, **{columns[v]: -2 * side * unit * c for v, c in step.terms.items()}}
    least = 2 * unit * low + offset + codes
    if least < 0:
        limit[program.binary()] = least
        span = step.q_high - step.q_low
        program.add({**rise, program.binaries[-1]: 2 * codes * span}, 2 * codes * span - offset)
    program.add(limit, 2 * side * unit * step.constant + offset + codes)
