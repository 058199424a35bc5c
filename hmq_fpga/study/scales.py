"""The scales of features: what one format for all inputs cannot tell apart, and their normalization."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.layers import parted
from hmq_fpga.search.quantizers import THRESHOLDS
from hmq_fpga.search.ranges import Magnitudes
from hmq_fpga.search.samples import Batch, Changed, InMemory, Samples
from hmq_fpga.study.dataset import Array, Dataset
from hmq_fpga.study.run.stages import write_json

NORMALIZATION = "normalization.json"
NAMED = 3  # features in an error
_AT_ONCE = 64  # samples of a stream
LEAST_BITS = 8  # fewer may well lose the faint pixels of an image, which is no fault of the data
Shapes = Sequence[Shape]


@dataclass(frozen=True, kw_only=True, eq=False)
class Normalization:
    """`(x - mean) / deviation`, of each feature of flat samples, of each channel of others.

    Attributes:
        mean, deviation: float64, `(features,)` or `(channels, 1, …)`; of several inputs as they stand in a row.
    """

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, x: Array | Samples, shapes: Shapes = ()) -> Normalization:
        """Mean and standard deviation of samples `(n, *shape)`, channels first; what never varies is only shifted.

        Outliers count as the threshold beyond which they lie, see `Magnitudes`, of their own feature. Several inputs
        of these `shapes` stand in a row; see `Dataset`.
        """
        found = [cls._of_input(partial(_inputs, x, shapes, i)) for i in range(len(shapes) or 1)]
        if not shapes:
            return found[0]
        rows = [
            [np.broadcast_to(np.moveaxis(value, 0, -1), (*shape[1:], shape[0])).ravel() for value in values]
            for shape, values in zip(shapes, ((part.mean, part.deviation) for part in found), strict=True)
        ]
        mean, deviation = (np.concatenate(values) for values in zip(*rows, strict=True))
        return cls(mean=mean, deviation=deviation)

    @classmethod
    def _of_input(cls, parts: Callable[[], Iterable[Array]]) -> Normalization:
        """Of one input, whose samples are passed through four times."""
        n, largest = 0, float(np.finfo(np.float32).max)
        counts: dict[int, Magnitudes] = {}
        for part in parts():
            n, axes, broadcast = n + part[:, 0].size, _all_but_channels(part), (-1, *[1] * (part.ndim - 2))
            for feature, values in enumerate(part.swapaxes(0, 1)):
                counts.setdefault(feature, _magnitudes(values)).add(torch.from_numpy(values))
        limits = [min(2.0**of.threshold_log2, largest) for of in counts.values()]
        limit = np.array(limits, np.float32).reshape(broadcast)

        def clipped() -> Iterator[Array]:
            return (np.clip(part, -limit, limit) for part in parts())

        def mean_of(function: Callable[[Array], Array]) -> Array:
            sums = (function(x).sum(axes, np.float64, keepdims=True)[0] for x in clipped())
            mean: Array = sum(sums, np.zeros(())) / n
            return mean

        lo = np.minimum.reduce([x.min(axes, keepdims=True)[0] for x in clipped()])
        hi = np.maximum.reduce([x.max(axes, keepdims=True)[0] for x in clipped()])
        mean = mean_of(lambda x: x)
        deviation = np.sqrt(mean_of(lambda x: np.square(x - mean)))
        return cls(mean=np.where(lo < hi, mean, lo), deviation=np.where(lo < hi, deviation, 1.0))

    def __call__(self, x: Array) -> Array:
        """Samples `(n, *shape)`, normalized in float64 and rounded to float32."""
        normalized: Array = ((x - self.mean) / self.deviation).astype(np.float32)
        return normalized

    def apply(self, dataset: Dataset) -> Dataset:
        """A data set with the samples of all its splits normalized.

        Raises:
            InvalidInput: when its samples have another shape.
        """
        if len(self.mean) != dataset.x_test.shape[1] or self.mean.ndim != dataset.x_test.ndim - 1:
            raise InvalidInput(
                f"samples have the shape {dataset.x_test.shape[1:]}, those normalized before had another"
            )

        def change(batch: Batch) -> Batch:
            return torch.from_numpy(self(batch[0].numpy())), batch[1]

        x_train, x_val, x_test = (self(x) for x in (dataset.x_train, dataset.x_val, dataset.x_test))
        streams = {split: Changed(samples, change) for split, samples in dataset.streams.items()}
        return replace(dataset, x_train=x_train, x_val=x_val, x_test=x_test, streams=streams)

    def save(self, folder: Path) -> None:
        """Write `normalization.json`; its decimal numbers are exactly these."""
        told = {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}
        write_json(
            folder / NORMALIZATION, {"note": "the hardware takes (x - mean) / deviation, channels first", **told}
        )

    @classmethod
    def load(cls, folder: Path) -> Normalization:
        """What `save` wrote.

        Raises:
            InvalidInput: when it is missing or damaged.
        """
        try:
            told = json.loads((folder / NORMALIZATION).read_text())
            return cls(**{name: np.array(told[name], np.float64) for name in ("mean", "deviation")})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"{folder / NORMALIZATION}: cannot be read: {error}; run again") from error


def check_scales(x: Array | Samples, *, bits: int, shapes: Shapes = ()) -> None:
    """Raise `InvalidInput` where no format of so many bits would let each feature of training samples still vary.

    Of images and sequences a feature is a channel. Several inputs of these `shapes` stand in a row; see `Dataset`.
    """
    bits = max(bits, LEAST_BITS)
    found, least, most = None, [], []
    for part in _parts(x):
        inputs = _parted(part, shapes)
        least.append(np.concatenate([of.min(_all_but_channels(of)) for of in inputs]))
        most.append(np.concatenate([of.max(_all_but_channels(of)) for of in inputs]))
        found = found or _magnitudes(part)
        found.add(torch.from_numpy(part))
    assert found
    lo, hi = np.minimum.reduce(least), np.maximum.reduce(most)
    names = [
        f"{'feature' if part.ndim == 2 else 'channel'} {i}{f' of input {number}' if shapes else ''}"
        for number, part in enumerate(inputs)
        for i in range(part.shape[1])
    ]
    top = found.threshold_log2
    formats = [
        Fixed.from_threshold(signed=bool(lo.min() < 0), bits=bits, threshold_log2=top - k) for k in range(THRESHOLDS)
    ]
    constant = [(lo < hi) & (f.encode(lo) == f.encode(hi)) for f in formats]
    lost = np.flatnonzero(min(constant, key=np.count_nonzero))
    if not lost.size:
        return
    largest = int(np.argmax(np.maximum(abs(lo), abs(hi))))

    def named(features: Iterable[int]) -> str:
        return ", ".join(f"{names[i]} ({lo[i]:.4g} … {hi[i]:.4g})" for i in features)

    more = f" and {lost.size - NAMED} more" if lost.size > NAMED else ""
    raise InvalidInput(
        f"inputs: {named(lost[:NAMED])}{more} would not vary in any {bits}-bit format of the input beside "
        f"{named([largest])}: add --normalize, or scale or leave out what differs"
    )


def _magnitudes(x: Array) -> Magnitudes:
    """What counts values of samples `(n, …)`, none yet."""
    return Magnitudes(math.prod(x.shape[1:]))


def _parts(x: Array | Samples) -> Iterator[Array]:
    """Samples as they are to be passed through: those in memory at once."""
    if isinstance(x, InMemory):
        x = x.x.numpy()
    if not isinstance(x, Samples):
        return iter([x])
    return (part.numpy() for part, _ in x.in_order(_AT_ONCE))


def _inputs(x: Array | Samples, shapes: Shapes, i: int) -> Iterator[Array]:
    return (_parted(part, shapes)[i] for part in _parts(x))


def _parted(x: Array, shapes: Shapes) -> list[Array]:
    """Several inputs, channels first, from what stands in a row."""
    return [part.numpy() for part in parted(torch.from_numpy(x), shapes)]


def _all_but_channels(x: Array) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))
