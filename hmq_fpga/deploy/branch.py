"""Branch and bound over linear inequalities of whole numbers, whose every bound is certain.

A node, where some variables are held within less, is bounded by multipliers of the inequalities, which need not be the
best ones (weak duality). They come from a few steps of the primal-dual hybrid gradient method (Chambolle & Pock, J.
Math. Imaging Vis. 40, 2011, with the step sizes of Pock & Chambolle, ICCV 2011) on hundreds of nodes at once, each from
where its parent ended; for programs of a hundred variables that is some hundred times the nodes of a solver that solves
each. Multipliers are then rounded, and the bound that they give is computed in whole numbers, which float64 holds
exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

BATCH = 256  # nodes at a time, fewer of large programs:
VALUES = 200_000  # of them together
FIRST, STEPS = 100, 20  # of the gradient method, at the first node and at each other
POINTS = 32  # of a batch, that are not decided
_CHECK = 5  # steps from one bound to the next; what that refutes takes no more
_EXACT_BITS = 52
_SPARSE_COST = 8  # products of dense matrices for one of sparse ones
_VALUE_COST, _STEP_COST = 100, 10_000  # products for which the rest of a step stands
_Array = npt.NDArray[np.float32]
_Whole = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]


@dataclass
class Program:
    """Inequalities `rows @ variables <= limits` of whole numbers.

    Attributes:
        lo, hi: of each variable.
        binaries: variables of 0 and 1 that are to be whole.
        decisive: variables that decide all others, whole ones as well; empty where that is not known.
        rows: coefficients by variable.
        limits: of the rows.
    """

    lo: list[int] = field(default_factory=list)
    hi: list[int] = field(default_factory=list)
    binaries: list[int] = field(default_factory=list)
    decisive: list[int] = field(default_factory=list)
    rows: list[Mapping[int, int]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)

    def variable(self, lo: int, hi: int) -> int:
        """A new one."""
        self.lo.append(lo)
        self.hi.append(hi)
        return len(self.lo) - 1

    def binary(self) -> int:
        """A new one that is 0 or 1."""
        self.binaries.append(self.variable(0, 1))
        return self.binaries[-1]

    def add(self, terms: Mapping[int, int], limit: int) -> None:
        """A new row."""
        self.rows.append(terms)
        self.limits.append(limit)


@dataclass
class _Nodes:
    """Open nodes, one a row: bounds of the variables, and where the gradient method ended."""

    lo: _Whole
    hi: _Whole
    point: _Array
    multipliers: _Array

    def __len__(self) -> int:
        return len(self.lo)

    def take(self, which: npt.NDArray[np.int64] | _Bools | slice) -> _Nodes:
        return _Nodes(*(getattr(self, side.name)[which] for side in fields(self)))

    def joined(self, other: _Nodes) -> _Nodes:
        sides = (side.name for side in fields(self))
        return _Nodes(*(np.concatenate([getattr(self, side), getattr(other, side)]) for side in sides))


class Search:
    """Whether `objective @ variables` can be `level` or more; a search that can be continued.

    It branches on binaries first, and then on decisive variables. What it says holds if the caller tries all points.

    Attributes:
        points: of the last call of `run`, values of the variables that may do it, `(n, variables)`: some where all
            binaries are fixed, and all where the decisive variables are, too.
        excluded: whether none does, but for the points that were given.
        ended: whether no node is left.
        nodes: that were bounded.
        refuted: nodes that cannot reach the level.
        work: products that this took, 2e10 a second or so.
        node_work: that one node takes at most.
        key: the same for the same question.
    """

    def __init__(self, program: Program, objective: Mapping[int, int], level: int) -> None:
        self._lo, self._hi = np.array(program.lo, np.float64), np.array(program.hi, np.float64)
        self._limits = np.array(program.limits, np.float64)
        matrix = _sparse(program)
        self._matrix, self._weights = _packed(matrix), _packed(abs(matrix))
        self._objective = np.zeros(len(program.lo))
        self._objective[list(objective)] = list(objective.values())
        self._is_binary, self._decides = (
            np.isin(np.arange(len(program.lo)), which) for which in (program.binaries, program.decisive)
        )
        self._level = level
        self._scale(matrix)
        self.points: _Whole = np.empty((0, len(program.lo)))
        self.nodes = self.refuted = self.work = 0
        self._batch = max(min(BATCH, VALUES // sum(matrix.shape)), 1)
        products = min(math.prod(matrix.shape), _SPARSE_COST * matrix.nnz)
        self._cost = _STEP_COST + _VALUE_COST * sum(matrix.shape) + 2 * products  # of a step
        self.node_work = STEPS * self._cost
        entries = matrix.data, matrix.indices, matrix.indptr
        sides = self._limits, self._lo, self._hi, self._objective, self._is_binary, self._decides
        asked = *entries, *sides, np.array(level)
        self.key = hashlib.sha256(b"|".join(array.tobytes() for array in asked)).digest()
        self.ended = self.excluded = self._undecided = False
        self._open: _Nodes | None = None

    def run(self, nodes: int) -> None:
        """Go on until no node is left, points are found, or so many nodes more are bounded."""
        self.points, most = np.empty((0, len(self._lo))), self.nodes + nodes
        left = self._first() if self._open is None else self._open
        while len(left) and self.nodes < most and not len(self.points):
            batch, rest = left.take(slice(self._batch)), left.take(slice(self._batch, None))
            free = batch.lo < batch.hi
            settled = ~free[:, self._is_binary].any(axis=1)
            free &= np.where(settled[:, None], self._decides, self._is_binary)
            decided = ~free.any(axis=1)
            self._undecided |= bool(decided.any()) and not self._decides.any()
            given = decided | (settled & (np.cumsum(settled) <= POINTS))
            self.points = np.where(batch.lo < batch.hi, self._lo + batch.point * self._span, batch.lo)[given]
            left = self._bounded(self._children(batch, free), STEPS).joined(rest)
        self.ended, self._open = not len(left), left
        self.excluded = self.ended and not self._undecided

    def _first(self) -> _Nodes:
        middle = np.full((1, len(self._lo)), 0.5, np.float32)
        multipliers = np.zeros((1, len(self._limits)), np.float32)
        return self._bounded(_Nodes(self._lo[None], self._hi[None], middle, multipliers), FIRST)

    def _scale(self, matrix: csr_matrix) -> None:
        """To variables from 0 to 1 and rows of at most 1, for the gradient method."""
        self._span = np.maximum(self._hi - self._lo, 1)
        spanned = matrix.multiply(self._span).tocsr()
        self._row_scale = np.maximum(abs(spanned).max(axis=1).toarray().ravel(), 1)
        self._cost_scale = max(float(np.abs(self._objective * self._span).max()), 1)
        scaled = spanned.multiply(1 / self._row_scale[:, None]).tocsr()
        self._a, self._at = _packed(scaled.astype(np.float32)), _packed(scaled.T.tocsr().astype(np.float32))
        self._pull = _packed(abs(scaled).multiply(1 / self._span).tocsr().astype(np.float32))
        self._b = ((self._limits - self._matrix @ self._lo) / self._row_scale).astype(np.float32)
        self._c = (self._objective * self._span / self._cost_scale).astype(np.float32)
        columns, rows = (np.maximum(np.asarray(abs(scaled).sum(axis=axis)).ravel(), 1e-9) for axis in (0, 1))
        self._primal_step, self._dual_step = (1 / columns).astype(np.float32), (1 / rows).astype(np.float32)

    def _children(self, nodes: _Nodes, free: _Bools) -> _Nodes:
        """Two of each node: of the variables that are not whole, the one that pulls most is split."""
        values = self._lo + nodes.point * self._span
        fraction = np.minimum(values - np.floor(values), np.ceil(values) - values)
        score = np.clip(fraction, 1e-3, 0.1) * (nodes.multipliers @ self._pull + 1e-9)
        chosen = np.where(free, score, -1).argmax(axis=1)
        rows = np.flatnonzero(free.any(axis=1))
        chosen, below, above = chosen[rows], nodes.take(rows), nodes.take(rows)
        at = np.arange(len(rows))
        split = np.clip(np.floor(values[rows, chosen]), below.lo[at, chosen], below.hi[at, chosen] - 1)
        below.hi[at, chosen], above.lo[at, chosen] = split, split + 1
        return below.joined(above)

    def _bounded(self, nodes: _Nodes, steps: int) -> _Nodes:
        """Those nodes that can reach the level by their bounds, the largest first."""
        self.nodes += len(nodes)
        most = np.full(len(nodes), np.inf)
        for _ in range(steps // _CHECK):
            self.work += _CHECK * len(nodes) * self._cost
            point, multipliers = self._stepped(nodes)
            nodes = _Nodes(nodes.lo, nodes.hi, point, multipliers)
            most = np.minimum(most, self._most(nodes))
            kept = np.flatnonzero(most >= self._level)
            self.refuted += len(nodes) - len(kept)
            nodes, most = nodes.take(kept), most[kept]
        return nodes.take(np.argsort(-most, kind="stable"))

    def _stepped(self, nodes: _Nodes) -> tuple[_Array, _Array]:
        """Points and multipliers after some steps of the gradient method."""
        lo, hi = (((side - self._lo) / self._span).astype(np.float32) for side in (nodes.lo, nodes.hi))
        x, multipliers = np.clip(nodes.point, lo, hi), nodes.multipliers
        for _ in range(_CHECK):
            ahead = np.clip(x + self._primal_step * (self._c - multipliers @ self._a), lo, hi)
            multipliers = multipliers + self._dual_step * ((2 * ahead - x) @ self._at - self._b)
            x, multipliers = ahead, np.maximum(multipliers, 0)
        return x, multipliers

    def _most(self, nodes: _Nodes) -> _Whole:
        """What the objective is at most by the nodes' multipliers: computed in whole numbers, all below 2^53."""
        exact = nodes.multipliers * (self._cost_scale / self._row_scale)
        ends = np.maximum(np.abs(self._lo), np.abs(self._hi))
        rows = np.abs(self._limits) + self._weights @ ends
        largest = float((np.abs(self._objective) @ ends + exact @ rows).max(initial=1))
        bits = math.floor(_EXACT_BITS - math.log2(largest + rows.sum() + 1))
        if bits < 0:
            return np.full(len(exact), np.inf)
        grid = 2.0**bits
        whole = np.rint(exact * grid)
        rest = grid * self._objective - whole @ self._matrix
        bounds = whole @ self._limits + np.where(rest > 0, rest * nodes.hi, rest * nodes.lo).sum(axis=1)
        most: _Whole = np.floor(bounds / grid)
        return most


def _sparse(program: Program) -> csr_matrix:
    lengths = np.cumsum([0, *map(len, program.rows)])
    indices = np.concatenate([np.empty(0, np.int64), *(np.fromiter(row, np.int64, len(row)) for row in program.rows)])
    data = np.array([float(c) for row in program.rows for c in row.values()])
    return csr_matrix((data, indices, lengths), shape=(len(program.rows), len(program.lo)))


def _packed(matrix: csr_matrix) -> npt.NDArray[Any] | csr_matrix:
    """As a dense array, unless most of it is zero."""
    return matrix.toarray() if matrix.nnz * _SPARSE_COST > math.prod(matrix.shape) else matrix
