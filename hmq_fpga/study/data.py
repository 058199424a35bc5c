"""Data sets: named ones and the user's own `.npz` files, checked, with a validation split of their own.

The validation split is taken from the training data, stratified, always with the same seed: runs with different seeds
choose on the same samples, and the test data stay untouched.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

from hmq_fpga.ir.errors import InvalidInput

Array = npt.NDArray[Any]

DATA_VARIABLE = "HMQ_FPGA_DATA"
VALIDATION_SHARE = 0.15  # of the training data
TEST_SHARE = 0.3  # where a source has no test split
SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Samples and classes, as a network takes them.

    Attributes:
        x_train, x_val, x_test: float32, `(n, features)` or `(n, channels, height, width)`.
        y_train, y_val, y_test: int64 classes from 0, `(n,)`.
    """

    x_train: Array
    y_train: Array
    x_val: Array
    y_val: Array
    x_test: Array
    y_test: Array

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all arrays, shapes included."""
        sha = hashlib.sha256()
        for field in fields(self):
            array = getattr(self, field.name)
            sha.update(f"{field.name}{array.dtype.str}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()


class Raw(NamedTuple):
    """The arrays of a data file, as they are stored."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named data set.

    Attributes:
        shape: of one sample, channels first.
        divisor: the published whole numbers are divided by it; a power of two, so that nothing is rounded.
        fetch: makes the published arrays where the user has no file of them.
        bundled: whether `fetch` needs no network, and so goes before the user's default folder.
    """

    shape: tuple[int, ...]
    divisor: int
    fetch: Callable[[], Raw]
    bundled: bool = False


def load(name: str, path: Path | None = None) -> Dataset:
    """The named data set.

    Args:
        name: a key of `SOURCES`.
        path: an `.npz` file, or a folder that holds `<name>.npz`. By default the folder that HMQ_FPGA_DATA names;
            where that has no such file, the set is downloaded from OpenML and cached. A file holds the whole
            numbers as they were published, which are scaled here, or values as the network takes them.

    Raises:
        InvalidInput: when it cannot be found, downloaded or used.
    """
    source = SOURCES[name]
    file = _find(name, path, source)
    raw, where = (_read(file), str(file)) if file else (source.fetch(), f"data set {name!r}")
    dataset = as_images(_dataset(raw, where), source.shape)
    x = dataset.x_train
    if x.max() <= 1 or (x != np.rint(x)).any():
        return dataset
    scale = np.float32(1 / source.divisor)
    return replace(dataset, x_train=x * scale, x_val=dataset.x_val * scale, x_test=dataset.x_test * scale)


def load_npz(path: Path) -> Dataset:
    """A user's own data: an `.npz` file of `x_train, y_train, x_test, y_test`.

    Values are taken as they are; images are channels-first, or `(n, height, width)` with one channel.

    Raises:
        InvalidInput: naming the file, the array and what is wrong with it.
    """
    return _dataset(_read(path), str(path))


def as_images(dataset: Dataset, shape: tuple[int, ...]) -> Dataset:
    """The same samples, each with this shape, channels first.

    Raises:
        InvalidInput: when the number of values in a sample is another one.
    """
    found = dataset.x_train.shape[1:]
    if np.prod(found) != np.prod(shape):
        raise InvalidInput(f"samples have the shape {found}, the task takes {shape}: give other data")
    return replace(
        dataset,
        x_train=dataset.x_train.reshape(-1, *shape),
        x_val=dataset.x_val.reshape(-1, *shape),
        x_test=dataset.x_test.reshape(-1, *shape),
    )


def channels_last(x: Array) -> Array:
    """`(n, c, h, w)` to `(n, h, w, c)`; `(n, features)` stays as it is."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x


def _find(name: str, path: Path | None, source: Source) -> Path | None:
    """The file to read, or None where the source makes the data itself."""
    if path is not None:
        file = path / f"{name}.npz" if path.is_dir() else path
        if not file.is_file():
            raise InvalidInput(f"{file}: no such file; --data takes {name}.npz or a folder that holds it")
        return file
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or source.bundled:
        return None
    if not Path(folder).is_dir():
        raise InvalidInput(f"{DATA_VARIABLE}={folder}: no such folder; name one that holds {name}.npz, or unset it")
    file = Path(folder) / f"{name}.npz"
    return file if file.is_file() else None


