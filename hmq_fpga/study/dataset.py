"""A data set as a run takes it: three splits, in memory or as streams, and what was done to make it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_leaves, tree_map

from hmq_fpga.search.samples import InMemory, Samples, Targets, Weighted, parts_of
from hmq_fpga.search.train import Kind

Array = npt.NDArray[Any]
Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
_AT_ONCE = 64  # samples of a pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Samples and what to learn of them, as a network takes them.

    Attributes:
        x_train, x_val, x_test: float32, `(n, features)`, `(n, channels, length)` or `(n, channels, height, width)`; of
            a network with several inputs all values in a row, `(n, values)`, each input flattened channels last.
        y_train, y_val, y_test: int64 classes from 0, `(n,)`; several labels for each sample, bool `(n, labels)`; or
            float32 targets of a regression, `(n, *output shape)`. A tuple or dictionary of these, in the order of the
            model's outputs, where there are several targets.
        w_train, w_val: how much each sample counts, float32 `(n,)`.
        input_shapes: of one sample of each of several inputs, channels first; empty where there is one.
        streams: splits that are not in memory. The arrays above then hold no samples of the training and validation
            split, and the first ones of the test split, those that back ends are compared on.
        class_names: what the user calls the classes; empty where they are numbers from 0.
        notes: what was done to the user's data, a sentence each.
    """

    x_train: Array
    y_train: Targets
    x_val: Array
    y_val: Targets
    x_test: Array
    y_test: Targets
    w_train: Array | None = None
    w_val: Array | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()
    streams: Mapping[Split, Samples] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def samples(self, split: Split) -> Samples:
        """A split, for passes through it."""
        if split in self.streams:
            return self.streams[split]
        x, y = (tree_map(torch.from_numpy, getattr(self, f"{kind}_{split}")) for kind in "xy")
        weights = None if split == "test" else getattr(self, f"w_{split}")
        return InMemory(x, y if weights is None else Weighted(y, torch.from_numpy(weights)))

    @property
    def kind(self) -> Kind:
        """What targets are."""
        if not isinstance(self.y_train, np.ndarray):
            return "several"
        kinds: Mapping[str, Kind] = {"f": "values", "b": "labels"}
        return kinds.get(self.y_train.dtype.kind, "classes")

    @cached_property
    def classes(self) -> int:
        """One more than the largest class number, or how many labels there are; else zero."""
        if self.kind in ("values", "several"):
            return 0
        if self.kind == "labels":
            return int(self.y_train.shape[1])
        return max(self.classes_of(0), len(self.class_names))

    def classes_of(self, target: int) -> int:
        """One more than the largest class number of one of several targets, by its place."""
        return 1 + max(int(self._classes_of(split, target).max(initial=-1)) for split in SPLITS)

    def _classes_of(self, split: Split, target: int) -> Array:
        if split not in self.streams:
            y: Array = tree_leaves(getattr(self, f"y_{split}"))[target]
            return y
        batches = self.streams[split].in_order(_AT_ONCE)
        return np.concatenate([np.unique(tree_leaves(parts_of(y)[0])[target].numpy()) for _, y in batches])

    @property
    def classes_test(self) -> Array | None:
        """The test split's classes; None where targets are something else."""
        return self.y_test if self.kind == "classes" else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all arrays, shapes included; of streams, of what a pass through them gives."""
        sha = hashlib.sha256()
        for name in (f"{kind}_{split}" for split in SPLITS for kind in "xy"):
            for array in tree_leaves(getattr(self, name)):
                _add(sha, name, array)
        if self.input_shapes:
            sha.update(str(self.input_shapes).encode())
        for name in ("w_train", "w_val"):
            if (weights := getattr(self, name)) is not None:
                _add(sha, name, weights)
        for split, samples in self.streams.items():
            for x, y in samples.in_order(_AT_ONCE):
                for leaf in (x, *tree_leaves(y)):
                    _add(sha, split, leaf.numpy())
        return sha.hexdigest()


def _add(sha: Any, name: str, array: Array) -> None:
    sha.update(f"{name}{array.dtype.str}{array.shape}".encode())
    sha.update(np.ascontiguousarray(array).data)
