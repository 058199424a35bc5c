"""Canonical forms of what a circuit computes: equal forms are equal functions of all inputs.

A value is a sum of functions of one variable each, with exact integer coefficients. A variable is an input, or an
integer linear form of further such functions: the sum before a quantizer. A function of a variable is the array of its
values over all codes that the variable can have, by interval arithmetic; rounding, saturation, tables and bits of words
become such arrays, and two ways to compute one quantizer become one array. Forms, variables and arrays are kept once,
so that comparing is looking at numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.ir.fixed import Codes

LARGEST = 1 << 22  # codes of a variable that a function is tabulated over
Function = Callable[..., Any]
Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """`(constant + sum of coefficient * function(variable)) * 2**-exp`, never changed once made.

    Attributes:
        exp: as above.
        constant: as above.
        terms: function and coefficient by variable.
    """

    exp: int
    constant: int
    terms: Mapping[int, tuple[int, int]]

    @property
    def key(self) -> Key:
        """What tells it from all other functions of the inputs."""
        if not self.terms and not self.constant:
            return (0, 0)
        content = math.gcd(self.constant, *(c for _, c in self.terms.values()))
        twos = (content & -content).bit_length() - 1
        scaled = tuple(sorted((v, f, c >> twos) for v, (f, c) in self.terms.items()))
        return (self.exp - twos, self.constant >> twos, *scaled)


@dataclass(frozen=True)
class _Variable:
    """What functions are of.

    Attributes:
        lo, hi: its range.
        form: the linear form that it is, as terms of a value; None of an input, a maximum or what is not known.
    """

    lo: int
    hi: int
    form: Value | None


@dataclass
class Forms:
    """All variables and functions of one proof."""

    _variables: list[_Variable] = field(default_factory=list)
    _known: dict[Key, int] = field(default_factory=dict)
    _functions: list[npt.NDArray[Any]] = field(default_factory=list)
    _digests: dict[bytes, int] = field(default_factory=dict)
    _applied: dict[Key, tuple[int, int, int, int, int]] = field(default_factory=dict)
    _largest: dict[int, list[Value]] = field(default_factory=dict)
    _tabulated_over: set[int] = field(default_factory=set)

    def constant(self, number: int, exp: int = 0) -> Value:
        """`number * 2**-exp`."""
        return Value(exp, number, {})

    def leaf(self, key: Key, lo: int, hi: int) -> Value:
        """A variable of its own, from `lo` to `hi`: the same one for the same key."""
        if lo == hi:
            return self.constant(lo)
        variable = self._named(("leaf", *key), _Variable(lo, hi, None))
        return Value(0, lo, {variable: (self._function(np.arange(hi - lo + 1)), 1)})

    def sampled(self, codes: Codes) -> list[Value]:
        """Columns of `(samples, values)` as functions of which sample it is: what is computed of them is simulated."""
        variable = self._named(("samples", len(self._variables)), _Variable(0, len(codes) - 1, None))
        return [self._tabulated(variable, column, 0) for column in codes.T]

    def simulated(self, value: Value, samples: int) -> Codes:
        """What a value computed of sampled ones is, for each sample."""
        total = np.full(samples, value.constant)
        for f, c in value.terms.values():
            total = total + c * self._wide(f)
        return total << -value.exp if value.exp < 0 else total >> value.exp

    def bounds(self, value: Value) -> tuple[int, int]:
        """Least and greatest numerator that a value can have, at its `exp`."""
        lo = hi = value.constant
        for f, c in value.terms.values():
            array = self._functions[f]
            least, greatest = c * int(array.min()), c * int(array.max())
            lo, hi = lo + min(least, greatest), hi + max(least, greatest)
        return lo, hi

    def sum(self, parts: Iterable[tuple[Value, int]], constant: int = 0) -> Value:
        """Of values times integers, and a constant."""
        parts = list(parts)
        exp = max((value.exp for value, _ in parts), default=0)
        total = constant << exp if exp >= 0 else constant >> -exp
        terms: dict[int, tuple[int, int]] = {}
        mixed: dict[int, list[tuple[int, int]]] = {}
        for value, factor in parts:
            scale = factor << (exp - value.exp)
            total += scale * value.constant
            for variable, (f, c) in value.terms.items():
                if variable in mixed:
                    mixed[variable].append((f, scale * c))
                elif variable not in terms:
                    terms[variable] = f, scale * c
                elif terms[variable][0] == f:
                    terms[variable] = f, terms[variable][1] + scale * c
                else:
                    mixed[variable] = [terms.pop(variable), (f, scale * c)]
        plain = Value(exp, total, {v: (f, c) for v, (f, c) in terms.items() if c})
        if mixed:
            more = [self._tabulated(v, _combined(self._functions, pairs), exp) for v, pairs in mixed.items()]
            return self.sum([(plain, 1), *((value, 1) for value in more)])
        for variable in plain.terms:
            if len(plain.terms) > 1 and (slope := self._slope(variable, plain)) is not None:
                return self._collapsed(variable, plain, slope)
        return plain

    def shifted(self, value: Value, shift: int) -> Value:
        """`value * 2**shift`."""
        return Value(value.exp - shift, value.constant, value.terms)

    def limit(self, value: Value, lo: int, hi: int) -> None:
        """Take in that a sum is within bounds that are known for all inputs; before any function of it is asked for."""
        variable = self._own(value) if len(value.terms) > 1 and not value.exp else None
        if variable is None or variable in self._tabulated_over:
            return
        constant, c, _ = self._over(variable, value)
        known = self._variables[variable]
        ends = [(lo - constant) / c + known.lo, (hi - constant) / c + known.lo]
        narrowed = max(known.lo, math.ceil(min(ends))), min(known.hi, math.floor(max(ends)))
        if narrowed[0] <= narrowed[1]:
            self._variables[variable] = _Variable(*narrowed, known.form)

    def apply(self, name: Key, function: Function, *values: Value) -> Value | None:
        """An integer function of the values' numerators; None where they are not functions of one variable.

        Args:
            name: tells the function from others.
            function: on arrays of int64, one for each value.
            values: numerators at their `exp`.
        """
        variable = self.variable(*values)
        if variable is None:
            return None
        if variable < 0:
            return self.constant(int(function(*(np.array([v.constant]) for v in values))[0]))
        self._tabulated_over.add(variable)
        given = [self._over(variable, value) for value in values]
        key = (name, *given, self._variables[variable].hi - self._variables[variable].lo)
        if key not in self._applied:
            arrays = [k + c * self._wide(f) if f >= 0 else np.full(1, k) for k, c, f in given]
            size = self._variables[variable].hi - self._variables[variable].lo + 1
            arrays = [np.broadcast_to(array, (size,)) for array in arrays]
            self._applied[key] = self._split(np.asarray(function(*arrays)).astype(np.int64))
        return self._spread(variable, self._applied[key], 0)

    def variable(self, *values: Value) -> int | None:
        """The one variable that values are functions of; -1 of constants, None where there are several."""
        found = {self._own(value) for value in values if value.terms}
        if not found:
            return -1
        return found.pop() if len(found) == 1 else None

    def opaque(self, name: Key, values: Sequence[Value], lo: int, hi: int) -> Value:
        """Something of the values that is not looked into: alike where name and values are."""
        return self.leaf(("opaque", *name, *(value.key for value in values)), lo, hi)

    def maximum(self, values: Sequence[Value]) -> Value:
        """The largest of values."""
        members = {m.key: m for value in values for m in self._members(value)}
        exp = max(m.exp for m in members.values())
        aligned = [Value(exp, m.constant << exp - m.exp, _scaled(m.terms, 1 << exp - m.exp)) for m in members.values()]
        kept: list[Value] = []
        for value in self._joined(aligned):
            if not any(self._below(value, other) for other in kept):
                kept = [other for other in kept if not self._below(other, value)] + [value]
        if len(kept) == 1:
            return kept[0]
        kept = [Value(exp, m.constant << exp - m.exp, _scaled(m.terms, 1 << exp - m.exp)) for m in kept]
        content = math.gcd(*(c for m in kept for c in (m.constant, *(c for _, c in m.terms.values()))))
        kept = sorted((Value(0, m.constant // content, _scaled(m.terms, 1, content)) for m in kept), key=_by_key)
        lo, hi = (max(side) for side in zip(*(self.bounds(m) for m in kept), strict=True))
        leaf = self.leaf(("maximum", *(m.key for m in kept)), lo, hi)
        (variable,) = leaf.terms
        self._largest.setdefault(variable, kept)
        return self.shifted(self.sum([(leaf, content)]), -exp)

    def _joined(self, values: Sequence[Value]) -> list[Value]:
        """The same maximum of fewer values: those of one variable are one function."""
        groups: dict[int | None, list[Value]] = {}
        for value in values:
            groups.setdefault(self._own(value) if value.terms else -1, []).append(value)
        joined = []
        for variable, members in groups.items():
            found = None
            if variable is not None and len(members) > 1:
                found = self.apply(("maximum", len(members)), lambda *arrays: np.maximum.reduce(arrays), *members)
            joined += members if found is None else [self.shifted(found, -members[0].exp)]
        return joined

    def _below(self, value: Value, other: Value) -> bool:
        """Whether a value is never the larger one, whatever the inputs."""
        return self.bounds(self.sum([(other, 1), (value, -1)]))[0] >= 0

    def _members(self, value: Value) -> list[Value]:
        """What a value is the largest of: itself, unless it is a maximum."""
        if len(value.terms) == 1:
            ((variable, (_, c)),) = value.terms.items()
            if variable in self._largest and c > 0 and value.constant == c * self._variables[variable].lo:
                return [self.shifted(self.sum([(m, c)]), -value.exp) for m in self._largest[variable]]
        return [value]

    def _own(self, value: Value) -> int | None:
        """The variable of a value with terms: that of its one term, or the linear form that it is."""
        if len(value.terms) == 1:
            return next(iter(value.terms))
        content = math.gcd(*(c for _, c in value.terms.values()))
        terms = sorted(value.terms.items())
        if terms[0][1][1] < 0:
            content = -content
        key = ("form", *((v, f, c // content) for v, (f, c) in terms))
        if key not in self._known:
            form = Value(0, 0, {v: (f, c // content) for v, (f, c) in terms})
            lo, hi = self.bounds(form)
            if hi - lo >= LARGEST:
                return None
            self._named(key, _Variable(lo, hi, form))
        return self._known[key]

    def _slope(self, variable: int, value: Value) -> int | None:
        """How often a value holds a variable's form beside a function of it, if there is nothing else in it."""
        form = self._variables[variable].form
        if form is None or len(value.terms) != len(form.terms) + 1:
            return None
        first, (_, c) = next(iter(form.terms.items()))
        slope = value.terms[first][1] // c if first in value.terms else 0
        rest = {v: term for v, term in value.terms.items() if v != variable}
        return slope if rest == _scaled(form.terms, slope) else None

    def _collapsed(self, variable: int, value: Value, slope: int) -> Value:
        """A value that is a function of one variable, as that."""
        known, (f, c) = self._variables[variable], value.terms[variable]
        array = c * self._wide(f) + slope * np.arange(known.hi - known.lo + 1)
        return self._tabulated(variable, array + value.constant + slope * known.lo, value.exp)

    def _over(self, variable: int, value: Value) -> tuple[int, int, int]:
        """A value as a constant and a multiple of a function of a variable; function -1 for none."""
        if not value.terms:
            return value.constant, 0, -1
        if len(value.terms) == 1:
            ((_, (f, c)),) = value.terms.items()
            return value.constant, c, f
        known = self._variables[variable]
        assert known.form is not None
        first = min(value.terms)
        c = value.terms[first][1] // known.form.terms[first][1]
        return value.constant + c * known.lo, c, self._function(np.arange(known.hi - known.lo + 1))

    def _tabulated(self, variable: int, array: Codes, exp: int) -> Value:
        return self._spread(variable, self._split(array), exp)

    def _split(self, array: Codes) -> tuple[int, int, int, int, int]:
        """Constant, slope, and coefficient, function (and length) of what is left; one of the two is nothing."""
        constant = int(array[0])
        slope = int(array[1]) - constant if len(array) > 1 else 0
        straight = constant + slope * np.arange(len(array))
        if np.array_equal(array, straight):
            return (constant, slope, 0, -1, len(array))
        return (constant, 0, *self._primitive(array - constant), len(array))

    def _primitive(self, rest: Codes) -> tuple[int, int]:
        """Coefficient and function of an array that starts with zero; 0 and -1 where it is zero."""
        content = int(np.gcd.reduce(rest))
        if not content:
            return 0, -1
        if rest[int(np.argmax(rest != 0))] < 0:
            content = -content
        return content, self._function(rest // content)

    def _spread(self, variable: int, parts: tuple[int, int, int, int, int], exp: int) -> Value:
        """The canonical value of `constant + slope * (variable - lo) + coefficient * function`."""
        constant, slope, coefficient, function, size = parts
        known = self._variables[variable]
        if not slope:
            return Value(exp, constant, {variable: (function, coefficient)} if coefficient else {})
        if known.form is None:  # a variable of its own
            return Value(exp, constant, {variable: (self._function(np.arange(size)), slope)})
        return Value(exp, constant - slope * known.lo, _scaled(known.form.terms, slope))

    def _function(self, array: Codes) -> int:
        small = array.astype(_signed_type(array))
        digest = hashlib.blake2b(small.tobytes() + str(small.dtype).encode(), digest_size=16).digest()
        if digest not in self._digests:
            self._digests[digest] = len(self._functions)
            self._functions.append(small)
        return self._digests[digest]

    def _wide(self, function: int) -> Codes:
        return self._functions[function].astype(np.int64)

    def _named(self, key: Key, variable: _Variable) -> int:
        if key not in self._known:
            self._known[key] = len(self._variables)
            self._variables.append(variable)
        return self._known[key]


def _signed_type(array: Codes) -> type[np.signedinteger[Any]]:
    """The smallest type that holds an array's values."""
    largest = int(max(array.max(), -array.min()))
    return next(kind for kind in (np.int8, np.int16, np.int32, np.int64) if largest <= np.iinfo(kind).max)


def _combined(functions: Sequence[npt.NDArray[Any]], pairs: Sequence[tuple[int, int]]) -> Codes:
    total: Codes = sum(c * functions[f].astype(np.int64) for f, c in pairs)  # type: ignore[assignment]
    return total


def _scaled(terms: Mapping[int, tuple[int, int]], by: int, over: int = 1) -> dict[int, tuple[int, int]]:
    return {v: (f, c * by // over) for v, (f, c) in terms.items()}


def _by_key(value: Value) -> Key:
    return value.key
