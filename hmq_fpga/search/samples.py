"""Samples of a split, batch by batch: tensors in memory, arrays on disk, and what PyTorch loads for the user."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.layers import joined

Targets = Any  # a tensor, or tuples and dictionaries of tensors of several outputs
Batch = tuple[Tensor, Targets]
Rows = np.ndarray[Any, Any]  # numbers of rows, int64
_T = TypeVar("_T")
_AT_ONCE = 64  # samples of a pass that only looks at them


class Weighted(NamedTuple):
    """Targets of samples that do not all count the same.

    Attributes:
        targets: of a batch.
        weights: how much each sample counts, `(batch,)`; only their ratios matter.
    """

    targets: Targets
    weights: Tensor


def parts_of(targets: Targets) -> tuple[Targets, Tensor | None]:
    """Targets, and the weights of their samples where they have some."""
    return targets if isinstance(targets, Weighted) else (targets, None)


class Samples(ABC):
    """One split of a data set, which may be larger than memory: it is passed through, never held."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples in one pass."""

    @property
    def batch_size(self) -> int | None:
        """Of batches, where the source decides."""
        return None

    @abstractmethod
    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass in random order; a last batch that is shorter than the others is left out."""

    @abstractmethod
    def in_order(self, size: int) -> Iterator[Batch]:
        """One pass over all samples, the same each time, in batches of at most `size` where the source has a choice."""

    def head(self, n: int) -> Batch:
        """The first `n` of `in_order`, or all of fewer, as one batch."""
        taken, found = 0, []
        for x, y in self.in_order(n):
            found.append((x[: n - taken], tree_map(lambda t, left=n - taken: t[:left], y)))
            taken += len(x)
            if taken >= n:
                break
        return together(found)

    @cached_property
    def signed(self) -> bool:
        """Whether any input is negative."""
        return any(bool((x < 0).any()) for x, _ in self.in_order(_AT_ONCE))


def together(batches: Sequence[Batch]) -> Batch:
    """Several batches as one.

    Raises:
        InvalidInput: when there are none.
    """
    if not batches:
        raise InvalidInput("data: there are no samples")
    x, y = zip(*batches, strict=True)
    return torch.cat(x), tree_map(lambda *parts: torch.cat(parts), *y)


@dataclass(frozen=True, eq=False)
class InMemory(Samples):
    """Tensors: samples `(n, *shape)` and their targets."""

    x: Tensor
    y: Targets

    def __len__(self) -> int:
        return len(self.x)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches by the order of `torch.randperm`."""
        size = min(size, len(self))
        for index in _whole(torch.randperm(len(self), generator=generator).to(self.x.device), size):
            yield self.x.index_select(0, index), tree_map(lambda t, i=index: t.index_select(0, i), self.y)

    def in_order(self, size: int) -> Iterator[Batch]:
        """Slices."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.x[part], tree_map(lambda t, p=part: t[p], self.y)

    @cached_property
    def signed(self) -> bool:
        """Whether any input is negative."""
        return bool(self.x.min() < 0)


@dataclass(frozen=True, eq=False)
class OnDisk(Samples):
    """Rows of arrays that are not loaded, such as memory maps; their order and batches are those of `InMemory`.

    Attributes:
        read: the samples of these rows, as a network takes them, float32.
        y: targets of all rows.
        rows: those that belong to the split.
    """

    read: Callable[[Rows], np.ndarray[Any, Any]]
    y: Targets
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches by the order of `torch.randperm`."""
        order = torch.randperm(len(self), generator=generator)
        return map(self._of, (self.rows[index.numpy()] for index in _whole(order, min(size, len(self)))))

    def in_order(self, size: int) -> Iterator[Batch]:
        """Batches of consecutive rows."""
        return map(self._of, (self.rows[start : start + size] for start in range(0, len(self), size)))

    def _of(self, rows: Rows) -> Batch:
        index = torch.from_numpy(rows)
        return torch.from_numpy(self.read(rows)), tree_map(lambda t: t.index_select(0, index), self.y)


