"""Zero weights, which R_w does not see and hardware does not build.

The task loss alone prefers small thresholds that saturate many weights. At the same bit-widths, hence the same R_w,
larger thresholds round more weights to zero, and a pull towards zero while fine-tuning keeps them there: fully
unrolled logic shrinks at little loss. This is an option, no part of HMQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import Grid, fake_quantize

WIDER = 3  # thresholds up to 2^3 times the one that was found
ADJUSTMENTS = 200  # of the pull, over the whole training
ADJUSTED_UNTIL = 0.7  # of the training: later the learning rate is too small to answer
FACTOR = 1.1  # of one adjustment
INITIAL_PULL = 1e-5


def share_of_zeros(weight: Tensor, format_: Fixed) -> float:
    """Share of a weight's codes that are zero."""
    return float((fake_quantize(weight.detach(), Grid.of(format_)) == 0).double().mean())


def widen_thresholds(model: QModel, scheme: Scheme, zeros: float) -> Scheme:
    """The scheme with each weight's threshold enlarged until its share of zeros is nearest to `zeros`."""
    formats = {name: scheme[name].format for name in scheme}
    for name, weight in model.weights.items():
        found = formats[name]
        wider = [Fixed(found.signed, found.width, found.frac - k) for k in range(WIDER + 1)]
        formats[name] = min(wider, key=lambda f: abs(share_of_zeros(weight, f) - zeros))
    return scheme_of(model, formats, {**scheme.found_by, "zeros": zeros})


class ZeroPull:
    """L1 penalty on the weights, whose strength follows from the share of zeros that is wanted.

    The strength grows while there are fewer zeros than wanted and falls while there are more.
    """

    def __init__(self, model: QModel, zeros: float) -> None:
        self._model, self._zeros = model, zeros
        self._pull = INITIAL_PULL

    def __call__(self, step: int, steps: int) -> Tensor:
        """The penalty before optimizer step `step` of `steps`."""
        if step % max(steps // ADJUSTMENTS, 1) == 0 and step < ADJUSTED_UNTIL * steps:
            self._pull *= FACTOR if self.share() < self._zeros else 1 / FACTOR
        weights = self._model.weights.values()
        return self._pull * torch.stack([weight.abs().sum() for weight in weights]).sum()

    def share(self) -> float:
        """Share of zeros among all weight codes."""
        weights, formats = self._model.weights, self._model.formats
        zeros = sum(share_of_zeros(weight, formats[name]) * weight.numel() for name, weight in weights.items())
        return zeros / sum(weight.numel() for weight in weights.values())
