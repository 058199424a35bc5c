"""How large the values of tensors are: the threshold that they need, and what a format does not hold of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search import kernels
from hmq_fpga.search.graph import QModel, Site
from hmq_fpga.search.layers import parted
from hmq_fpga.search.quantizers import Grid
from hmq_fpga.search.train import Task

RARE = 1e-3  # share of values that need not be held where they lie far beyond the others
FEW = 1 / 32  # never more of them than this share
FAR = 2  # octaves beyond the others from where on values are outliers; up to there the paper's rule stands
CLIPPED_FAR = 3  # octaves by which a search may clip weights, of which some always are
LEAST_BITS = 4  # fewer lose most weights by themselves
SHARES = (0.0, 0.01, 0.25, 0.5, 0.75, 1.0)  # of a tensor's values: from the least to the largest
_ZERO = 127  # place of 2^0 among the counts
_LEAST = 1e-9  # of a value, so that the least is found


@dataclass(eq=False)
class Magnitudes:
    """Counts of a tensor's values by the power of two that they need, gathered batch by batch.

    Attributes:
        at_once: values that belong together and may all be outliers: of a sample, or one weight.
        counts: see `kernels.magnitudes`.
    """

    at_once: int
    counts: kernels.Array = field(default_factory=lambda: np.zeros(kernels.MAGNITUDES, np.int64))

    def add(self, x: Tensor) -> None:
        """Count the values of `x` too."""
        self.counts += kernels.magnitudes(x)

    @property
    def nonzero(self) -> int:
        """How many values are not zero."""
        return int(self.counts[1:].sum())

    def beyond(self, log2: int) -> int:
        """How many values exceed `2^log2` in magnitude."""
        return int(self.counts[max(log2 + _ZERO, 0) + 1 :].sum())

    def quantiles(self) -> list[float]:
        """log2 of the magnitudes below which `SHARES` of the values lie that are not zero; empty where all are zero.

        Within an octave, which is all that is counted, values are taken to lie evenly.
        """
        counts, wanted = self.counts[1:], np.maximum(np.array(SHARES) * self.nonzero, _LEAST)
        if not self.nonzero:
            return []
        upto = np.cumsum(counts)
        octave = np.searchsorted(upto, wanted)
        within = 1 - (upto[octave] - wanted) / counts[octave]
        return [round(float(log2), 3) for log2 in octave - _ZERO + within]

    @property
    def largest_log2(self) -> int:
        """The paper's M: the least integer with `2^M >= max|x|`; 0 where all are zero."""
        return self._least(0)

    @property
    def threshold_log2(self) -> int:
        """M, without outliers.

        These are the values beyond a threshold that holds all others, if they are rare and the largest needs a
        threshold more than `FAR` octaves above it.
        """
        n = self.nonzero
        held, largest = self._least(max(RARE * n, min(self.at_once, FEW * n))), self.largest_log2
        return held if largest - held > FAR else largest

    def _least(self, left: float) -> int:
        """The least integer m such that at most `left` values lie beyond `2^m`."""
        if not self.nonzero:
            return 0
        beyond = self.nonzero - np.cumsum(self.counts[1:])
        return int(np.flatnonzero(beyond <= left)[0]) + 1 - _ZERO


@torch.no_grad()
def magnitudes(model: QModel, task: Task, grids: Mapping[str, Grid] | None = None) -> dict[str, Magnitudes]:
    """Those of every site, over its weight or the training set, before its own quantizer; `grids` as for `model`."""
    found = {site.name: Magnitudes(_at_once(site)) for site in model.sites}
    for name, weight in model.weights.items():
        found[name].add(weight)
    for batch, _ in task.samples("train").in_order(task.batch_size):
        model(batch, grids=grids, observe=lambda name, x: found[name].add(x))
    return found


@torch.no_grad()
def clips(model: QModel, task: Task) -> dict[str, Grid]:
    """What takes the outliers off weights and inputs and leaves all else as it is, by site; mostly empty.

    Without them, float activations are those that a quantized network will see.
    """
    weights, inputs = model.weights, model.inputs
    found = {site.name: Magnitudes(_at_once(site)) for site in model.sites if site.name in {*weights, *inputs}}
    for name, weight in weights.items():
        found[name].add(weight)
    for batch, _ in task.samples("train").in_order(task.batch_size):
        for name, part in zip(inputs, parted(batch, list(inputs.values())), strict=True):
            found[name].add(part)
    fine = {name: m.threshold_log2 for name, m in found.items() if m.threshold_log2 < m.largest_log2}
    return {name: Grid.of(Fixed.from_threshold(signed=True, bits=32, threshold_log2=m)) for name, m in fine.items()}


def range_notes(model: QModel, task: Task, *, sparse: bool = False) -> list[str]:
    """What the formats of a scheme do not hold of weights and training data, one sentence each, with the remedy.

    Said are inputs and activations of which more than a `RARE` share is clipped, weights that are clipped by more than
    the searches do, outliers of any number, and tensors of which a format makes most values zero that are not.
    `sparse`: zero weights are wanted.
    """
    return notes_on(model, magnitudes(model, task), sparse=sparse)


def notes_on(model: QModel, found: Mapping[str, Magnitudes], *, sparse: bool = False) -> list[str]:
    """The same of magnitudes that have been gathered."""
    return [note for site in model.sites for note in _notes(site, model.formats[site.name], found[site.name], sparse)]


def _notes(site: Site, format_: Fixed, found: Magnitudes, sparse: bool) -> Iterator[str]:
    weight, m, n = site.kind == "weight", format_.threshold_log2, found.nonzero
    clipped, largest = found.beyond(m), found.largest_log2
    outliers = clipped and largest > max(m, found.threshold_log2) + FAR
    if outliers or found.beyond(m + CLIPPED_FAR * weight) > RARE * n:
        yield (
            f"{site.name}: {clipped} of {n} values that are not zero ({clipped / n:.2%}) exceed its threshold 2**{m}, "
            f"up to 2**{largest}, and are clipped: {_CLIPPED[site.kind]}"
        )
    half_step = m - max(format_.width, LEAST_BITS) + format_.signed - 1
    if (lost := n - found.beyond(half_step)) > n / 2 and not (weight and sparse):
        yield (
            f"{site.name}: {lost} of {n} values that are not zero ({lost / n:.2%}) become zero in {format_.width} bits "
            f"with its threshold 2**{m}: {_LOST[site.kind]}"
        )


_CLIPPED = {
    "input": "correct or leave out samples that are faulty, or scale the features alike (--normalize)",
    "activation": "look for outliers in samples and weights, or put a BatchNorm before it",
    "weight": "fine-tune for longer, or train the float model with weight decay",
}
_LOST = {
    "input": "scale the features alike (--normalize)",
    "activation": "scale its channels alike by a BatchNorm before it, or give it more bits by a smaller R_a",
    "weight": "give it more bits (tensor_bits), or train the float model with weight decay",
}


def _at_once(site: Site) -> int:
    return 1 if site.kind == "weight" else site.size