@dataclass(frozen=True, eq=False)
class Loaded(Samples):
    """What a user's `Dataset` or `DataLoader` gives, with its transforms, at each pass anew.

    A sample is `(input, target)` or `(input, target, weight)`; several inputs are a tuple. Passes over a map-style data
    set have the order of `InMemory`; a `DataLoader` keeps its own batches and order. The generators of torch, numpy and
    Python, from which transforms and samplers draw, are seeded for each pass, and training does not see them.

    Attributes:
        source: a map-style or iterable data set, or a loader.
        workers: processes that load a data set; a loader has its own.
    """

    source: TorchDataset[Any] | DataLoader[Any]
    workers: int = 0
    _counted: list[int] = field(default_factory=list, init=False)

    def __len__(self) -> int:
        dataset = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
            return len(dataset)
        if not self._counted:
            self._counted.append(sum(len(x) for x, _ in self.in_order(_AT_ONCE)))
        return self._counted[0]

    @property
    def batch_size(self) -> int | None:
        """That of a loader."""
        return self.source.batch_size if isinstance(self.source, DataLoader) else None

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """Of one sample of each of several inputs; empty where there is one."""
        for inputs, *_ in self._raw(1, 0, torch.arange(1) if self.by_number else None):
            shapes = tuple(tuple(_tensor(leaf).shape[1:]) for leaf in tree_leaves(inputs))
            return shapes if len(shapes) > 1 else ()
        raise InvalidInput("data: there are no samples")

    @property
    def by_number(self) -> bool:
        """Whether samples can be asked for one by one."""
        return not isinstance(self.source, DataLoader | IterableDataset)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """A pass with transforms as they come."""
        order, drawn = None, generator
        if self.by_number:
            drawn = generator.clone_state()  # the order is that of tensors, which draw nothing else
            order, size = torch.randperm(len(self), generator=generator), min(size, len(self))
        seed = int(torch.randint(2**31, (), generator=drawn))
        whole = None
        for x, y in self._pass(size, seed, order):
            whole = whole or len(x)
            if len(x) == whole:
                yield x, y

    def in_order(self, size: int) -> Iterator[Batch]:
        """A pass with the transforms of seed zero."""
        return self._pass(size, 0, torch.arange(len(self)) if self.by_number else None)

    def _pass(self, size: int, seed: int, order: Tensor | None) -> Iterator[Batch]:
        return map(_batch, self._raw(size, seed, order))

    def _raw(self, size: int, seed: int, order: Tensor | None) -> Iterator[Any]:
        source = self.source
        if order is not None:
            batches = [part.tolist() for part in order.split(size)]
            source = DataLoader(source, batch_sampler=batches, num_workers=self.workers)  # type: ignore[arg-type]
        elif not isinstance(source, DataLoader):
            source = DataLoader(source, batch_size=size, num_workers=self.workers)
        return _drawing_from(seed, source)


@dataclass(frozen=True, eq=False)
class Changed(Samples):
    """The same samples, each batch changed alike."""

    samples: Samples
    change: Callable[[Batch], Batch]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def batch_size(self) -> int | None:
        """Its own."""
        return self.samples.batch_size

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Its pass."""
        return map(self.change, self.samples.shuffled(size, generator))

    def in_order(self, size: int) -> Iterator[Batch]:
        """Its pass."""
        return map(self.change, self.samples.in_order(size))


def on_device(samples: Samples, device: str) -> Samples:
    """The same samples, each batch moved to a device."""
    if device == "cpu":
        return samples
    return Changed(samples, lambda batch: (batch[0].to(device), tree_map(lambda t: t.to(device), batch[1])))


def endless(samples: Samples, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of one shuffled pass after the other.

    Raises:
        InvalidInput: when a pass has none.
    """
    while True:
        n = 0
        for n, batch in enumerate(samples.shuffled(size, generator), 1):  # noqa: B007
            yield batch
        if not n:
            raise InvalidInput("data: a pass over the training samples has none: give an iterable that starts anew")


def _whole(order: Tensor, size: int) -> Iterator[Tensor]:
    """Parts of that size; what is left over is left out."""
    return islice(iter(order.split(size)), len(order) // size)


def _batch(loaded: Any) -> Batch:
    """What a loader puts out, as a batch."""
    if not isinstance(loaded, list | tuple) or len(loaded) not in (2, 3):
        found = f"{len(loaded)} values" if isinstance(loaded, list | tuple) else type(loaded).__name__
        raise InvalidInput(f"data: a sample is (input, target) or (input, target, weight), the source gives {found}")
    x, y = joined(tree_map(_tensor, loaded[0])).float(), tree_map(_tensor, loaded[1])
    if len({len(t) for t in (x, *tree_leaves(y))}) > 1:
        raise InvalidInput(f"data: a batch has {len(x)} inputs, but {[len(t) for t in tree_leaves(y)]} targets")
    return x, Weighted(y, _tensor(loaded[2]).float().flatten()) if len(loaded) == 3 else y


def _tensor(value: Any) -> Tensor:
    if isinstance(value, str):
        raise InvalidInput(f"data: the source gives the label {value!r}; let its targets be numbers")
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensor.float() if tensor.is_floating_point() else tensor


class _Generators:
    """Python's, numpy's and torch's global generators, from which transforms draw, as they are for the code within."""

    def __init__(self, seed: int) -> None:
        outer = self._read()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        self._other = self._read()
        self._write(outer)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_error: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        now = self._read()
        self._write(self._other)
        self._other = now

    @staticmethod
    def _read() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    @staticmethod
    def _write(states: tuple[Any, ...]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _drawing_from(seed: int, source: Iterable[_T]) -> Iterator[_T]:
    """What an iterable gives while the global generators are seeded for it alone."""
    generators = _Generators(seed)
    with generators:
        iterator = iter(source)
    while True:
        with generators:
            try:
                value = next(iterator)
            except StopIteration:
                return
        yield value
