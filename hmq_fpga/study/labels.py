"""How targets are told from what people have: class numbers, names, one-hot rows, several labels, real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils._pytree import tree_leaves, tree_map

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.dataset import Array

TargetKind = Literal["classes", "labels", "values"]
_NAMED = 8  # classes in a note
_KINDS = {"b": "whole", "i": "whole", "u": "whole", "f": "real", "U": "text", "S": "text"}


class Reading(NamedTuple):
    """What makes targets of what the user has.

    Attributes:
        apply: int64 classes `(n,)`, bool labels `(n, labels)`, or float32 values `(n, *output shape)`, of what `plain`
            leaves; a tuple or dictionary of these where a sample has several targets.
        names: of the classes, where they are not numbers from 0.
        notes: what is done, a sentence each.
    """

    apply: Callable[[Any], Any]
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Seen:
    """What targets are like, gathered batch by batch over all splits: they are all read alike."""

    def __init__(self) -> None:
        self._first: tuple[str, str, str, tuple[int, ...]] | None = None
        self._binary = self._one_hot = self._whole = True
        self._ones = False
        self._values: Array = np.empty(0)
        self._others = ""
        self._several: list[tuple[str, tuple[int, ...]]] = []

    def add(self, y: Any, what: str) -> None:
        """Take targets into account: an array, or a tuple or dictionary of several.

        Raises:
            InvalidInput: where they are no targets.
        """
        if not isinstance(y, np.ndarray):
            parts = [_as_it_is(part, f"{what}_{i}") for i, part in enumerate(tree_leaves(y))]
            found = [(part.dtype.name, part.shape[1:]) for part in parts]
            self._several = self._several or found
            if found != self._several:
                raise InvalidInput(f"{what}: its targets are {found}, those of the training data {self._several}")
            return
        y = plain(y, what)
        kind = _KINDS[y.dtype.kind]
        first = self._first = self._first or (what, kind, str(y.dtype), y.shape[1:])
        if first[1:2] + first[3:] != (kind, y.shape[1:]):
            self._others = self._others or what
            return
        if kind == "text" or y.ndim == 1:
            found = np.unique(y)
            self._values = np.union1d(self._values, found) if self._values.size else found
        if kind != "text":
            self._whole &= bool((y == np.rint(y)).all())
            self._binary &= bool(((y == 0) | (y == 1)).all())
            self._ones |= bool((y == 1).any())
            self._one_hot &= self._binary and y.ndim == 2 and bool((y.sum(1) == 1).all())

    def reading(self, wanted: TargetKind | None = None) -> Reading:
        """How to read all of them.

        Args:
            wanted: what they are to be, where they could be several things.

        Raises:
            InvalidInput: when they cannot be that, or differ.
        """
        if self._several:
            if wanted:
                raise InvalidInput(f"target_kind: is for one target, and a sample has {len(self._several)}")
            return Reading(lambda y: tree_map(lambda part: _as_it_is(part, "targets"), y))
        found = self._reading(wanted)
        if self._others:
            names = self._first[0] if self._first else "", self._others.rpartition(" ")[2]
            raise InvalidInput(f"{' and '.join(names)} differ in type or in the shape of one target")
        return found

    def _reading(self, wanted: TargetKind | None) -> Reading:
        assert self._first
        what, kind, dtype, shape = self._first
        refused = InvalidInput(
            f"{what} is {dtype} of shape (n{''.join(f', {n}' for n in shape)}{',' * (not shape)}); labels are one "
            "integer class per sample, (n,), names, or rows of 0 and 1; targets of a regression are floats, "
            "(n, outputs) or (n, *output shape)"
        )
        if wanted == "values":
            if kind == "text":
                raise refused
            return Reading(_values)
        if len(shape) == 1 and shape[0] > 1 and kind != "text" and self._binary and self._ones:
            if self._one_hot and wanted != "labels":
                note = f"{what}: rows of one 1 among {shape[0]} are read as classes"
                return Reading(lambda y: np.argmax(y, 1).astype(np.int64), notes=(note,))
            if wanted != "classes":
                note = f"{what}: rows of 0 and 1 are read as {shape[0]} labels, of which a sample may have several"
                return Reading(lambda y: y.astype(bool), notes=(note,))
        if wanted == "labels" or (shape and (kind != "real" or wanted == "classes")):
            raise refused
        if kind == "real" and (shape or not self._whole) and wanted is None:
            notes = () if shape else (f"{what}: real numbers are read as one target of a regression",)
            return Reading(_values, notes=notes)
        if kind == "real" and (wanted != "classes" or not self._whole):
            raise refused
        return self._classes(what)

    def _classes(self, what: str) -> Reading:
        values = self._values
        if values.dtype.kind in "US":
            return self._named("names are read as classes, in alphabetical order", what)
        least, largest = (int(f(values)) for f in (np.min, np.max))
        if values.tolist() == [-1, 1] or least > 1:
            return self._named("labels are read as classes in their order", what)
        if least < 0:
            raise InvalidInput(f"{what} holds the label {least}; classes are counted from 0")
        if least == 1:
            note = f"{what}: labels start at 1, and are read as classes from 0"
            return Reading(lambda y: y.astype(np.int64) - 1, tuple(map(str, range(1, largest + 1))), (note,))
        return Reading(lambda y: y.astype(np.int64))

    def _named(self, how: str, what: str) -> Reading:
        names = tuple(str(value) for value in self._values.tolist())
        told = [f"{name} is {i}" for i, name in enumerate(names[:_NAMED])] + ["…"] * (len(names) > _NAMED)
        return Reading(self._number, names, (f"{what}: {how}: {', '.join(told)}",))

    def _number(self, y: Array) -> Array:
        number: Array = np.searchsorted(self._values, y).astype(np.int64)
        return number


def plain(y: Array, what: str) -> Array:
    """Targets as an array of numbers or text, without a last dimension of one where they are classes.

    Raises:
        InvalidInput: where they are neither, are missing or not finite.
    """
    if y.dtype.kind == "O":
        if missing := sum(value is None or value != value for value in y.ravel().tolist()):
            raise InvalidInput(f"{what}: {missing} targets are missing: clean the data first")
        y = np.asarray(y.tolist())
    if y.dtype.kind == "S":
        y = y.astype(str)
    if y.dtype.kind not in _KINDS or y.ndim == 0:
        raise InvalidInput(f"{what} is {y.dtype} of shape {y.shape}; targets are class numbers, names or real numbers")
    if y.dtype.kind == "f":
        with np.errstate(over="ignore"):
            bad = y.size - int(np.isfinite(y.astype(np.float32)).sum())
        if bad:
            raise InvalidInput(f"{what}: {bad} values are NaN or infinite as float32: clean the data first")
    elif y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return y


def _as_it_is(y: Array, what: str) -> Array:
    """One of several targets: whole numbers are classes, rows of booleans labels, floats values."""
    y = plain(y, what)
    if y.dtype.kind == "f":
        return np.ascontiguousarray(y, np.float32)
    if y.dtype.kind == "b" and y.ndim == 2:
        return y
    if y.ndim > 1 or y.dtype.kind == "U" or y.min(initial=0) < 0:
        raise InvalidInput(
            f"{what} is {y.dtype} of shape {y.shape}; of several targets each is whole numbers from 0, one a sample, "
            "rows of booleans, or floats"
        )
    return y.astype(np.int64)


def _values(y: Array) -> Array:
    values: Array = np.ascontiguousarray(y, np.float32)
    return values[:, None] if values.ndim == 1 else values
