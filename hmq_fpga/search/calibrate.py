"""Ranges of the float model's tensors on the training set: what every method starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.ir.scheme import Tensor as SchemeTensor
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import THRESHOLDS, Grid, fake_quantize, least_threshold_log2
from hmq_fpga.search.train import Task

SAMPLES = 512  # of the training set, for choosing thresholds by squared error


@torch.no_grad()
def max_thresholds_log2(model: QModel, task: Task) -> dict[str, int]:
    """M of every site: the least integer with `2^M >= max|x|`, over a weight or over the whole training set."""
    largest = {name: float(weight.abs().max()) for name, weight in model.weights.items()}

    def observe(name: str, tensor: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(tensor.abs().max()))

    for batch in task.x_train.split(task.batch_size):
        model(batch, grids={}, observe=observe)
    return {site.name: least_threshold_log2(largest[site.name]) for site in model.sites}


@torch.no_grad()
def samples(model: QModel, task: Task) -> dict[str, Tensor]:
    """Float values of every site, by name: the weights, and the activations of some training samples."""
    tensors = {name: weight.detach() for name, weight in model.weights.items()}
    model(task.x_train[:SAMPLES], grids={}, observe=tensors.__setitem__)
    return tensors


def least_error_format(x: Tensor, *, signed: bool, bits: int, max_threshold_log2: int) -> Fixed:
    """The format, among the thresholds 2^M … 2^(M-8), of least squared quantization error on `x`."""
    candidates = [
        Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=max_threshold_log2 - k) for k in range(THRESHOLDS)
    ]
    x = x.detach()
    return min(candidates, key=lambda f: float((fake_quantize(x, Grid.of(f)) - x).square().sum()))


def scheme_of(model: QModel, formats: Mapping[str, Fixed], found_by: Mapping[str, Any]) -> Scheme:
    """The scheme with these formats, by site name."""
    return Scheme(
        tuple(SchemeTensor(name=s.name, kind=s.kind, format=formats[s.name], size=s.size) for s in model.sites),
        found_by,
    )
