"""What quantization adds to a training step: time and memory as ratios to the float network's.

    python benchmarks/step_time.py

Rows are kept in `speed.json`, and cases already there are not measured again; those of `authors_step.py` lie beside.

The float step is that of a plain loop on the user's own model, BatchNorm included, with PyTorch's own RAdam as it
comes; `channels_last` is that loop with model and batches in this order of memory. The search step is
`find_scheme`'s, the fine-tuning step `finetune`'s: the loops of the package, timed from one call of the loss to the
next. `fit` is the package's loop on the same float model. They take turns in one process, a block of steps each, and
every turn gives one ratio; the table has the median and the quartiles of these. Memory is the highest sum of what
PyTorch allocated and has not freed since the model was made, in the profiler's record of a few steps: model, gradients,
optimizer state, activations and what the backward pass keeps; data are not in it.

Times are processor time: on a machine that is shared, elapsed time is unfair to the longer step, which is interrupted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Row, fill
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.ir.scheme import Tensor as SchemeTensor
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.optimizer import BETAS
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Task, finetune, fit
from hmq_fpga.study.tasks import TASKS

FOREVER = 10**6  # steps that a loop plans for: it is stopped long before, and never evaluates
LOOPS = ("float", "search", "finetune", "fit", "channels_last")
WARM_UP = 3  # steps of a block that do not count
PLAIN, AUTHORS = "a plain loop", "the authors"
HERE = Path(__file__).parent
ROWS = HERE / "speed.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and its batches: steps of a block, and how many turns."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    block: int
    turns: int = 9


def _peers_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for n, m, stride in ((1, 16, 1), (16, 16, 2), (16, 32, 2)):
        layers += [nn.Conv2d(n, m, 3, stride=stride, padding=1), nn.BatchNorm2d(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


_MLP = TASKS["pendigits_mlp"].build
CASES = {
    "mlp_b64": Case(build=_MLP, shape=(16,), batch=64, block=60),
    "mlp_b1024": Case(build=_MLP, shape=(16,), batch=1024, block=30),
    "cnn_b128": Case(build=_peers_cnn, shape=(1, 28, 28), batch=128, block=8),
    "resnet8_b32": Case(build=TASKS["resnet8_cifar"].build, shape=(3, 32, 32), batch=32, block=6, turns=5),
    "resnet18_b32": Case(build=TASKS["resnet18_cifar"].build, shape=(3, 32, 32), batch=32, block=2, turns=2),
}


class Enough(Exception):
    """The block is over."""


@dataclass
class Clock:
    """A loss that notes when it is called, and ends the loop after so many steps."""

    steps: int
    times: list[float] = field(default_factory=list)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        if torch.is_grad_enabled():
            self.times.append(time.process_time())
            if len(self.times) > self.steps:
                raise Enough
        return F.cross_entropy(outputs, targets)

    @property
    def seconds(self) -> float:
        """Of a step."""
        times = self.times[WARM_UP:]
        return statistics.median(b - a for a, b in pairwise(times))


class Bench:
    """The loops of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        n = 4 * case.batch
        self.x = torch.rand(n, *case.shape, generator=generator)
        self.y = torch.randint(10, (n,), generator=generator)
        torch.manual_seed(0)
        self.model = case.build()

    def loops(self) -> dict[str, Callable[[Task], Any]]:
        """Each ready to run on a task."""
        return {name: self.loop(name) for name in LOOPS}

    def loop(self, name: str) -> Callable[[Task], Any]:
        """One of `LOOPS`, on a model of its own."""
        if name == "float":
            model = self.case.build()
            return lambda task: plain_loop(model, task)
        if name == "channels_last":
            return lambda task: plain_loop(self.case.build(), task, order=torch.channels_last)
        if name == "fit":
            model = self.case.build()
            return lambda task: fit(model, task, steps=FOREVER, learning_rate=1e-4, seed=0)
        quantized = instrument(self.model, self.case.shape, input_signed=False)
        if name == "search":
            budget, target = Budget(search_steps=FOREVER, learning_rate=1e-4), Target(weight_rate=8)
            return lambda task: find_scheme(quantized, task, budget, target)
        eight_bits = [
            SchemeTensor(name=s.name, kind=s.kind, size=s.size, format=Fixed(s.signed, 8, 7)) for s in quantized.sites
        ]
        quantized.set_scheme(Scheme(tuple(eight_bits), {}))
        return lambda task: finetune(quantized, task, steps=FOREVER, learning_rate=1e-4, seed=0)

    def block(self, loop: Callable[[Task], Any], steps: int) -> float:
        """Seconds of a step of a loop."""
        clock = Clock(steps)
        small = slice(self.case.batch)
        task = Task(
            x_train=self.x,
            y_train=self.y,
            x_val=self.x[small],
            y_val=self.y[small],
            custom_loss=clock,
            batch_size=self.case.batch,
        )
        try:
            loop(task)
        except Enough:
            return clock.seconds
        raise AssertionError("the loop ended by itself")

    def peak(self, name: str) -> int:
        """Bytes of a loop at their highest: model, gradients, optimizer's state, and what a step keeps."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            self.block(self.loop(name), WARM_UP + 2)
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def plain_loop(model: nn.Module, task: Task, order: torch.memory_format = torch.contiguous_format) -> None:
    """Train as a beginner's tutorial does."""
    images = task.x_train.dim() == 4
    model = model.to(memory_format=order) if images else model
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-4, betas=BETAS)
    while True:
        for batch in torch.randperm(len(task.x_train)).split(task.batch_size):
            x = task.x_train[batch].contiguous(memory_format=order) if images else task.x_train[batch]
            loss = task.loss(model(x), task.y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _measure(*, case: str, against: str) -> Row:  # noqa: ARG001
    return measure(CASES[case])


def measure(case: Case) -> Row:
    """Ratios of a case to a plain loop, one thread."""
    torch.set_num_threads(1)
    bench = Bench(case)
    loops = bench.loops()
    rounds = [
        {name: bench.block(loop, WARM_UP + case.block) for name, loop in loops.items()} for _ in range(case.turns)
    ]
    peaks = {name: bench.peak(name) for name in ("float", "search", "finetune")}
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "turns": len(rounds)}
    result["float_ms"] = 1e3 * statistics.median(r["float"] for r in rounds)
    for name in LOOPS[1:]:
        ratios = sorted(r[name] / r["float"] for r in rounds)
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result |= {name: statistics.median(ratios), f"{name}_quartiles": [low, high]}
    result["memory"] = peaks["search"] / peaks["float"]
    result["memory_finetune"] = peaks["finetune"] / peaks["float"]
    result["float_mib"] = peaks["float"] / 2**20
    return {key: _rounded(value) for key, value in result.items()}


