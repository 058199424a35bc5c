"""Data sets: named ones and the user's own `.npz` files, checked, with a validation split of their own.

The validation split is taken from the training data, stratified, always with the same seed: runs with different seeds
choose on the same samples, and the test data stay untouched.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.samples import parts_of
from hmq_fpga.study.dataset import Array, Dataset, Split
from hmq_fpga.study.sources import SPLIT_SEED, TEST_SHARE, Arrays, Options, Part, assemble, channels_last, from_file

__all__ = ["DATA_VARIABLE", "SOURCES", "Dataset", "as_images", "channels_last", "load", "load_npz", "reconstruction"]

Splits = Mapping[Split, Part]

DATA_VARIABLE = "HMQ_FPGA_DATA"


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
    fetch: Callable[[], Splits] | None = None
    bundled: bool = False
    read: Callable[[Path], Splits] = field(default_factory=lambda: from_file)


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
    return source.scale(as_images(in_memory(assemble(raw, where)), source.shape))


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
        sequences: samples of two dimensions are `(channels, length)`, for `Conv1d`, or `(steps, features)`, not images.

    Raises:
        InvalidInput: naming the file, the array and what is wrong with it.
    """
    return assemble(from_file(path), str(path), Options(sequences=sequences))


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


def halved(dataset: Dataset) -> Dataset:
    """Images `(n, 1, height, width)` of even sizes, averaged over 2x2 pixels, as vectors."""

    def averaged(x: Array) -> Array:
        n, _, height, width = x.shape
        means: Array = x.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4)).reshape(n, -1)
        return means

    return _with_samples(dataset, averaged)


def in_memory(dataset: Dataset) -> Dataset:
    """The same data set, its streams loaded."""
    if not dataset.streams:
        return dataset
    arrays: dict[str, Any] = {}
    for split, samples in dataset.streams.items():
        x, y = samples.head(len(samples))
        y, weights = parts_of(y)
        arrays |= {f"x_{split}": x.numpy(), f"y_{split}": y.numpy()}
        if weights is not None:
            arrays[f"w_{split}"] = weights.numpy()
    return replace(dataset, streams={}, **arrays)


def _find(name: str, path: Path | None, source: Source) -> Path | None:
    """The file to read, or None where the source makes the data itself."""
    if path is not None:
        file = path / f"{name}.npz" if path.is_dir() else path
        if path.is_dir() and (path / "x_train.npy").is_file():
            return path
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


def _digits() -> Splits:
    bunch = load_digits()
    return _split(bunch.data, bunch.target)


def _tabular(name: str, openml_name: str) -> Callable[[], Splits]:
    return lambda: _split(*_openml(name, openml_name))


def _images(name: str, openml_name: str) -> Callable[[], Splits]:
    """Sixty thousand training images before ten thousand test images."""

    def fetch() -> Splits:
        x, y = _openml(name, openml_name)
        return {"train": Arrays(x[:60_000], y[:60_000]), "test": Arrays(x[60_000:], y[60_000:])}

    return fetch


def _read_jpegs(path: Path) -> Splits:
    """A file of JPEG streams: `jpg_train` one after the other, ending at `off_train`, and the same of `test`."""
    with np.load(path, allow_pickle=False) as archive:
        if "jpg_train" not in archive.files:
            return from_file(path)
        streams = {split: (archive[f"jpg_{split}"], archive[f"off_{split}"]) for split in ("train", "test")}
        labels = {split: archive[f"y_{split}"] for split in streams}
    x_train, x_test = (_decoded(*streams[split]) for split in ("train", "test"))
    return {"train": Arrays(x_train, labels["train"]), "test": Arrays(x_test, labels["test"])}


def _decoded(data: Array, offsets: Array) -> Array:
    """Images `(n, channels, height, width)` of JPEG streams."""
    images = [np.asarray(Image.open(io.BytesIO(data[a:b].tobytes()))) for a, b in pairwise(offsets)]
    return np.moveaxis(np.stack(images), -1, 1)


def _split(x: Array, y: Array) -> Splits:
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=SPLIT_SEED)
    return {"train": Arrays(x_train, y_train), "test": Arrays(x_test, y_test)}


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
