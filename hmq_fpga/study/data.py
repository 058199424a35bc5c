"""Data sets: named ones and the user's own `.npz` files, checked, with a validation split of their own.

The validation split is taken from the training data, stratified, always with the same seed: runs with different seeds
choose on the same samples, and the test data stay untouched.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
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
    """Samples and what to learn of them, as a network takes them.

    Attributes:
        x_train, x_val, x_test: float32, `(n, features)`, `(n, channels, length)` or `(n, channels, height, width)`; of
            a network with several inputs all values in a row, `(n, values)`, each input flattened channels last.
        y_train, y_val, y_test: int64 classes from 0, `(n,)`, or float32 targets of a regression, `(n, *output shape)`.
        input_shapes: of one sample of each of several inputs, channels first; empty where there is one.
    """

    x_train: Array
    y_train: Array
    x_val: Array
    y_val: Array
    x_test: Array
    y_test: Array
    input_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def regression(self) -> bool:
        """Whether there are real targets instead of classes."""
        return self.y_train.dtype.kind == "f"

    @property
    def classes(self) -> int:
        """One more than the largest class number; of a regression zero."""
        return 0 if self.regression else 1 + int(max(self.y_train.max(), self.y_val.max(), self.y_test.max()))

    @property
    def classes_test(self) -> Array | None:
        """The test split's classes; None of a regression."""
        return None if self.regression else self.y_test

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all arrays, shapes included."""
        sha = hashlib.sha256()
        for name in (f"{kind}_{split}" for split in ("train", "val", "test") for kind in "xy"):
            array = getattr(self, name)
            sha.update(f"{name}{array.dtype.str}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).data)
        if self.input_shapes:
            sha.update(str(self.input_shapes).encode())
        return sha.hexdigest()


class Raw(NamedTuple):
    """The arrays of a data file, as they are stored; samples are an array, or a list of one for each input."""

    x_train: Array | list[Array]
    y_train: Array
    x_test: Array | list[Array]
    y_test: Array


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named data set.

    Attributes:
        shape: of one sample, channels first.
        scale: makes of the published values what a network takes; leaves what it already made as it is.
        fetch: makes the published arrays where the user has no file of them; None: a file is needed.
        bundled: whether `fetch` needs no network, and so goes before the user's default folder.
        read: reads the user's file.
    """

    shape: tuple[int, ...]
    scale: Callable[[Dataset], Dataset]
    fetch: Callable[[], Raw] | None = None
    bundled: bool = False
    read: Callable[[Path], Raw] = field(default_factory=lambda: _read)


def load(name: str, path: Path | None = None) -> Dataset:
    """The named data set.

    Args:
        name: a key of `SOURCES`.
        path: an `.npz` file, or a folder that holds `<name>.npz`. By default the folder that HMQ_FPGA_DATA names;
            where that has no such file, the set is downloaded from OpenML and cached if it is there. A file holds
            the values as they were published, which are scaled here, or as the network takes them.

    Raises:
        InvalidInput: when it cannot be found, downloaded or used.
    """
    source = SOURCES[name]
    file = _find(name, path, source)
    if file:
        raw, where = source.read(file), str(file)
    elif source.fetch:
        raw, where = source.fetch(), f"data set {name!r}"
    else:
        raise InvalidInput(
            f"data set {name!r}: has no source to download it from; put {name}.npz into a folder and name that with "
            f"--data or {DATA_VARIABLE}"
        )
    return source.scale(as_images(_dataset(raw, where), source.shape))


def reconstruction(dataset: Dataset) -> Dataset:
    """The same samples as their own targets, as an autoencoder takes them."""
    return replace(dataset, y_train=dataset.x_train, y_val=dataset.x_val, y_test=dataset.x_test)


def _divided_by(divisor: int) -> Callable[[Dataset], Dataset]:
    """Whole numbers divided by a power of two, so that nothing is rounded; other values as they are."""

    def scale(dataset: Dataset) -> Dataset:
        x = dataset.x_train
        if x.max() <= 1 or (x != np.rint(x)).any():
            return dataset
        return _with_samples(dataset, lambda x: x * np.float32(1 / divisor))

    return scale


def _standardized(axes: tuple[int, ...]) -> Callable[[Dataset], Dataset]:
    """Zero mean and unit variance, over these axes of the training samples."""

    def scale(dataset: Dataset) -> Dataset:
        mean, deviation = (f(dataset.x_train, axis=axes, keepdims=True) for f in (np.mean, np.std))
        return _with_samples(dataset, lambda x: (x - mean) / np.maximum(deviation, np.float32(1e-6)))

    return scale


def _with_samples(dataset: Dataset, change: Callable[[Array], Array]) -> Dataset:
    x_train, x_val, x_test = (change(x) for x in (dataset.x_train, dataset.x_val, dataset.x_test))
    return replace(dataset, x_train=x_train, x_val=x_val, x_test=x_test)


