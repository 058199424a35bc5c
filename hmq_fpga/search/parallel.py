"""Several processes that train one model: each takes its part of every batch, and all have the same weights.

`torchrun` starts them, or whoever makes a process group of `torch.distributed`; without one there is a single process.
What is random comes from generators of one seed, and gradients are averaged in one operation for all parameters that
learn at one rate, so that all processes take the same step.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hmq_fpga.ir.errors import InvalidInput

T = TypeVar("T")


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Of this process, from 0; the first writes and reports."""
    return dist.get_rank() if processes() > 1 else 0


def started() -> int:
    """How many processes `torchrun` started, whether or not they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def own_device(device: str) -> str:
    """That of this process, where all are to train on `device`.

    Raises:
        InvalidInput: when they would share one GPU.
    """
    if started() == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise InvalidInput(f"device {device!r}: {started()} processes need a GPU each; give cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be one of the processes that `torchrun` started, if it did, with a device of its own."""
    if started() == 1 or dist.is_initialized():
        yield
        return
    if device != "cpu":
        torch.cuda.set_device(device)
    # Its functions' defaults are the group that there is when it is imported, which then would never end: threads that
    # outlive it abort the interpreter. `torch.export` imports it.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_batch(size: int) -> None:
    """Raise `InvalidInput` where batches of this size have no equal parts, so that means of parts are not the mean."""
    if size % (n := processes()):
        raise InvalidInput(f"batches of {size} samples cannot be split evenly over {n} processes")


def part(batch: Tensor) -> Tensor:
    """This process's part of a batch's samples; see `check_batch`."""
    check_batch(len(batch))
    return batch.view(processes(), -1, *batch.shape[1:])[number()]


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors of one type, in place, by their means over all processes."""
    if (n := processes()) == 1 or not (found := list(tensors)):
        return
    if len(found) == 1 and found[0].is_contiguous():
        dist.all_reduce(found[0])
        found[0].div_(n)
        return
    together = torch.cat([tensor.flatten() for tensor in found])
    dist.all_reduce(together)
    for tensor, mean in zip(found, together.div_(n).split([t.numel() for t in found]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def take_from_first(tensor: Tensor) -> None:
    """Give all processes the first one's values, in place."""
    if processes() > 1:
        dist.broadcast(tensor, 0)


def from_first(value: T) -> T:
    """What the first process has."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]