def _read(path: Path) -> Raw:
    names = Raw._fields
    if not path.is_file():
        raise InvalidInput(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give one .npz file of data")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InvalidInput(f"{path}: holds a single array; needs {', '.join(names)}")
            if missing := [name for name in names if name not in archive.files]:
                raise InvalidInput(f"{path}: has no {', '.join(missing)}; needs {', '.join(names)}")
            return Raw(*(archive[name] for name in names))
    except InvalidInput:
        raise
    except Exception as error:  # from a damaged archive anything may come
        raise InvalidInput(f"{path}: cannot be read as an .npz file of {', '.join(names)}: {error}") from error


def _dataset(raw: Raw, where: str) -> Dataset:
    """Checked arrays of the right types, and the validation split."""
    x_train, x_test = (_samples(getattr(raw, name), f"{where}: {name}") for name in ("x_train", "x_test"))
    y_train, y_test = (_labels(getattr(raw, name), f"{where}: {name}") for name in ("y_train", "y_test"))
    for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise InvalidInput(f"{where}: x_{split} has {len(x)} samples and y_{split} {len(y)} labels")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InvalidInput(f"{where}: samples of x_train are {x_train.shape[1:]}, those of x_test {x_test.shape[1:]}")
    try:
        x_train, x_val, y_train, y_val = train_test_split(
            x_train, y_train, test_size=VALIDATION_SHARE, stratify=y_train, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise InvalidInput(
            f"{where}: too few training samples to set {VALIDATION_SHARE:.0%} of each class aside for validation: "
            f"{error}"
        ) from error
    return Dataset(x_train=x_train, y_train=y_train, x_val=x_val, y_val=y_val, x_test=x_test, y_test=y_test)


def _samples(x: Array, what: str) -> Array:
    if x.dtype.kind not in "fiub":
        raise InvalidInput(f"{what} holds {x.dtype}; samples are numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise InvalidInput(
            f"{what} has the shape {x.shape}; samples are (n, features), (n, height, width) or "
            "(n, channels, height, width)"
        )
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    if bad := x.size - int(np.isfinite(x).sum()):
        raise InvalidInput(f"{what}: {bad} values are NaN or infinite as float32: clean the data first")
    return x[:, None] if x.ndim == 3 else x


def _labels(y: Array, what: str) -> Array:
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise InvalidInput(f"{what} is {y.dtype} of shape {y.shape}; labels are one integer class per sample, (n,)")
    if y.size and y.min() < 0:
        raise InvalidInput(f"{what} holds the label {y.min()}; classes are counted from 0")
    return y.astype(np.int64)


def _digits() -> Raw:
    bunch = load_digits()
    return _split(bunch.data, bunch.target)


def _pendigits() -> Raw:
    return _split(*_openml("pendigits", "pendigits"))


def _mnist() -> Raw:
    x, y = _openml("mnist", "mnist_784")
    x = x.reshape(-1, 28, 28)
    return Raw(x[:60_000], y[:60_000], x[60_000:], y[60_000:])


def _split(x: Array, y: Array) -> Raw:
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=SPLIT_SEED)
    return Raw(x_train, y_train, x_test, y_test)


def _openml(name: str, openml_name: str) -> tuple[Array, Array]:
    """Samples and labels, downloaded through scikit-learn, which keeps them for the next time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its retries; the error below says what matters
            bunch = fetch_openml(openml_name, version=1, as_frame=False, parser="liac-arff")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"data set {name!r}: cannot be downloaded from OpenML ({reason}); put {name}.npz into a folder and name "
            f"that with --data or {DATA_VARIABLE}"
        ) from error
    return bunch.data, bunch.target.astype(np.int64)


SOURCES: Mapping[str, Source] = {
    "digits": Source(shape=(64,), divisor=16, fetch=_digits, bundled=True),
    "pendigits": Source(shape=(16,), divisor=128, fetch=_pendigits),
    "mnist": Source(shape=(1, 28, 28), divisor=256, fetch=_mnist),
}
