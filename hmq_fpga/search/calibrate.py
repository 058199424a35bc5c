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
from hmq_fpga.search.quantizers import THRESHOLDS, Grid, fake_quantize
from hmq_fpga.search.ranges import clips, magnitudes
from hmq_fpga.search.train import Task

SAMPLES = 512  # of the training set, for choosing thresholds by squared error


def max_thresholds_log2(model: QModel, task: Task) -> dict[str, int]:
    """M of every site: the least integer with `2^M >= |x|`, over a weight or over the whole training set.

    Outliers do not count, see `Magnitudes.threshold_log2`; neither do they in what follows from them.
    """
    found = magnitudes(model, task, clips(model, task))
    return {name: of.threshold_log2 for name, of in found.items()}


@torch.no_grad()
def samples(model: QModel, task: Task) -> dict[str, Tensor]:
    """Float values of every site, by name: the weights, and the activations of some training samples."""
    tensors = {name: weight.detach() for name, weight in model.weights.items()}
    model(task.x_train[:SAMPLES], grids=clips(model, task), observe=tensors.__setitem__)
    return tensors


def least_error_format(x: Tensor, *, signed: bool, bits: int, max_threshold_log2: int) -> Fixed:
    """The format, among the thresholds 2^M … 2^(M-8), of least squared quantization error on `x`.

    Of a value beyond 2^M, an outlier, the error is counted from there: else it alone would decide.
    """
    candidates = [
        Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=max_threshold_log2 - k) for k in range(THRESHOLDS)
    ]
    limit = 2.0**max_threshold_log2
    x = x.detach().clamp(-limit, limit)
    return min(candidates, key=lambda f: float((fake_quantize(x, Grid.of(f)) - x).square().sum()))


def scheme_of(model: QModel, formats: Mapping[str, Fixed], found_by: Mapping[str, Any]) -> Scheme:
    """The scheme with these formats, by site name."""
    return Scheme(
        tuple(SchemeTensor(name=s.name, kind=s.kind, format=formats[s.name], size=s.size) for s in model.sites),
        found_by,
    )
