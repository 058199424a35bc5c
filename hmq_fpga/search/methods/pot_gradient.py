"""Power-of-two thresholds that learn by gradient, along with the weights.

Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep Neural Networks"
(2020), TQT; for weights of 4 bits and below as in Park, You, Nagel, Chang, "A Closer Look at Hardware-Friendly Weight
Quantization" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import Activation
from hmq_fpga.search.methods.training import train_through
from hmq_fpga.search.methods.widths import Widths, initial_formats
from hmq_fpga.search.quantizers import Grid, TrainedGrid
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, History, Listener, Task

_NEW = 0.02  # share of the newest in the running mean of a threshold's logarithm


@dataclass(frozen=True, kw_only=True)
class PotGradientOptions:
    """Options of `pot_gradient`.

    Attributes:
        widths: `mixed`, by the knapsack with measured costs; or `uniform`, one for all weights, as in the papers.
        learning_rate: of the thresholds' logarithms at the start; it falls to zero along a cosine. The optimizer is
            Adam, for which it does not matter how large their gradients are, which sum over a tensor.
        turns: a threshold that has gone back so many times stays at the power where it was on average.
    """

    widths: Widths = "mixed"
    learning_rate: float = 1e-2
    turns: int = 4

    def __post_init__(self) -> None:
        if self.widths not in get_args(Widths):
            raise InvalidInput(f"widths {self.widths!r}: choose from {', '.join(get_args(Widths))}")
        if not (self.learning_rate > 0 and self.turns >= 1):
            raise InvalidInput("pot_gradient: learning_rate must be positive, turns at least 1")


def pot_gradient(
    model: QModel,
    task: Task,
    budget: Budget,
    target: Target,
    options: PotGradientOptions,
    *,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,
) -> tuple[QModel, Scheme, History]:
    """Choose bit-widths, then train weights and the thresholds of all tensors together.

    Raises:
        InvalidInput: where all weights are to have one bit-width, and the target has some of single tensors.
    """
    formats = initial_formats(model, task, target, options.widths)
    limits = {
        node.name: layer.limit_log2
        for node, layer in zip(model.nodes, model.layers, strict=True)
        if isinstance(layer, Activation) and layer.limit_log2 is not None
    }
    thresholds = Thresholds(formats, limits, turns=options.turns).to(next(model.parameters()))

    def grids(_step: int, _x: Tensor, _y: Tensor) -> dict[str, TrainedGrid]:
        thresholds.settle()
        return thresholds.grids()

    adam = torch.optim.Adam(thresholds.parameters(), options.learning_rate)
    history = train_through(
        model,
        task,
        budget,
        grids,
        adam,
        parts={"thresholds": thresholds},
        settings=("pot_gradient", options, target),
        seed=seed,
        listener=listener,
        checkpoint=checkpoint,
    )
    thresholds.settle()
    scheme = scheme_of(model, thresholds.formats(), {"method": "pot_gradient", "widths": options.widths})
    model.set_scheme(scheme)
    return model, scheme, history


class Thresholds(nn.Module):
    """Thresholds `2**ceil(s)` of tensors, with a straight-through gradient of the ceiling: `dt/ds = t ln 2`.

    Args:
        formats: what they start from, by name; each `s` in the middle of what makes its threshold.
        limits: logarithms that thresholds must not exceed, by name.
        turns: changes of direction after which a threshold stays.
    """

    unit: Tensor
    most: Tensor
    mean: Tensor
    stays: Tensor  # the logarithm of the threshold; NaN while it moves
    turned: Tensor
    power: Tensor
    direction: Tensor

    def __init__(self, formats: Mapping[str, Fixed], limits: Mapping[str, int] | None = None, *, turns: int) -> None:
        super().__init__()
        self._formats, self._turns = dict(formats), turns
        powers = torch.tensor([float(f.threshold_log2) for f in formats.values()])
        most = [float((limits or {}).get(name, math.inf)) for name in formats]
        self.log2 = nn.Parameter(powers - 0.5)
        state = {
            "unit": torch.tensor([Grid.of(f.with_threshold(0)) for f in formats.values()]),
            "most": torch.tensor(most),
            "mean": powers - 0.5,
            "stays": torch.full_like(powers, math.nan),
            "turned": torch.zeros_like(powers),
            "power": powers,
            "direction": torch.zeros_like(powers),
        }
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: keep within the limits, count turns, and let stay what has turned too often."""
        self.log2.clamp_(max=self.most)
        self.mean.lerp_(self.log2, _NEW)
        power = self.log2.ceil()
        moved = (power - self.power).sign()
        self.turned += moved * self.direction < 0
        self.direction = torch.where(moved == 0, self.direction, moved)
        self.power = power
        now = (self.turned >= self._turns) & self.stays.isnan()
        self.stays = torch.where(now, self.mean.ceil(), self.stays)

    def grids(self) -> dict[str, TrainedGrid]:
        """The quantizers by name; those that stay get no gradient."""
        moves = self.stays.isnan()
        threshold = torch.ldexp(torch.ones_like(self.log2), self._powers()).detach()
        passed = torch.exp2(self.log2 - self.log2.detach())  # one, whose gradient is that of the logarithm
        rows = (threshold * torch.where(moves, passed, 1.0)).unsqueeze(1) * self.unit
        grids = zip(rows.unbind(), rows.tolist(), strict=True)
        return {name: TrainedGrid(row, Grid(*values)) for name, (row, values) in zip(self._formats, grids, strict=True)}

    def formats(self) -> dict[str, Fixed]:
        """The present formats by name."""
        powers = zip(self._formats.items(), self._powers().tolist(), strict=True)
        return {name: f.with_threshold(int(power)) for (name, f), power in powers}

    def _powers(self) -> Tensor:
        return torch.where(self.stays.isnan(), self.log2.detach().ceil(), self.stays)
