"""RAdam, as one operation for all parameters that learn at one rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hmq_fpga.search import kernels

BETAS = (0.9, 0.999)  # as in the HMQ paper
_EPS = 1e-8
_LONGEST = 2 / (1 - BETAS[1]) - 1  # rho_inf


class RAdam:
    """The rectified Adam of Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (2020).

    It works element by element, so parameters may be parts of one vector: training is that of `torch.optim.RAdam`,
    also where a parameter gets no gradient. While this lives, they and their gradients are such parts; afterwards
    `release` gives each its own storage back.

    Args:
        groups: parameters that learn, and their learning rate.
    """

    def __init__(self, *groups: tuple[Iterable[nn.Parameter], float]) -> None:
        self._groups = [_Group([p for p in members if p.requires_grad], rate) for members, rate in groups]
        self._done = 0

    def step(self, loss: Tensor, share: float = 1.0) -> None:
        """One step along the gradient of `loss`, at `share` of the learning rates."""
        loss.backward()
        self._done += 1
        first, second = (1 - beta**self._done for beta in BETAS)
        length = _LONGEST - 2 * self._done * (1 - second) / second
        if rectified := length > 5:
            share *= math.sqrt(second * (length - 4) * (length - 2) * _LONGEST / length)
            share /= math.sqrt((_LONGEST - 4) * (_LONGEST - 2))
        for group in self._groups:
            group.descend(group.rate * share / first, rectified=rectified)

    def release(self) -> None:
        """End the sharing; the values stay."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.data, parameter.grad = parameter.data.clone(), None


class _Group:
    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self.parameters, self.rate = parameters, rate
        values = [p.detach().flatten() for p in parameters]
        self._value = torch.cat(values) if values else torch.empty(0)
        self._grad, self._mean, self._square = (torch.zeros_like(self._value) for _ in range(3))
        sizes = [p.numel() for p in parameters]
        for parameter, value, grad in zip(parameters, self._value.split(sizes), self._grad.split(sizes), strict=True):
            parameter.data, parameter.grad = value.view_as(parameter), grad.view_as(parameter)

    def descend(self, factor: float, *, rectified: bool) -> None:
        vectors = (self._value, self._grad, self._mean, self._square)
        kernels.descend(vectors, BETAS, factor, _EPS if rectified else None)
