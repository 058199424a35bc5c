"""HMQ's search step as the authors compute it, against the package's, taking turns in one process.

    python benchmarks/authors_step.py

Rows are kept in `speed.json`, and cases already there are not measured again.

Their arithmetic, not their code: one Gumbel-softmax for every tensor, with noise for every sample of an activation and
every input channel of a weight, and plain operations that autograd differentiates, with float masks. In phase two
they compute the softmax again. BatchNorm stays a float layer in training mode; neither input nor logits are quantized.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, fill
from step_time import AUTHORS, CASES, HERE, ROWS, WARM_UP, Bench, page
from torch import Tensor, nn

from hmq_fpga.search.optimizer import BETAS
from hmq_fpga.search.train import Task

THRESHOLDS = 8
WIDTHS = tuple(range(1, 9))
COMPARED = ("mlp_b64", "cnn_b128")


class Block(nn.Module):
    """The quantizer of one tensor: noise along its first dimension, or for weights their second."""

    def __init__(self, *, weight: bool) -> None:
        super().__init__()
        widths = WIDTHS if weight else (8,)
        self.weight, self.signed = weight, float(weight)
        self.logits = nn.Parameter(0.01 * torch.randn(THRESHOLDS, len(widths)))
        thresholds = 2.0 ** (1 - torch.arange(THRESHOLDS, dtype=torch.float32))
        self.register_buffer("thresholds", thresholds)
        levels = 2.0 ** (torch.tensor(widths) - self.signed)
        self.register_buffer("steps", thresholds[:, None] / levels)
        self.register_buffer("widths", torch.tensor(widths, dtype=torch.float32))

    def forward(self, x: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        """Quantized tensor and expected width; without a temperature the most probable pair, as in phase two."""
        n = x.shape[1 if self.weight else 0]
        log_p = torch.log_softmax(self.logits.flatten(), 0).expand(n, -1)
        if temperature is None:
            p = F.one_hot(torch.softmax(log_p, 1).argmax(1), log_p.shape[1]).float()
        else:
            uniform = torch.rand_like(log_p)
            noise = -torch.log(-torch.log(uniform + 1e-10) + 1e-10)
            p = torch.softmax((log_p + noise) / temperature, 1)
        p = p.view(n, *self.steps.shape)
        shape = [1] * x.dim()
        shape[1 if self.weight else 0] = n
        step = (p * self.steps).sum((1, 2)).view(shape)
        top = (p.sum(2) * self.thresholds).sum(1).view(shape)
        scaled = x / step
        level = step * (scaled + (torch.round(scaled) - scaled).detach())
        low = -self.signed * (top - step)
        above, below = (level > top).float(), (level < low).float()
        quantized = above * top + below * low + (1 - above) * (1 - below) * level
        return quantized, (p.sum(1) * self.widths).sum(1).mean()


class Model(nn.Module):
    """A `Sequential` network whose weights and ReLUs are quantized."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.network = network
        self.blocks = nn.ModuleDict(
            {
                str(i): Block(weight=not isinstance(layer, nn.ReLU))
                for i, layer in enumerate(network)
                if isinstance(layer, nn.Linear | nn.Conv2d | nn.ReLU)
            }
        )

    def forward(self, x: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        """Logits, and the bits of all weights."""
        bits = x.new_zeros(())
        for i, layer in enumerate(self.network):
            if isinstance(layer, nn.ReLU):
                x, _ = self.blocks[str(i)](F.relu(x), temperature)
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                weight, width = self.blocks[str(i)](layer.weight, temperature)
                bits = bits + width * weight.numel()
                x = F.linear(x, weight, layer.bias) if isinstance(layer, nn.Linear) else _conv(layer, x, weight)
            else:
                x = layer(x)
        return x, bits


def _conv(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def authors_loop(model: Model, task: Task, temperature: float | None) -> None:
    """Search at a temperature, or fine-tune without one."""
    weights = list(model.network.parameters())
    groups = [{"params": weights, "lr": 1e-4}, {"params": list(model.blocks.parameters()), "lr": 1e-2}]
    optimizer = torch.optim.RAdam(groups if temperature else groups[:1], betas=BETAS)
    size = sum(weight.numel() for weight in weights if weight.dim() > 1)
    while True:
        for x, y in zip(task.x_train.split(task.batch_size), task.y_train.split(task.batch_size), strict=True):
            outputs, bits = model(x, temperature)
            loss = task.loss(outputs, y)
            if temperature:
                loss = loss + 32 * (torch.relu(8 - 32 * size / bits) / 8) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _measure(*, case: str, against: str) -> Row:  # noqa: ARG001
    torch.set_num_threads(1)
    network = CASES[case]
    bench = Bench(network)
    model, ours = Model(network.build()), bench.loops()
    theirs: dict[str, Callable[[Task], None]] = {
        "search": lambda task: authors_loop(model, task, 1.0),
        "finetune": lambda task: authors_loop(model, task, None),
    }
    steps = WARM_UP + network.block
    ratios: dict[str, list[float]] = {"search": [], "finetune": []}
    for _ in range(network.turns):
        for name, values in ratios.items():
            values.append(bench.block(theirs[name], steps) / bench.block(ours[name], steps))
    row: Row = {"threads": 1, "turns": network.turns}
    for name, values in ratios.items():
        low, median, high = (round(v, 2) for v in statistics.quantiles(values, n=4))
        row |= {name: median, f"{name}_quartiles": [low, high]}
    return row


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=COMPARED, nargs="+", default=list(COMPARED), help="some of them [all]")
    arguments = parser.parse_args()
    rows = fill(ROWS, ({"case": name, "against": AUTHORS} for name in arguments.case), _measure)
    (HERE / "speed.md").write_text(page(rows))


if __name__ == "__main__":
    main()
