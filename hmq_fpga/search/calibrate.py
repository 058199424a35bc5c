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

NOTHING = 0.9  # share of the square that the error of a format is, from where on it leaves nothing
SAMPLES = 512  # of the training set, for choosing thresholds by squared error


def max_thresholds_log2(model: QModel, task: Task) -> dict[str, int]:
    """M of every site: the least integer with `2^M >= |x|`, over a weight or over the whole training set.

    Outliers do not count, see `Magnitudes.threshold_log2`; neither do they in what follows from them.
    """
    found = magnitudes(model, task, clips(model, task))
    return {name: of.threshold_log2 for name, of in found.items()}


class LeastError:
    """The thresholds 2^M … 2^(M-8) of a tensor's format, judged by the squared error on values, added batch by batch.

    Of a value beyond 2^M, an outlier, the error is counted from there: else it alone would decide.
    """

    def __init__(self, *, signed: bool, bits: int, max_threshold_log2: int) -> None:
        self._candidates = [
            Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=max_threshold_log2 - k)
            for k in range(THRESHOLDS)
        ]
        self._limit = 2.0**max_threshold_log2
        self._errors = [0.0] * THRESHOLDS

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Let the values of `x` count, too."""
        x = x.clamp(-self._limit, self._limit)
        for k, format_ in enumerate(self._candidates):
            self._errors[k] += float((fake_quantize(x, Grid.of(format_)) - x).square().sum())

    @property
    def format(self) -> Fixed:
        """That of least error, and of equal ones the widest range."""
        return self._candidates[self._errors.index(min(self._errors))]


@torch.no_grad()
def leaves_nothing(x: Tensor, format_: Fixed, max_threshold_log2: int) -> bool:
    """Whether a format's squared error on values is nearly their own square: all of them become zero or tiny.

    Values beyond 2^M count as in `LeastError`.
    """
    x = x.detach().clamp(-(2.0**max_threshold_log2), 2.0**max_threshold_log2)
    return bool((fake_quantize(x, Grid.of(format_)) - x).square().sum() > NOTHING * x.square().sum())


def least_error_format(x: Tensor, *, signed: bool, bits: int, max_threshold_log2: int) -> Fixed:
    """The format of least squared quantization error on `x`; see `LeastError`."""
    found = LeastError(signed=signed, bits=bits, max_threshold_log2=max_threshold_log2)
    found.add(x)
    return found.format


@torch.no_grad()
def least_error_formats(
    model: QModel, task: Task, bits: Mapping[str, int], limits: Mapping[str, int]
) -> dict[str, Fixed]:
    """Formats of least squared quantization error on the float weights, and on activations of some training samples.

    Args:
        model: the instrumented network.
        task: training data.
        bits: bit-widths of the sites that are asked for, by name.
        limits: their M.
    """
    signed = {site.name: site.signed for site in model.sites}
    found = {
        name: LeastError(signed=signed[name], bits=width, max_threshold_log2=limits[name])
        for name, width in bits.items()
    }

    def observe(name: str, x: Tensor) -> None:
        if name in found:
            found[name].add(x)

    for name, weight in model.weights.items():
        observe(name, weight)
    if any(name not in model.weights for name in found):
        grids = clips(model, task)
        for batch in task.samples("train").head(SAMPLES)[0].split(task.batch_size):
            model(batch, grids=grids, observe=observe)
    return {name: errors.format for name, errors in found.items()}


def scheme_of(model: QModel, formats: Mapping[str, Fixed], found_by: Mapping[str, Any]) -> Scheme:
    """The scheme with these formats, by site name."""
    return Scheme(
        tuple(SchemeTensor(name=s.name, kind=s.kind, format=formats[s.name], size=s.size) for s in model.sites),
        found_by,
    )
