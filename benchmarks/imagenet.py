"""The networks of the HMQ paper at ImageNet's size: what reading, training, freezing and the integer reference cost.

    python benchmarks/imagenet.py

Rows are kept in `imagenet.json`, and networks already there are not measured again. Each is measured in a process of
its own on one thread, in processor time. Steps and their memory are as in `step_time.py`; of reading and freezing,
memory is the growth of the resident set to its peak. The choice of bit-widths and the comparison with the integer
reference take the same weights at 3x64x64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, fill
from scaling import MIB, _reset_peak, _status
from step_time import WARM_UP, Bench, Case
from torch import Tensor, nn

from hmq_fpga.ir import reference
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.widths import initial_formats
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target, weight_sites
from hmq_fpga.search.train import Task

CLASSES, SIDE, SMALL_SIDE, BATCH = 1000, 224, 64, 8
RATE = 8.0
LOOPS = ("float", "search", "finetune")
HERE = Path(__file__).parent
ROWS = HERE / "imagenet.json"

# --- the networks ----------------------------------------------------------------------------------------------------


def _convolution(
    n: int, m: int, kernel: int = 1, stride: int = 1, groups: int = 1, then: Callable[[], nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, BatchNorm, and a function."""
    convolution = nn.Conv2d(n, m, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(m), *([then()] if then else []))


def _classifier(n: int, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(n, CLASSES))


def mobilenet_v1() -> nn.Module:
    """Of Howard et al. (2017), width 1: 13 pairs of a depthwise and a pointwise convolution."""
    pairs = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    layers, n = [_convolution(3, 32, 3, 2)], 32
    for m, stride in pairs:
        layers += [_convolution(n, n, 3, stride, groups=n), _convolution(n, m)]
        n = m
    return nn.Sequential(*layers, _classifier(n))