def _rounded(value: Any) -> Any:
    return [round(v, 3) for v in value] if isinstance(value, list) else round(value, 3)


def ratio(row: Row, loop: str) -> str:
    """Median and quartiles of a loop's ratio."""
    low, high = row[f"{loop}_quartiles"]
    return f"{row[loop]:.2f} ({low:.2f}–{high:.2f})"


def page(rows: list[Row]) -> str:
    """Ratios to a plain loop, and of the authors' arithmetic to ours."""
    lines = [
        "# Speed of a training step",
        "",
        "Ratios to a plain PyTorch loop on the same float network (BatchNorm included, RAdam as PyTorch brings it,",
        "batches drawn at random), in processor time on one thread: median and quartiles over the turns. `fit` is",
        "the package's own loop on the float network, `channels_last` the plain loop with model and batches in this",
        "order of memory. Memory is the highest of a loop's life: model, gradients, optimizer's state, and what a",
        "step keeps. Made by `python benchmarks/step_time.py`; random data, seed 0; two cores of x86-64 that were",
        "busy with other work.",
        "",
        "| case | turns | search | fine-tuning | `fit` | `channels_last` | memory, search / fine-tuning "
        "| plain step, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["against"] == PLAIN):
        times = " | ".join(ratio(row, loop) for loop in LOOPS[1:])
        memory = f"{row['memory']:.2f} / {row['memory_finetune']:.2f}"
        lines.append(f"| `{row['case']}` | {row['turns']} | {times} | {memory} | {row['float_ms']:.3g} |")
    lines += [
        "",
        "Against the authors' arithmetic, reimplemented in `authors_step.py`: theirs / ours, under the same",
        "conditions. Made by `python benchmarks/authors_step.py`.",
        "",
        "| case | turns | search | fine-tuning |",
        "|---|---|---|---|",
    ]
    for row in (row for row in rows if row["against"] == AUTHORS):
        lines.append(f"| `{row['case']}` | {row['turns']} | {ratio(row, 'search')} | {ratio(row, 'finetune')} |")
    return "\n".join([*lines, "", *DECISIONS]) + "\n"


DECISIONS = (
    "A search step can take less time than a plain one, since images have their channels last in memory, which",
    "convolutions on a CPU otherwise reorder; fine-tuning, since BatchNorm is folded and the optimizer is one",
    "compiled loop over all parameters that learn at one rate. A quantizer is one loop forward and one",
    "backward, which gives the gradients of values, step and both ends at once (`hmq_fpga/search/kernels.py`,",
    "compiled by numba once per machine and kept), and the ReLU is part of it. A layer that reads a large",
    "quantized tensor keeps none: backward quantizes the tensor before it again. `torch.compile` of plain",
    "operations in place of these loops was slower, and took longer to compile than a small network's whole",
    "run: it is not used.",
)


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES), help="some of them [all]")
    arguments = parser.parse_args()
    rows = fill(ROWS, ({"case": name, "against": PLAIN} for name in arguments.case), _measure)
    (HERE / "speed.md").write_text(page(rows))


if __name__ == "__main__":
    main()
