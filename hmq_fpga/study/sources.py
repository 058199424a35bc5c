"""What people have their data in: arrays, frames, files, memory maps, and PyTorch's data sets and loaders."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.samples import Batch, Changed, Loaded, OnDisk, Rows, Samples, Targets, Weighted, parts_of
from hmq_fpga.study.dataset import SPLITS, Array, Dataset, Split
from hmq_fpga.study.labels import Reading, Seen, TargetKind, plain

VALIDATION_SHARE = 0.15  # of the training data
TEST_SHARE = 0.3  # where a source has no test split
SPLIT_SEED = 0
COMPARED = 10_000  # test samples of a stream that back ends are compared on
NAMES = ("x_train", "y_train", "x_test", "y_test")
_AT_ONCE = 64  # samples of a pass
_TAKEN = (
    "a torch Dataset or DataLoader, (x, y) or (x, y, weights) of arrays, a data frame, or the path of an .npz, a .csv "
    "or a folder of .npy files"
)


class Arrays(NamedTuple):
    """A split in arrays, as they are stored: samples are an array, or a list of one for each input.

    Targets are an array, or a tuple or dictionary of several.
    """

    x: Array | list[Array]
    y: Targets
    w: Array | None = None


Part = Arrays | Loaded


def channels_last(x: Array) -> Array:
    """`(n, c, *spatial)` to `(n, *spatial, c)`; `(n, features)` stays as it is."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a user's data are to be taken.

    Attributes:
        target: column of a table that is to be learnt; None: the last.
        kind: what targets are, where they could be several things; None: as they look.
        workers: processes that load a torch `Dataset`; a `DataLoader` has its own.
        sequences: samples of two dimensions are `(channels, length)`, for `Conv1d`, not images.
    """

    target: str | None = None
    kind: TargetKind | None = None
    workers: int = 0
    sequences: bool = False


PLAIN = Options()


def take(given: object, where: str = "data", options: Options = PLAIN) -> Dataset:
    """The data set of a user's own.

    Args:
        given: a dictionary of `train`, `test` and, where there is one, `val`, each of them a torch `Dataset` or
            `DataLoader`, a tuple `(x, y)` or `(x, y, weights)` of arrays or tensors, a data frame, or a path; a
            dictionary of arrays `x_train`, `y_train`, `x_test`, `y_test`, with `x_val`, `y_val`, `w_train`, `w_val`
            where there are such; a tuple `(train, test)` or `(train, val, test)`; or one of the former for all splits.
            Inputs are a list of arrays, or `x_train_0`, `x_train_1`, …, where a model has several; several targets of
            a sample likewise a tuple or dictionary of arrays, or `y_train_0`, `y_train_1`, ….
        where: how errors call it.
        options: how to take it.

    Raises:
        InvalidInput: naming what is wrong.
    """
    if isinstance(given, Dataset):
        return given
    parts, notes = _splits(given, where, options)
    return assemble(parts, where, options, notes)


def assemble(parts: Mapping[Split, Part], where: str, options: Options = PLAIN, notes: Sequence[str] = ()) -> Dataset:
    """Checked splits of the right types; a validation split of the training data where there is none of its own."""
    prefix = f"{where}: " if where else ""
    seen = Seen()
    opened: dict[Split, _Held | _Streamed] = {
        split: _Streamed.of(part, split, prefix, seen)
        if isinstance(part, Loaded)
        else _Held.of(part, split, prefix, options.sequences, seen)
        for split, part in parts.items()
    }
    first = opened["train"].shapes
    for split, found in ((split, opened[split].shapes) for split in opened):
        if found != first and max(len(found), len(first)) > 1:
            raise InvalidInput(f"{prefix}inputs of x_train are {list(first)}, those of x_{split} {list(found)}")
        if found != first:
            raise InvalidInput(f"{prefix}samples of x_train are {first[0]}, those of x_{split} {found[0]}")
    reading = seen.reading(options.kind)
    if "val" not in opened:
        opened["train"], opened["val"], told = opened["train"].divided(reading, prefix)
        notes = [*notes, *told]
    made: dict[str, Any] = {}
    streams: dict[Split, Samples] = {}
    for split, part in opened.items():
        arrays, stream = part.read(reading)
        made |= {f"{name}_{split}": array for name, array in arrays.items() if (name, split) != ("w", "test")}
        if stream:
            streams[split] = stream
    if "test" in streams:
        x, y = streams["test"].head(COMPARED)
        made |= {"x_test": x.numpy(), "y_test": _arrays(parts_of(y)[0])}
    elif "test" not in opened:
        made |= {f"{name}_test": _rows(made[f"{name}_train"], slice(0)) for name in "xy"}
    return Dataset(
        **made,
        input_shapes=first if len(first) > 1 else (),
        streams=streams,
        class_names=reading.names,
        notes=(*notes, *reading.notes),
    )


class _Held(NamedTuple):
    """Arrays, in memory or on disk: the samples of any rows, as a network takes them."""

    shapes: tuple[Shape, ...]
    samples: Callable[[Rows], Array]
    y: Targets
    w: Array | None
    rows: Rows
    on_disk: bool

    @classmethod
    def of(cls, part: Arrays, split: Split, prefix: str, sequences: bool, seen: Seen) -> _Held:
        what = f"{prefix}x_{split}"
        stored = part.x if isinstance(part.x, list) else [part.x]
        on_disk = any(isinstance(x, np.memmap) for x in stored)
        if len({len(x) for x in stored}) > 1:
            counts = ", ".join(str(len(x)) for x in stored)
            raise InvalidInput(f"{what}_0 … have {counts} samples: give all inputs of each")

        def row(arrays: list[Array]) -> Array:
            inputs = _inputs(arrays, what, sequences)
            return _in_a_row(inputs) if len(inputs) > 1 else inputs[0]

        n = len(stored[0])
        if on_disk:
            for i, x in enumerate(stored):
                _check(x, f"{what}_{i}" if len(stored) > 1 else what)
            for start in range(0, n, _AT_ONCE):
                inputs = _inputs([x[start : start + _AT_ONCE] for x in stored], what, sequences)

            def samples(rows: Rows) -> Array:
                return row([x[rows] for x in stored])
        else:
            inputs = _inputs(stored, what, sequences)
            whole = _in_a_row(inputs) if len(inputs) > 1 else inputs[0]

            def samples(rows: Rows) -> Array:
                return whole[rows]

        shapes = tuple(x.shape[1:] for x in inputs)
        y = tree_map(lambda of: plain(of, f"{prefix}y_{split}"), part.y)
        for labels in tree_leaves(y):
            if len(labels) != n:
                raise InvalidInput(f"{prefix}x_{split} has {n} samples and y_{split} {len(labels)} labels")
        seen.add(y, f"{prefix}y_{split}")
        w = None if part.w is None else _weights(part.w, n, f"{prefix}w_{split}")
        return cls(shapes, samples, y, w, np.arange(n), on_disk)

    def divided(self, reading: Reading, prefix: str) -> tuple[_Held, _Held, list[str]]:
        """The training and a validation split, of which classes have equal shares."""
        y = reading.apply(self.y)
        try:
            train, val = train_test_split(
                self.rows,
                test_size=VALIDATION_SHARE,
                stratify=y if isinstance(y, np.ndarray) and y.ndim == 1 else None,
                random_state=SPLIT_SEED,
            )
        except ValueError as error:
            raise InvalidInput(
                f"{prefix}too few training samples to set {VALIDATION_SHARE:.0%} of each class aside for validation: "
                f"{error}"
            ) from error
        return self._replace(rows=train), self._replace(rows=val), []

    def read(self, reading: Reading) -> tuple[dict[str, Array], Samples | None]:
        """The arrays of a split, and what passes through it where they are not to be loaded."""
        rows = self.rows[:0] if self.on_disk else self.rows
        y = reading.apply(self.y)
        arrays = {"x": self.samples(rows) if len(rows) else self.samples(self.rows[:1])[:0], "y": _rows(y, rows)}
        if not self.on_disk:
            return arrays | ({} if self.w is None else {"w": self.w[rows]}), None
        targets = tree_map(torch.from_numpy, y)
        weighted = targets if self.w is None else Weighted(targets, torch.from_numpy(self.w))
        return arrays, OnDisk(self.samples, weighted, self.rows)


class _Streamed(NamedTuple):
    """What PyTorch loads."""

    shapes: tuple[Shape, ...]
    source: Loaded
    example: Batch

    @classmethod
    def of(cls, part: Loaded, split: Split, prefix: str, seen: Seen) -> _Streamed:
        for x, y in part.in_order(_AT_ONCE):
            _finite(x.numpy(), f"{prefix}x_{split}")
            seen.add(_arrays(parts_of(y)[0]), f"{prefix}y_{split}")
        x, y = part.head(1)
        return cls(part.input_shapes or (tuple(x.shape[1:]),), part, (x, y))

    def divided(self, reading: Reading, prefix: str) -> tuple[_Streamed, _Streamed, list[str]]:  # noqa: ARG002
        """The training and a validation split, by number."""
        if not self.source.by_number:
            raise InvalidInput(f"{prefix}there are no validation data, and a loader cannot be divided: give val, too")
        rows = train_test_split(np.arange(len(self.source)), test_size=VALIDATION_SHARE, random_state=SPLIT_SEED)
        train, val = (self._replace(source=_subset(self.source, part)) for part in rows)
        return (
            train,
            val,
            [f"{VALIDATION_SHARE:.0%} of the training data are the validation split, transforms included"],
        )

    def read(self, reading: Reading) -> tuple[dict[str, Array], Samples | None]:
        """Arrays without samples, and what passes through the split."""

        def change(batch: Batch) -> Batch:
            targets, weights = parts_of(batch[1])
            read = tree_map(torch.from_numpy, reading.apply(tree_map(lambda t: plain(t.numpy(), "targets"), targets)))
            return batch[0], read if weights is None else Weighted(read, weights)

        x, y = change(self.example)
        return {"x": x[:0].numpy(), "y": _rows(_arrays(parts_of(y)[0]), slice(0))}, Changed(self.source, change)


def _arrays(targets: Targets) -> Targets:
    """Tensors as arrays."""
    return tree_map(lambda t: t.numpy(), targets)


def _rows(y: Targets, rows: Rows | slice) -> Targets:
    return tree_map(lambda part: part[rows], y)


def _subset(part: Loaded, rows: Rows) -> Loaded:
    return Loaded(Subset(part.source, rows.tolist()), part.workers)  # type: ignore[arg-type]


def _weights(w: Array, n: int, what: str) -> Array:
    w = np.asarray(w, np.float32)
    if w.shape != (n,) or not np.isfinite(w).all() or w.min() < 0 or not w.any():
        raise InvalidInput(f"{what}: one weight a sample is needed, ({n},), none negative, and not all zero")
    return w


def _inputs(given: list[Array], what: str, sequences: bool) -> list[Array]:
    """Samples of each input, checked."""
    if len(given) == 1:
        x = _samples(given[0], what)
        return [x[:, 0] if sequences and x.ndim == 4 and x.shape[1] == 1 else x]
    found = [_samples(x, f"{what}_{i}") for i, x in enumerate(given)]
    return [x[:, 0] if sequences and array.ndim == 3 else x for x, array in zip(found, given, strict=True)]


def _in_a_row(inputs: list[Array]) -> Array:
    """All values of several inputs, each flattened with its channels last."""
    return np.concatenate([channels_last(x).reshape(len(x), -1) for x in inputs], 1)


def _samples(x: Array, what: str) -> Array:
    _check(x, what)
    x = _finite(x, what)
    return x[:, None] if x.ndim == 3 else x


def _check(x: Array, what: str) -> None:
    if x.dtype.kind not in "fiub":
        raise InvalidInput(f"{what} holds {x.dtype}; samples are numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise InvalidInput(
            f"{what} has the shape {x.shape}; samples are (n, features), (n, height, width) or "
            "(n, channels, height, width)"
        )


def _finite(x: Array, what: str) -> Array:
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    if bad := x.size - int(np.isfinite(x).sum()):
        raise InvalidInput(f"{what}: {bad} values are NaN or infinite as float32: clean the data first")
    return x


def _splits(given: object, where: str, options: Options) -> tuple[dict[Split, Part], list[str]]:
    """The splits of what a user gives, and what was done to make them."""
    if isinstance(given, str | Path) and not _is_table(given):
        return from_file(Path(given)), []
    if isinstance(given, Mapping):
        if "x_train" in given or "x_train_0" in given:
            return _of_arrays(given, list(given), where), []
        named = dict(given)
    elif isinstance(given, tuple) and len(given) in (2, 3) and not any(_is_array(of) for of in given):
        named = dict(zip(("train", "val", "test") if len(given) == 3 else ("train", "test"), given, strict=True))
    else:
        return _divided(part_of(given, where, options), where)
    if unknown := set(named) - {"train", "val", "test"}:
        raise InvalidInput(f"{where}: has {min(map(str, unknown))!r}; there are train, val and test, or x_train, …")
    if missing := {"train", "test"} - set(named):
        raise InvalidInput(f"{where}: has no {max(missing)!r} split")
    parts: dict[Split, Part] = {
        split: part_of(named[split], f"{where}: {split}", options) for split in SPLITS if split in named
    }
    return parts, []


def part_of(given: object, where: str, options: Options = PLAIN) -> Part:
    """One split of what a user gives; see `take`."""
    if isinstance(given, Loaded):
        return given
    if isinstance(given, TorchDataset | DataLoader):
        return Loaded(given, options.workers)
    if isinstance(given, str | Path):
        return from_table(Path(given), options.target)
    if _is_frame(given):
        return _from_frame(given, where, options.target)
    if isinstance(given, tuple | list) and len(given) in (2, 3):
        x, y, *w = given
        inputs = [_array(part) for part in x] if isinstance(x, tuple | list) and x and _is_array(x[0]) else _array(x)
        n = len(inputs[0] if isinstance(inputs, list) else inputs)
        if isinstance(y, Mapping) or (isinstance(y, tuple | list) and len(y) != n and any(map(_is_array, y))):
            several = y if isinstance(y, Mapping) else tuple(y)
            return Arrays(inputs, tree_map(_array, several), *map(_array, w))
        return Arrays(inputs, _array(y), *map(_array, w))
    raise InvalidInput(f"{where}: {type(given).__name__} is none of what is taken: {_TAKEN}")


def _divided(part: Part, where: str) -> tuple[dict[Split, Part], list[str]]:
    """A training and a test split."""
    note = f"{where}: {TEST_SHARE:.0%} of the samples are the test split"
    if isinstance(part, Loaded):
        if not part.by_number:
            raise InvalidInput(f"{where}: a loader cannot be divided: give train, val and test, a loader each")
        rows = train_test_split(np.arange(len(part)), test_size=TEST_SHARE, random_state=SPLIT_SEED)
        return {"train": _subset(part, rows[0]), "test": _subset(part, rows[1])}, [note]
    if isinstance(part.x, list) or not isinstance(part.y, np.ndarray):
        raise InvalidInput(f"{where}: give several inputs or targets as train and test")
    y, classes = plain(part.y, where), Seen()
    classes.add(y, where)
    try:
        rows = train_test_split(
            np.arange(len(y)),
            test_size=TEST_SHARE,
            stratify=None if y.dtype.kind == "f" or y.ndim > 1 else y,
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise InvalidInput(f"{where}: too few samples of each class to set a test split aside: {error}") from error
    if len(part.x) != len(y):
        raise InvalidInput(f"{where}: has {len(part.x)} samples and {len(y)} labels")
    held, weights = part.x, part.w
    of_each = [Arrays(held[of], y[of], None if weights is None else weights[of]) for of in rows]
    return {"train": of_each[0], "test": of_each[1]}, [note]


def from_file(path: Path) -> dict[Split, Part]:
    """The splits in an `.npz` file, or in a folder of `.npy` files of the same names, which are mapped, not loaded."""
    names = ", ".join(NAMES)
    if path.is_dir():
        there = {file.stem: file for file in path.glob("*.npy")}
        if not any(name.startswith("x_train") for name in there):
            raise InvalidInput(f"{path}: is a folder without x_train.npy; give one .npz file of data, or {names} in it")
        try:
            opened = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in there.items()}
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path}: cannot be read as .npy files of {names}: {error}") from error
        return _of_arrays(opened, list(opened), str(path))
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file; give one .npz file of data")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InvalidInput(f"{path}: holds a single array; needs {names}")
            return _of_arrays(archive, archive.files, str(path))
    except InvalidInput:
        raise
    except Exception as error:  # from a damaged archive anything may come
        raise InvalidInput(f"{path}: cannot be read as an .npz file of {names}: {error}") from error


def _of_arrays(archive: Mapping[str, Any], there: Sequence[str], where: str) -> dict[Split, Part]:
    validated = "y_val" in there or "y_val_0" in there
    splits: list[Split] = ["train", *(["val"] if validated else []), "test"]  # type: ignore[list-item]
    stored = {f"{kind}_{split}": _stored(f"{kind}_{split}", there) for split in splits for kind in "xy"}
    if missing := [entry for entries in stored.values() for entry in entries if entry not in there]:
        raise InvalidInput(f"{where}: has no {', '.join(missing)}; needs {', '.join(NAMES)}")

    def part(split: Split) -> Arrays:
        x, y = ([_array(archive[entry]) for entry in stored[f"{kind}_{split}"]] for kind in "xy")
        w = _array(archive[f"w_{split}"]) if f"w_{split}" in there else None
        return Arrays(x if len(x) > 1 else x[0], tuple(y) if len(y) > 1 else y[0], w)

    return {split: part(split) for split in splits}


def _stored(name: str, there: Sequence[str]) -> list[str]:
    """Where a file has an array: under its name, or several inputs and targets as `x_train_0`, `x_train_1`, …."""
    several = [entry for entry in there if re.fullmatch(rf"{name}_\d+", entry)]
    return [name] if name in there or not several else [f"{name}_{i}" for i in range(len(several))]


def from_table(path: Path, target: str | None = None) -> Arrays:
    """Samples and targets in a `.csv` file of a row each, with or without names of the columns in its first line.

    Args:
        path: of the file; its values are separated by commas, semicolons or tabs.
        target: name, or number from 0, of the column that is to be learnt; by default the last.
    """
    if not _is_table(path):
        raise InvalidInput(f"{path}: is no .csv file; there are {_TAKEN}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            line = file.readline()
            separator = max(",;\t", key=line.count)
            first = next(csv.reader([line], delimiter=separator), [])
        named = not any(map(_is_number, first))
        columns = [name.strip() for name in first] if named else [str(i) for i in range(len(first))]
        number = _column(columns, target, str(path))
        settings: dict[str, Any] = {"delimiter": separator, "skiprows": int(named), "quotechar": '"', "comments": None}
        with path.open(newline="", encoding="utf-8-sig") as file:
            others = [i for i in range(len(columns)) if i != number]
            x = np.loadtxt(file, np.float32, usecols=others, ndmin=2, **settings)
        with path.open(newline="", encoding="utf-8-sig") as file:
            y = np.loadtxt(file, str, usecols=number, ndmin=1, **settings)
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read as a table of numbers and a column of targets: {error}") from error
    return Arrays(x, _numbers(np.char.strip(y), f"{path}: column {columns[number]!r}"))


def _numbers(y: Array, what: str) -> Array:
    """Text as whole or real numbers, where all of it is."""
    if missing := int(np.isin(y, ("", "nan", "None", "NaN", "<NA>")).sum()):
        raise InvalidInput(f"{what}: {missing} targets are missing: clean the data first")
    with suppress(ValueError):
        return y.astype(np.int64)
    with suppress(ValueError):
        return y.astype(np.float64)
    return y


def _from_frame(frame: Any, where: str, target: str | None) -> Arrays:
    columns = [str(name) for name in frame.columns]
    number = _column(columns, target, where)
    names = list(frame.columns)
    if not len(frame):
        raise InvalidInput(f"{where}: has no rows")
    x = np.empty((len(frame), len(columns) - 1), np.float32)
    name = None
    try:
        for place, name in enumerate(name for i, name in enumerate(names) if i != number):
            x[:, place] = frame[name]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{where}: column {name!r}: samples are numbers: {error}") from error
    return Arrays(x, frame[names[number]].to_numpy())


def _column(columns: Sequence[str], target: str | None, where: str) -> int:
    if len(columns) < 2:
        raise InvalidInput(f"{where}: has {len(columns)} columns: needs features and a target")
    if target is None:
        return len(columns) - 1
    if target not in columns:
        raise InvalidInput(f"{where}: has no column {target!r}; there are {', '.join(columns)}")
    return columns.index(target)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_table(given: object) -> bool:
    return isinstance(given, str | Path) and Path(given).suffix.lower() in (".csv", ".tsv")


def _is_frame(given: object) -> bool:
    return hasattr(given, "columns") and hasattr(given, "to_numpy")


def _is_array(given: object) -> bool:
    return isinstance(given, np.ndarray | Tensor) or (hasattr(given, "__array__") and not _is_frame(given))


def _array(given: object) -> Array:
    """Any array, not loaded where it is a memory map."""
    if isinstance(given, Tensor):
        return given.detach().cpu().numpy()
    return given if isinstance(given, np.ndarray) else np.asarray(given)
