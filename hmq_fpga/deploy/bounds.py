"""What a tensor's codes can be at most, sharper than interval arithmetic and as certain.

Interval arithmetic lets each term of a sum be extreme by itself, whatever the inputs. Here a linear program has all
layers at once, with every quantizer between two lines (as in the relaxations of Ehlers, arXiv:1705.01320, and of
Wong & Kolter, arXiv:1711.00851). Its solution in floating point is not trusted: any multipliers of its inequalities
give a bound by weak duality, and that is computed in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, identity

from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Gather,
    MaxPool,
    Op,
    Pad,
    Quantize,
    Ranges,
    Scale,
    Shape,
    Subtract,
    Upsample,
)

MAX_ENTRIES = 20_000_000  # of the dense matrix of one op
MAX_WORK = 20_000_000  # programs of one tensor, times the square of their inequalities: a few seconds
_GRID = 1 << 24  # of multipliers
_AFFINE = (Dense, Conv, DepthwiseConv, Scale, AvgPool, Flatten, Pad, Upsample, Gather, Add, Subtract, Concat)


@dataclass(frozen=True)
class Affine:
    """Values `matrix @ variables + constant`, exact in integers."""

    matrix: csr_matrix
    constant: Codes


@dataclass(frozen=True, kw_only=True)
class Step:
    """A value of a quantizer, `q = clip(round((terms + constant) / step), q_low, q_high)`.

    Attributes:
        q: its variable.
        terms: coefficients of the sum by variable.
        constant: of the sum.
        step: codes of the sum to a code of the quantizer.
        low, high: bounds of the sum.
        q_low, q_high: codes at these bounds.
    """

    q: int
    terms: Mapping[int, int]
    constant: int
    step: Fraction
    low: int
    high: int
    q_low: int
    q_high: int


@dataclass
class Relaxation:
    """A network as inequalities `rows @ variables <= limits` over the codes of its inputs and of its quantizers.

    Attributes:
        net: the network.
        lo, hi: of each variable.
        rows: coefficients by variable; the last of a row's variables is the one that it bounds by the others.
        limits: of the rows.
        steps: the quantizers' values that are not constant.
        tensors: the ops' values by variables, as far as they were asked for.
    """

    net: QNet
    lo: list[int] = field(default_factory=list)
    hi: list[int] = field(default_factory=list)
    rows: list[dict[int, int]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    tensors: dict[str, Affine] = field(default_factory=dict)
    _bounds: dict[str, tuple[Codes, Codes]] = field(default_factory=dict)

    def ranges(self, tensor: str) -> Ranges | None:
        """What each channel of a tensor can hold; None where the network up to there is out of proportion."""
        if (found := self.bounds(tensor)) is None:
            return None
        lo, hi = (side.reshape(-1, self.net.shapes[tensor][-1]) for side in found)
        return Ranges(lo.min(axis=0), hi.max(axis=0))

    def bounds(self, tensor: str) -> tuple[Codes, Codes] | None:
        """Least and greatest code of each value of a tensor in a row; None where that is out of proportion."""
        for op in self.net.ops:
            if op.name not in self.tensors:
                if self._entries(op) > MAX_ENTRIES:
                    return None
                self.tensors[op.name] = self._relaxed(op)
            if op.name == tensor:
                break
        return self._bounds_of(tensor)

    def _bounds_of(self, tensor: str) -> tuple[Codes, Codes]:
        """Least and greatest code of each value of a tensor in a row, by the programs where there are not too many."""
        if tensor not in self._bounds:
            values = self.tensors[tensor]
            lo, hi = self._box(values)
            if self.rows and len(lo) * len(self.rows) ** 2 <= MAX_WORK and values.matrix.nnz > len(lo):
                matrix = _matrix(self.rows, len(self.lo))
                lo = np.array([max(lo[i], -self._largest(matrix, values, i, -1)) for i in range(len(lo))])
                hi = np.array([min(hi[i], self._largest(matrix, values, i, 1)) for i in range(len(hi))])
            self._bounds[tensor] = lo, hi
        return self._bounds[tensor]

    def _box(self, values: Affine) -> tuple[Codes, Codes]:
        """By interval arithmetic on the variables."""
        n = values.matrix.shape[1]
        lo, hi = np.array(self.lo[:n], np.int64), np.array(self.hi[:n], np.int64)
        positive, negative = values.matrix.maximum(0), values.matrix.minimum(0)
        least: Codes = positive @ lo + negative @ hi + values.constant
        greatest: Codes = positive @ hi + negative @ lo + values.constant
        return least, greatest

    def _largest(self, matrix: csr_matrix, values: Affine, element: int, sign: int) -> int:
        """A bound on `sign` times one value."""
        row = values.matrix.getrow(element)
        cost = dict(zip(row.indices.tolist(), (sign * row.data).tolist(), strict=True))
        dense = np.zeros(matrix.shape[1])
        dense[list(cost)] = [-float(c) for c in cost.values()]
        limits, box = np.array(self.limits, dtype=np.float64), np.array([self.lo, self.hi]).T
        solved = linprog(dense, A_ub=matrix, b_ub=limits, bounds=box)
        marginals = np.zeros(len(self.limits)) if solved.status else -solved.ineqlin.marginals
        whole = np.rint(np.maximum(marginals, 0) * _GRID).astype(np.int64).tolist()
        return self._certified(cost, whole) + sign * int(values.constant[element])

    def _certified(self, cost: Mapping[int, int], multipliers: list[int]) -> int:
        """The bound that multipliers give: in integers, whatever they are."""
        left = {variable: c * _GRID for variable, c in cost.items()}
        total = 0
        for row, limit, multiplier in zip(self.rows, self.limits, multipliers, strict=True):
            if multiplier:
                total += multiplier * limit
                for variable, c in row.items():
                    left[variable] = left.get(variable, 0) - multiplier * c
        total += sum(c * (self.hi[v] if c > 0 else self.lo[v]) for v, c in left.items())
        return total // _GRID

    def _entries(self, op: Op) -> int:
        sizes = [math.prod(self.net.shapes[name]) for name in op.reads]
        return sum(sizes) * math.prod(self.net.shapes[op.name]) if isinstance(op, _AFFINE) else 0

    def _relaxed(self, op: Op) -> Affine:
        if isinstance(op, _AFFINE):
            return self._mapped(op)
        size, ranges = math.prod(self.net.shapes[op.name]), self.net.ranges[op.name]
        lo, hi = (side[np.arange(size) % len(side)] for side in (ranges.lo, ranges.hi))
        first = len(self.lo)
        match op:
            case Quantize():
                frac = self.net.formats[op.source].frac
                below, above = self._bounds_of(op.source)
                lo, hi = op.format.requantize(below, frac), op.format.requantize(above, frac)
                self._between_lines(op, first)
            case MaxPool():
                self._above_all(op, first)
            case _:  # the range alone
                pass
        self.lo += lo.tolist()
        self.hi += hi.tolist()
        matrix = csr_matrix(identity(size, dtype=np.int64))
        matrix = csr_matrix((matrix.data, matrix.indices + first, matrix.indptr), shape=(size, first + size))
        return Affine(matrix, np.zeros(size, np.int64))

    def _mapped(self, op: Op) -> Affine:
        """An affine op, by what it makes of what it reads."""
        sources, n = self.net.sources(op), len(self.lo)
        constant, matrices = affine_parts(lambda codes: op.run(sources, codes), [source.shape for source in sources])
        total, parts = constant.copy(), csr_matrix((len(constant), n), dtype=np.int64)
        for name, matrix in zip(op.reads, matrices, strict=True):
            jacobian = csr_matrix(matrix.T)
            read = self.tensors[name]
            total += jacobian @ read.constant
            parts += jacobian @ _widened(read.matrix, n)
        return Affine(parts, total)

    def _between_lines(self, op: Quantize, first: int) -> None:
        """`q` of a sum `a` between the lines that enclose the steps of rounding and saturation."""
        read, (lows, highs) = self.tensors[op.source], self._bounds_of(op.source)
        frac = self.net.formats[op.source].frac
        step = Fraction(2) ** (frac - op.format.frac)
        for i in range(read.matrix.shape[0]):
            low, high = int(lows[i]), int(highs[i])
            q_low, q_high = (int(op.format.requantize(code, frac)) for code in (low, high))
            if q_low == q_high:
                continue
            t_low, t_high, half = low / step, high / step, Fraction(1, 2)
            row = read.matrix.getrow(i)
            terms = list(zip(row.indices.tolist(), row.data.tolist(), strict=True))
            constant = int(read.constant[i])
            self.steps.append(
                Step(
                    q=first + i,
                    terms=dict(terms),
                    constant=constant,
                    step=step,
                    low=low,
                    high=high,
                    q_low=q_low,
                    q_high=q_high,
                )
            )
            slope, at, value = Fraction(1), Fraction(0), half  # q <= value + slope (t - at)
            if t_low < q_low - half:
                slope, at, value = (q_high - q_low) / (q_high - half - t_low), t_low, Fraction(q_low)
            self._line(first + i, terms, constant, slope / step, value - slope * at, 1)
            slope, at, value = Fraction(1), Fraction(0), -half  # q >= value + slope (t - at)
            if t_high > q_high + half:
                slope, at, value = (q_high - q_low) / (t_high - q_low - half), t_high, Fraction(q_high)
            self._line(first + i, terms, constant, slope / step, value - slope * at, -1)

    def _line(
        self, q: int, terms: list[tuple[int, int]], constant: int, slope: Fraction, offset: Fraction, sign: int
    ) -> None:
        """`sign * (q - slope * (terms + constant) - offset) <= 0`, in integers."""
        limit = offset + slope * constant
        scale = math.lcm(slope.denominator, limit.denominator)
        n = int(slope * scale)
        row = {variable: -sign * n * c for variable, c in terms}
        row[q] = row.get(q, 0) + sign * scale
        self.rows.append(row)
        self.limits.append(sign * int(limit * scale))

    def _above_all(self, op: MaxPool, first: int) -> None:
        """A maximum of values: none is larger, and their sum above the least possible is not smaller."""
        read, shape = self.tensors[op.source], self.net.shapes[op.source]
        index = np.arange(1, math.prod(shape) + 1).reshape(1, *shape)
        lowest = int(self.net.ranges[op.source].lo.min())
        members = self._members(op, index)
        for i, elements in enumerate(members):
            total: dict[int, int] = {first + i: 1}
            constant = 0
            for element in elements:
                row = read.matrix.getrow(element)
                terms = dict(zip(row.indices.tolist(), row.data.tolist(), strict=True))
                self.rows.append({**terms, first + i: terms.get(first + i, 0) - 1})
                self.limits.append(-int(read.constant[element]))
                for variable, c in terms.items():
                    total[variable] = total.get(variable, 0) - c
                constant += int(read.constant[element])
            self.rows.append(total)
            self.limits.append(constant - (len(elements) - 1) * lowest)

    def _members(self, op: MaxPool, index: Codes) -> npt.NDArray[np.int64]:
        """The elements of each window `(results, values of a window)`."""
        spatial, channels = index.shape[1:-1], index.shape[-1]
        positions = self.net.shapes[op.name][:-1]
        grids = np.meshgrid(*(np.arange(n) for n in (*positions, channels, *op.window)), indexing="ij")
        dims = len(positions)
        places = [grids[d] * op.stride[d] + grids[dims + 1 + d] for d in range(dims)]
        flat = np.ravel_multi_index((*places, grids[dims]), (*spatial, channels))
        return flat.reshape(math.prod(positions) * channels, -1)


def affine_parts(function: Callable[[list[Codes]], Codes], shapes: Sequence[Shape]) -> tuple[Codes, Iterator[Codes]]:
    """What an affine function is, by what it makes of nothing and of single ones.

    Args:
        function: of batches, one for each shape.
        shapes: of one sample of each argument.

    Returns:
        its constant `(values,)`, and for each argument in turn the matrix `(values of it, values)`.
    """
    zeros = [np.zeros((1, *shape), np.int64) for shape in shapes]
    constant = function(zeros).ravel()

    def matrices() -> Iterator[Codes]:
        for i, shape in enumerate(shapes):
            size = math.prod(shape)
            ones = np.eye(size, dtype=np.int64).reshape(size, *shape)
            given = [ones if j == i else zero.repeat(size, 0) for j, zero in enumerate(zeros)]
            yield function(given).reshape(size, -1) - constant

    return constant, matrices()


def _matrix(rows: list[dict[int, int]], variables: int) -> csr_matrix:
    lengths = np.cumsum([0, *map(len, rows)])
    indices = np.concatenate([np.fromiter(row, np.int64, len(row)) for row in rows])
    data = np.array([float(c) for row in rows for c in row.values()])
    return csr_matrix((data, indices, lengths), shape=(len(rows), variables))


def _widened(matrix: csr_matrix, variables: int) -> csr_matrix:
    return csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], variables))