class InvertedResidual(nn.Module):
    """A block of MobileNetV2 or EfficientNet: wider, depthwise, perhaps squeeze-and-excite, and narrow again."""

    def __init__(
        self, n: int, m: int, kernel: int, stride: int, expansion: int, then: Callable[[], nn.Module], excited: bool
    ) -> None:
        super().__init__()
        wide = n * expansion
        layers: list[nn.Module] = [_convolution(n, wide, then=then)] if expansion > 1 else []
        layers.append(_convolution(wide, wide, kernel, stride, wide, then))
        if excited:
            layers.append(SqueezeExcite(wide, n // 4))
        self.layers = nn.Sequential(*layers, _convolution(wide, m, then=None))
        self.residual = stride == 1 and n == m

    def forward(self, x: Tensor) -> Tensor:
        """Images."""
        return x + self.layers(x) if self.residual else self.layers(x)


class SqueezeExcite(nn.Module):
    """Channels times a gate that is computed from their means."""

    def __init__(self, n: int, narrow: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(n, narrow, 1), nn.SiLU(), nn.Conv2d(narrow, n, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Images."""
        return x * self.gate(x.mean((2, 3), keepdim=True))


def _inverted(
    stages: list[tuple[int, int, int, int, int]], last: int, then: Callable[[], nn.Module], excited: bool
) -> nn.Module:
    """A network of inverted residuals; a stage is expansion, channels, blocks, stride and kernel."""
    layers: list[nn.Module] = [_convolution(3, 32, 3, 2, then=then)]
    n = 32
    for expansion, m, blocks, stride, kernel in stages:
        for i in range(blocks):
            layers.append(InvertedResidual(n, m, kernel, 1 if i else stride, expansion, then, excited))
            n = m
    return nn.Sequential(*layers, _convolution(n, last, then=then), _classifier(last, 0.2))


def mobilenet_v2() -> nn.Module:
    """Of Sandler et al. (2018), width 1."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    return _inverted([(*stage, 3) for stage in stages], 1280, nn.ReLU6, excited=False)


def efficientnet_b0() -> nn.Module:
    """Of Tan and Le (2019), without stochastic depth, which acts in training alone."""
    stages = [
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ]
    return _inverted(stages, 1280, nn.SiLU, excited=True)


class Bottleneck(nn.Module):
    """A block of ResNet-50, with the stride in its 3x3 convolution."""

    def __init__(self, n: int, narrow: int, stride: int) -> None:
        super().__init__()
        m = 4 * narrow
        self.layers = nn.Sequential(
            _convolution(n, narrow), _convolution(narrow, narrow, 3, stride), _convolution(narrow, m, then=None)
        )
        self.shortcut = nn.Identity() if n == m and stride == 1 else _convolution(n, m, 1, stride, then=None)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Images."""
        return self.relu(self.layers(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """Of He et al. (2015), version 1.5."""
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    n = 64
    for narrow, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            layers.append(Bottleneck(n, narrow, 1 if i else stride))
            n = 4 * narrow
    return nn.Sequential(*layers, _classifier(n))


NETWORKS = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "resnet50": resnet50,
    "efficientnet_b0": efficientnet_b0,
}


@torch.no_grad()
def initial(name: str) -> nn.Module:
    """A network with random weights, whose BatchNorm layers have the statistics of a batch."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(torch.rand(BATCH, 3, SIDE, SIDE))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


# --- measurements ----------------------------------------------------------------------------------------------------


def costs(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a function returns, its seconds, and by how many MiB the resident set grew to its peak."""
    before, started = _reset_peak(), time.process_time()
    result = work()
    return result, {"seconds": time.process_time() - started, "mib": (_status("VmHWM") - before) / MIB}


def images(side: int) -> Task:
    """A batch of random ones."""
    x, y = torch.rand(BATCH, 3, side, side), torch.arange(BATCH)
    return Task(x_train=x, y_train=y, x_val=x, y_val=y, batch_size=BATCH)


def quantize(model: QModel, task: Task) -> float:
    """Set the formats from which `uniform` and its kin start, their bit-widths chosen for R_w; what it is then."""
    target = Target(weight_rate=RATE)
    formats = initial_formats(model, task, target, "mixed")
    model.set_scheme(scheme_of(model, formats, {}))
    return target.bounds(model)[0].reached({name: f.width for name, f in formats.items()})


def measure(name: str, turns: int) -> dict[str, Any]:
    """All figures of a network."""
    torch.set_num_threads(1)
    return {**conversions(name), **steps(name, turns)}


def conversions(name: str) -> dict[str, Any]:
    """What happens once: reading, choosing bit-widths, freezing; and whether the integer network computes the same."""
    instrument(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), (3, 2, 2))  # warms up
    float_model = initial(name)
    entry: dict[str, Any] = {"parameters": sum(p.numel() for p in float_model.parameters())}
    model, entry["read"] = costs(lambda: instrument(float_model, (3, SIDE, SIDE), input_signed=False))
    entry |= {"layers": len(weight_sites(model)), "sites": len(model.sites), "nodes": len(model.nodes)}
    entry["clips"] = [note for note in model.notes if "clips at" in note]

    small, task = instrument(float_model, (3, SMALL_SIDE, SMALL_SIDE), input_signed=False), images(SMALL_SIDE)
    entry["rate"], entry["choice"] = costs(lambda: quantize(small, task))
    net = freeze(small)
    sample = task.x_val[:1]
    expected, entry["reference"] = costs(lambda: reference.run(net, sample.movedim(1, -1).numpy()))
    entry["differing"] = int((run_codes(small, sample, net.output_format) != expected).sum())

    model.set_scheme(scheme_of(model, small.formats, {}))
    net, entry["freeze"] = costs(lambda: freeze(model))
    return entry | {"ops": len(net.ops)}


def steps(name: str, turns: int) -> dict[str, Any]:
    """Each loop's seconds of a step, its ratio to the float one's, and its memory."""
    bench = Bench(Case(build=partial(initial, name), shape=(3, SIDE, SIDE), batch=BATCH, block=2))
    loops = {loop: bench.loop(loop) for loop in LOOPS}
    rounds = [{loop: bench.block(run, WARM_UP + 2) for loop, run in loops.items()} for _ in range(turns)]
    return {
        loop: {
            "seconds": statistics.median(r[loop] for r in rounds),
            "ratio": statistics.median(r[loop] / r["float"] for r in rounds),
            "mib": bench.peak(loop) / MIB,
        }
        for loop in LOOPS
    }


def page(rows: list[Row]) -> str:
    """A column for each network."""
    rows = sorted(rows, key=lambda row: list(NETWORKS).index(row["network"]))
    turns = " or ".join(str(n) for n in sorted({row["turns"] for row in rows}))
    lines = [
        "# The paper's networks at ImageNet's size",
        "",
        "Initial weights (BatchNorm with the statistics of one batch), random images, batches of 8 at 3x224x224,",
        f"one thread: processor seconds, the median of {turns} turns; in brackets the ratios of time and memory to",
        "the float step. Memory of steps is the highest of a loop's life, as in [speed.md](speed.md); of what",
        "happens once the growth of the resident set. Bit-widths are those of least total rise of the loss at R_w =",
        "8; they and the comparison with PyTorch take one batch, and one image, of 3x64x64. Nothing is trained, so",
        "nothing is said of accuracy, and there is one seed, 0. ResNet-50 is version 1.5, EfficientNet-B0 without",
        "stochastic depth. Made by `python benchmarks/imagenet.py`; two cores of x86-64.",
        "",
        "| | " + " | ".join(f"`{row['network']}`" for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for title, figure in FIGURES.items():
        lines.append(f"| {title} | {' | '.join(map(figure, rows))} |")
    return "\n".join(lines) + "\n"


def _cost(name: str, row: Row) -> str:
    return f"{row[name]['seconds']:.3g} s, {row[name]['mib']:,.0f} MiB"


def _step(loop: str, row: Row) -> str:
    return f"{_cost(loop, row)} ({row[loop]['ratio']:.2f}, {row[loop]['mib'] / row['float']['mib']:.2f})"


FIGURES: dict[str, Callable[[Row], str]] = {
    "parameters": lambda row: f"{row['parameters']:,}",
    "layers with weights / formats / ops of the integer network": lambda row: (
        f"{row['layers']} / {row['sites']} / {row['ops']}"
    ),
    "reading": partial(_cost, "read"),
    "float training step": partial(_cost, "float"),
    "search step": partial(_step, "search"),
    "fine-tuning step": partial(_step, "finetune"),
    "choice of bit-widths": partial(_cost, "choice"),
    "R_w by it": lambda row: f"{row['rate']:.3f}",
    "freezing": partial(_cost, "freeze"),
    "integer reference, one image of 64x64": partial(_cost, "reference"),
    "outputs that differ from PyTorch's": lambda row: f"{row['differing']} of {CLASSES}",
    "clips that move": lambda row: str(sum("scaled" not in note for note in row["clips"])),
}


def main() -> None:
    """Measure each in a process of its own, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS), help="some of them [all]")
    parser.add_argument("--turns", type=int, default=2, help="blocks of each loop [2]")
    parser.add_argument("--one", choices=NETWORKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.turns)))  # noqa: T201
        return
    wanted = ({"network": name, "turns": arguments.turns} for name in arguments.network)
    (HERE / "imagenet.md").write_text(page(fill(ROWS, wanted, _apart)))


def _apart(*, network: str, turns: int) -> Row:
    command = [sys.executable, __file__, "--one", network, "--turns", str(turns)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
