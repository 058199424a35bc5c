"""RAdam, as one operation for all parameters that learn at one rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hmq_fpga.search import kernels, parallel

BETAS = (0.9, 0.999)  # as in the HMQ paper
_EPS = 1e-8
_LONGEST = 2 / (1 - BETAS[1]) - 1  # rho_inf

Group = tuple[Iterable[nn.Parameter], float]
OptimizerFactory = Callable[[list[nn.Parameter], float], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class Stepper(Protocol):
    """Descends along gradients."""

    def step(self, loss: Tensor, share: float = 1.0) -> None:
        """One step along the gradient of `loss`, at `share` of the learning rates."""

    def state_dict(self) -> dict[str, Any]:
        """What it has seen; the values are the parameters' own."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""

    def release(self) -> None:
        """Leave the parameters to others."""


class RAdam:
    """The rectified Adam of Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (2020).

    It works element by element, so parameters may be parts of one vector: training is that of `torch.optim.RAdam`,
    also where a parameter gets no gradient. While this lives, they and their gradients are such parts, in their order
    of memory; afterwards `release` gives each its own storage back. Of several processes each has a gradient, and all
    step along the mean.

    Args:
        groups: parameters that learn, and their learning rate.
    """

    def __init__(self, *groups: Group) -> None:
        self._groups = [_Group([p for p in members if p.requires_grad], rate) for members, rate in groups]
        self._done = 0

    def step(self, loss: Tensor, share: float = 1.0) -> None:
        """One step along the gradient of `loss`, at `share` of the learning rates."""
        loss.backward()
        self.descend(share)

    def descend(self, share: float = 1.0) -> None:
        """One step along the gradients that the parameters have."""
        for group in self._groups:
            group.average()
        self._done += 1
        first, second = (1 - beta**self._done for beta in BETAS)
        length = _LONGEST - 2 * self._done * (1 - second) / second
        if rectified := length > 5:
            share *= math.sqrt(second * (length - 4) * (length - 2) * _LONGEST / length)
            share /= math.sqrt((_LONGEST - 4) * (_LONGEST - 2))
        for group in self._groups:
            group.descend(group.rate * share / first, rectified=rectified)

    def state_dict(self) -> dict[str, Any]:
        """Steps and running means; the values are the parameters' own."""
        return {"done": self._done, "groups": [group.state_dict() for group in self._groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""
        self._done = state["done"]
        for group, of_group in zip(self._groups, state["groups"], strict=True):
            group.load_state_dict(of_group)

    def release(self) -> None:
        """End the sharing; the values stay."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.data, parameter.grad = parameter.data.clone(), None


class Steps:
    """A user's optimizer, and RAdam for parameters of ours beside it.

    Args:
        optimizer: of the model's parameters.
        scheduler: makes its schedule; None: the shares that are asked for, of its own learning rates.
        steps: that there will be.
        others: RAdam of the other parameters.
    """

    def __init__(self, optimizer: Optimizer, scheduler: SchedulerFactory | None, steps: int, others: RAdam) -> None:
        self._optimizer, self._others = optimizer, others
        for parameter in self._parameters():
            parallel.take_from_first(parameter.data)
        self._schedule = scheduler(optimizer, steps) if scheduler else None
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def step(self, loss: Tensor, share: float = 1.0) -> None:
        """One step along the gradient of `loss`; others at `share` of their learning rates."""
        loss.backward()
        if self._schedule is None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * share
        parallel.average(p.grad for p in self._parameters() if p.grad is not None)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._schedule is not None:
            self._schedule.step()
        self._others.descend(share)

    def state_dict(self) -> dict[str, Any]:
        """Of the optimizers and the schedule."""
        schedule = self._schedule.state_dict() if self._schedule else {}
        return {"own": self._optimizer.state_dict(), "schedule": schedule, "others": self._others.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with another's."""
        self._optimizer.load_state_dict(state["own"])
        if self._schedule:
            self._schedule.load_state_dict(state["schedule"])
        self._others.load_state_dict(state["others"])

    def release(self) -> None:
        """Leave the parameters to others."""
        self._others.release()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])


class _Group:
    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self.parameters, self.rate = parameters, rate
        values = [_in_memory(p.detach()) for p in parameters]
        self._value = torch.cat(values) if values else torch.empty(0)
        parallel.take_from_first(self._value)
        self._grad, self._mean, self._square = (torch.zeros_like(self._value) for _ in range(3))
        sizes = [p.numel() for p in parameters]
        for parameter, *parts in zip(parameters, self._value.split(sizes), self._grad.split(sizes), strict=True):
            strides = parameter.stride() if _is_dense(parameter) else torch.empty(parameter.shape).stride()
            parameter.data, parameter.grad = (part.as_strided(parameter.shape, strides) for part in parts)

    def average(self) -> None:
        parallel.average([self._grad])

    def state_dict(self) -> dict[str, Any]:
        strides = [list(p.stride()) for p in self.parameters]  # those of the vectors' parts
        return {"mean": self._mean, "square": self._square, "strides": strides}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])

    def descend(self, factor: float, *, rectified: bool) -> None:
        vectors = (self._value, self._grad, self._mean, self._square)
        kernels.descend(vectors, BETAS, factor, _EPS if rectified else None)


def _is_dense(x: Tensor) -> bool:
    """Whether the values stand in memory without gaps, in one of two orders."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _in_memory(x: Tensor) -> Tensor:
    """The values in the order of memory, `(n,)`."""
    return x.as_strided((x.numel(),), (1,)) if _is_dense(x) else x.flatten()