def load_npz(path: Path, *, sequences: bool = False) -> Dataset:
    """A user's own data: an `.npz` file of `x_train, y_train, x_test, y_test`.

    Values are taken as they are; images are channels-first, or `(n, height, width)` with one channel. For a model with
    several inputs there are `x_train_0`, `x_train_1`, … in the order of `forward`'s arguments, and `x_test_0`, ….

    Args:
        path: of the file.
        sequences: samples of two dimensions are `(channels, length)`, for `Conv1d`, not images.

    Raises:
        InvalidInput: naming the file, the array and what is wrong with it.
    """
    return _dataset(_read(path), str(path), sequences=sequences)


def as_images(dataset: Dataset, shape: tuple[int, ...]) -> Dataset:
    """The same samples, each with this shape, channels first.

    Raises:
        InvalidInput: when the number of values in a sample is another one.
    """
    if dataset.input_shapes:
        raise InvalidInput(f"samples of {len(dataset.input_shapes)} inputs, the task takes one: give other data")
    found = dataset.x_train.shape[1:]
    if np.prod(found) != np.prod(shape):
        raise InvalidInput(f"samples have the shape {found}, the task takes {shape}: give other data")
    return _with_samples(dataset, lambda x: x.reshape(-1, *shape))


def channels_last(x: Array) -> Array:
    """`(n, c, *spatial)` to `(n, *spatial, c)`; `(n, features)` stays as it is."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


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
            stored = {name: _stored(name, archive.files) for name in names}
            if missing := [entry for entries in stored.values() for entry in entries if entry not in archive.files]:
                raise InvalidInput(f"{path}: has no {', '.join(missing)}; needs {', '.join(names)}")
            x_train, x_test = ([archive[entry] for entry in stored[name]] for name in ("x_train", "x_test"))
            return Raw(x_train, archive["y_train"], x_test, archive["y_test"])
    except InvalidInput:
        raise
    except Exception as error:  # from a damaged archive anything may come
        raise InvalidInput(f"{path}: cannot be read as an .npz file of {', '.join(names)}: {error}") from error


def _stored(name: str, there: Sequence[str]) -> list[str]:
    """Where a file has an array: under its name, or samples of several inputs as `x_train_0`, `x_train_1`, …."""
    inputs = [entry for entry in there if re.fullmatch(rf"{name}_\d+", entry)] if name[0] == "x" else []
    return [name] if name in there or not inputs else [f"{name}_{i}" for i in range(len(inputs))]


def _dataset(raw: Raw, where: str, *, sequences: bool = False) -> Dataset:
    """Checked arrays of the right types, and the validation split."""
    inputs = [_inputs(getattr(raw, name), f"{where}: {name}", sequences) for name in ("x_train", "x_test")]
    shapes, other = ([x.shape[1:] for x in arrays] for arrays in inputs)
    if len(shapes) > 1 and shapes != other:
        raise InvalidInput(f"{where}: inputs of x_train are {shapes}, those of x_test {other}")
    x_train, x_test = (_in_a_row(arrays) if len(arrays) > 1 else arrays[0] for arrays in inputs)
    y_train, y_test = (_labels(getattr(raw, name), f"{where}: {name}") for name in ("y_train", "y_test"))
    for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise InvalidInput(f"{where}: x_{split} has {len(x)} samples and y_{split} {len(y)} labels")
    if y_train.shape[1:] != y_test.shape[1:] or y_train.dtype != y_test.dtype:
        raise InvalidInput(f"{where}: y_train and y_test differ in type or in the shape of one target")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InvalidInput(f"{where}: samples of x_train are {x_train.shape[1:]}, those of x_test {x_test.shape[1:]}")
    try:
        x_train, x_val, y_train, y_val = train_test_split(
            x_train,
            y_train,
            test_size=VALIDATION_SHARE,
            stratify=y_train if y_train.ndim == 1 else None,
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise InvalidInput(
            f"{where}: too few training samples to set {VALIDATION_SHARE:.0%} of each class aside for validation: "
            f"{error}"
        ) from error
    return Dataset(
        x_train=x_train,
        y_train=y_train,
        x_val=x_val,
        y_val=y_val,
        x_test=x_test,
        y_test=y_test,
        input_shapes=tuple(shapes) if len(shapes) > 1 else (),
    )


def _inputs(given: Array | list[Array], what: str, sequences: bool) -> list[Array]:
    """Samples of each input, checked."""
    if not isinstance(given, list) or len(given) == 1:
        x = _samples(given[0] if isinstance(given, list) else given, what)
        return [x[:, 0] if sequences and x.ndim == 4 and x.shape[1] == 1 else x]
    found = [_samples(x, f"{what}_{i}") for i, x in enumerate(given)]
    if len({len(x) for x in found}) > 1:
        raise InvalidInput(f"{what}_0 … have {', '.join(str(len(x)) for x in found)} samples: give all inputs of each")
    return [x[:, 0] if sequences and array.ndim == 3 else x for x, array in zip(found, given, strict=True)]


def _in_a_row(inputs: list[Array]) -> Array:
    """All values of several inputs, each flattened with its channels last."""
    return np.concatenate([channels_last(x).reshape(len(x), -1) for x in inputs], 1)


def _samples(x: Array, what: str) -> Array:
    if x.dtype.kind not in "fiub":
        raise InvalidInput(f"{what} holds {x.dtype}; samples are numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise InvalidInput(
            f"{what} has the shape {x.shape}; samples are (n, features), (n, height, width) or "
            "(n, channels, height, width)"
        )
    x = _finite(x, what)
    return x[:, None] if x.ndim == 3 else x


def _finite(x: Array, what: str) -> Array:
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    if bad := x.size - int(np.isfinite(x).sum()):
        raise InvalidInput(f"{what}: {bad} values are NaN or infinite as float32: clean the data first")
    return x


def _labels(y: Array, what: str) -> Array:
    if y.dtype.kind == "f" and y.ndim > 1:
        return _finite(y, what)
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise InvalidInput(
            f"{what} is {y.dtype} of shape {y.shape}; labels are one integer class per sample, (n,), "
            "or floats of a regression, (n, outputs) or (n, *output shape)"
        )
    if y.size and y.min() < 0:
        raise InvalidInput(f"{what} holds the label {y.min()}; classes are counted from 0")
    return y.astype(np.int64)


def _digits() -> Raw:
    bunch = load_digits()
    return _split(bunch.data, bunch.target)


def _tabular(name: str, openml_name: str) -> Callable[[], Raw]:
    return lambda: _split(*_openml(name, openml_name))


def _images(name: str, openml_name: str) -> Callable[[], Raw]:
    """Sixty thousand training images before ten thousand test images."""

    def fetch() -> Raw:
        x, y = _openml(name, openml_name)
        return Raw(x[:60_000], y[:60_000], x[60_000:], y[60_000:])

    return fetch


def _read_jpegs(path: Path) -> Raw:
    """A file of JPEG streams: `jpg_train` one after the other, ending at `off_train`, and the same of `test`."""
    with np.load(path, allow_pickle=False) as archive:
        if "jpg_train" not in archive.files:
            return _read(path)
        streams = {split: (archive[f"jpg_{split}"], archive[f"off_{split}"]) for split in ("train", "test")}
        labels = {split: archive[f"y_{split}"] for split in streams}
    x_train, x_test = (_decoded(*streams[split]) for split in ("train", "test"))
    return Raw(x_train, labels["train"], x_test, labels["test"])


def _decoded(data: Array, offsets: Array) -> Array:
    """Images `(n, channels, height, width)` of JPEG streams."""
    images = [np.asarray(Image.open(io.BytesIO(data[a:b].tobytes()))) for a, b in pairwise(offsets)]
    return np.moveaxis(np.stack(images), -1, 1)


def _split(x: Array, y: Array) -> Raw:
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=SPLIT_SEED)
    return Raw(x_train, y_train, x_test, y_test)


def _openml(name: str, openml_name: str) -> tuple[Array, Array]:
    """Samples and labels, downloaded through scikit-learn, which keeps them for the next time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its retries; the error below says what matters
            bunch = fetch_openml(openml_name, version=1, as_frame=False, parser="liac-arff")
            classes = np.unique(bunch.target, return_inverse=True)[1]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"data set {name!r}: cannot be downloaded from OpenML ({reason}); put {name}.npz into a folder and name "
            f"that with --data or {DATA_VARIABLE}"
        ) from error
    return bunch.data, classes.astype(np.int64)


_EACH_FEATURE, _EACH_COEFFICIENT = (0,), (0, 1, 2)
SOURCES: Mapping[str, Source] = {
    "digits": Source(shape=(64,), scale=_divided_by(16), fetch=_digits, bundled=True),
    "pendigits": Source(shape=(16,), scale=_divided_by(128), fetch=_tabular("pendigits", "pendigits")),
    "letter": Source(shape=(16,), scale=_divided_by(16), fetch=_tabular("letter", "letter")),
    "magic": Source(shape=(10,), scale=_standardized(_EACH_FEATURE), fetch=_tabular("magic", "MagicTelescope")),
    "jets": Source(shape=(16,), scale=_standardized(_EACH_FEATURE), fetch=_tabular("jets", "hls4ml_lhc_jets_hlf")),
    "mnist": Source(shape=(1, 28, 28), scale=_divided_by(256), fetch=_images("mnist", "mnist_784")),
    "fashion_mnist": Source(shape=(1, 28, 28), scale=_divided_by(256), fetch=_images("fashion_mnist", "Fashion-MNIST")),
    "fsdd_mfcc": Source(shape=(1, 49, 10), scale=_standardized(_EACH_COEFFICIENT)),
    "cifar10_jpeg": Source(shape=(3, 32, 32), scale=_divided_by(256), read=_read_jpegs),
}
