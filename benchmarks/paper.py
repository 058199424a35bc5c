"""The HMQ paper's own networks on CIFAR-10, by the paper's schedule: accuracy against R_w at 8- and 4-bit activations.

    python benchmarks/paper.py resnet18_cifar --device cuda
    python benchmarks/paper.py resnet20_cifar --rw 8 13 --ra 8
    python benchmarks/paper.py resnet20_cifar --rw 8 13 --ra 8 --share 0.1
    python benchmarks/paper.py resnet20_cifar --quick --rw 13 --ra 8

Killed at any moment, the same command goes on where it was. Each phase keeps its state in `--out`; what is trained is
not trained again. Started by `torchrun --nproc-per-node N`, every batch is split over N GPUs or processes.

The float network is trained here, for 100 epochs by RAdam along a cosine from 2e-3, on GPUs in bfloat16 where PyTorch
takes that for safe; search and fine-tuning are in float32. These are the paper's: 30 epochs of search in six cycles, 20
of fine-tuning, batches of 256, RAdam at 1e-5, logits at 1e-2, B = 1 … 8, lambda = 32; images are shifted by up to four
pixels and mirrored at random in all phases. Noise is the authors' code's: of each input channel of a weight and of each
sample of an activation. As everywhere here, BatchNorm is folded before the search, every type of the hardware is
quantized, input and shortcuts included, and the learning rate of fine-tuning falls to zero. In a share of the epochs
the rates of search and fine-tuning are as much higher.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Row, keep
from rich.console import Console
from torch import Tensor, nn

from hmq_fpga.ir import cost
from hmq_fpga.search import parallel
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.metrics import accuracy
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.samples import Batch, InMemory, Samples
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Listener, Task, finetune, fit, ignore, predict
from hmq_fpga.study.data import load
from hmq_fpga.study.dataset import SPLITS
from hmq_fpga.study.tasks import TASKS, training_task

NETWORKS = ("resnet18_cifar", "resnet20_cifar")
RATES = (8.0, 10.0, 13.0, 17.0, 19.0)
ACTIVATION_RATES = (4.0, 8.0)  # 8 and 4 bits of the largest activations
BATCH = 256
EPOCHS = (100, 30, 20)  # float training, search, fine-tuning
FLOAT_LEARNING_RATE, LEARNING_RATE, LOGIT_LEARNING_RATE = 2e-3, 1e-5, 1e-2
SHIFT = 4  # pixels
NEWS_S = 30.0  # seconds between two lines on standard error
PUBLISHED = {  # rate and accuracy in % by network and R_a; of ResNet-18 read off the HMQ paper's figures
    ("resnet18_cifar", 4.0): ((10.5, 92.90), (13.8, 92.81), (17.3, 92.50), (19.1, 92.11), (19.8, 91.56)),
    ("resnet18_cifar", 8.0): ((8.1, 92.54), (13.1, 92.36), (17.5, 92.08), (19.7, 90.77)),
    ("resnet20_cifar", 8.0): ((13.1, 92.22),),  # of HAWQ
}


def main() -> None:
    """Train what is missing, and write `paper.json` and `paper.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--rw", type=float, nargs="+", default=RATES)
    parser.add_argument("--ra", type=float, nargs="+", default=ACTIVATION_RATES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs, for a processor [1]")
    parser.add_argument("--quick", action="store_true", help="a trial on few images, whose table is left in --out")
    parser.add_argument("--threads", type=int, help="of the processor [all]")
    parser.add_argument("--out", type=Path, help="where everything is kept [build/paper or build/paper-quick]")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path("build/paper-quick" if arguments.quick else "build/paper")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = parallel.own_device(arguments.device)
    with parallel.joined(device):
        for network in arguments.networks:
            out = arguments.out / network
            trial = Trial(network, device, arguments.seed, out, arguments.share, quick=arguments.quick)
            for ra in arguments.ra:
                for rw in arguments.rw:
                    trial.row(ra, rw)
        if parallel.number() == 0:
            here = arguments.out if arguments.quick else Path(__file__).parent
            rows = _merged(here / "paper.json", sorted(arguments.out.glob("*/row-*.json")))
            keep(here / "paper.json", rows)
            (here / "paper.md").write_text(page(rows))


def _merged(stored: Path, files: Iterable[Path]) -> list[Row]:
    """The rows of one file, and those of one file each, which take the place of the same ones before."""
    rows: list[Row] = json.loads(stored.read_text()) if stored.exists() else []
    rows += [json.loads(file.read_text()) for file in files]
    return list({tuple(row[name] for name in ("key", "ra", "rw")): row for row in rows}.values())


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Augmented(Samples):
    """Images that are shifted and mirrored at random in training, a batch ahead of it."""

    samples: InMemory

    def __len__(self) -> int:
        """Of one pass."""
        return len(self.samples)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches, each made while the one before it is in use."""
        made = ((shifted(x, generator), y) for x, y in self.samples.shuffled(size, generator))
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(next, made, None)
            while batch := coming.result():
                coming = ahead.submit(next, made, None)
                yield batch

    def in_order(self, size: int) -> Iterator[Batch]:
        """The images as they are."""
        return self.samples.in_order(size)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images `(batch, channels, height, width)`, each shifted by up to `SHIFT` pixels, and mirrored or not."""
    n, channels, height, width = x.shape
    moves = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=generator).to(x.device)
    mirrored = torch.randint(2, (n, 1), generator=generator).to(x.device) > 0
    rows = moves[0] + torch.arange(height, device=x.device)
    columns = moves[1] + torch.arange(width, device=x.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (SHIFT,) * 4)
    each, channel = torch.arange(n, device=x.device), torch.arange(channels, device=x.device)
    return padded[each[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


# --- training --------------------------------------------------------------------------------------------------------


class Trial:
    """One network: its float training, and a search and fine-tuning for each pair of rates."""

    def __init__(self, network: str, device: str, seed: int, out: Path, share: float, *, quick: bool) -> None:
        self.network, self.device, self.seed, self.out = network, device, seed, out
        self.dataset, self.batch = load("cifar10_jpeg"), 32 if quick else BATCH
        if quick:
            names = [f"{kind}_{split}" for kind in "xy" for split in SPLITS]
            self.dataset = replace(self.dataset, **{name: getattr(self.dataset, name)[:256] for name in names})
        plain = training_task(self.dataset, self.batch, device)
        images = Augmented(InMemory(plain.x_train, plain.y_train))
        self.task: Task = replace(plain, streams={"train": images})
        self.steps = [20, 150, 20] if quick else [int(share * epochs * len(images) / BATCH) for epochs in EPOCHS]
        kind = torch.device(device).type
        part = 1.0 if quick else share
        self.rates = [rate / part for rate in (LEARNING_RATE, LOGIT_LEARNING_RATE)]  # as far in fewer steps
        self.key = f"{network} {self.dataset.digest} {seed} {self.steps} {kind} {parallel.processes()}"
        self.model: nn.Module | None = None
        out.mkdir(parents=True, exist_ok=True)

    def row(self, ra: float, rw: float) -> None:
        """Search and fine-tune, unless it has been done, and write what came of it."""
        name = f"ra{ra:g}-rw{rw:g}-seed{self.seed}"
        file = self.out / f"row-{name}.json"
        if parallel.from_first(file.exists() and json.loads(file.read_text())["key"] == self.key):
            return
        _, search_steps, finetune_steps = self.steps
        learning_rate, logit_learning_rate = self.rates
        trained = self.trained()
        model = instrument(trained, self.task.input_shape, input_signed=self.task.input_signed).to(self.device)
        kept = [self.checkpoint(f"{name}-{phase}") for phase in ("search", "finetune")]
        _, scheme, _ = find_scheme(
            model,
            self.task,
            Budget(search_steps=search_steps, learning_rate=learning_rate),
            Target(weight_rate=rw, activation_rate=ra, bits=tuple(range(1, 9))),
            options={"logit_learning_rate": logit_learning_rate, "noise": "slice"},
            seed=self.seed,
            listener=self.news(f"{name} search"),
            checkpoint=kept[0],
        )
        finetune(
            model,
            self.task,
            steps=finetune_steps,
            learning_rate=learning_rate,
            seed=self.seed,
            listener=self.news(f"{name} finetune"),
            checkpoint=kept[1],
        )
        if parallel.number() == 0:
            told = {
                "network": self.network,
                "ra": ra,
                "rw": rw,
                "seed": self.seed,
                "rw_actual": cost.weight_rate(scheme),
                "ra_actual": cost.activation_rate(model.moments, model.formats),
                "repaired": len(scheme.found_by.get("repaired", {})),
                "float": self.accuracy(trained),
                "quantized": self.accuracy(model),
                "steps": self.steps,
                "device": torch.cuda.get_device_name() if self.device != "cpu" else "cpu",
                "key": self.key,
            }
            new = file.with_suffix(".new")
            new.write_text(json.dumps(told, indent=1) + "\n")
            new.replace(file)
            for checkpoint in kept:
                checkpoint.remove()

    def trained(self) -> nn.Module:
        """The float network; its checkpoint keeps it for good."""
        if self.model is None:
            torch.manual_seed(self.seed)
            model = TASKS[self.network].build().to(self.device)
            self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            fit(
                self.model,
                self.task,
                steps=self.steps[0],
                learning_rate=FLOAT_LEARNING_RATE,
                seed=self.seed,
                autocast=None if self.device == "cpu" else torch.bfloat16,  # which many processors emulate
                listener=self.news(f"float seed{self.seed}"),
                checkpoint=self.checkpoint(f"float-seed{self.seed}"),
            )
        return self.model

    def accuracy(self, model: nn.Module) -> float:
        """Of the test split, a fraction."""
        scores = predict(model, torch.from_numpy(self.dataset.x_test).to(self.device)).scores
        return accuracy(scores.cpu(), torch.from_numpy(self.dataset.y_test))

    def checkpoint(self, name: str) -> Checkpoint:
        """Of one training."""
        return Checkpoint(self.out / f"{name}.checkpoint", key=self.key)

    def news(self, phase: str) -> Listener:
        """A line now and then: how far it is, and how fast."""
        if parallel.number():
            return ignore
        console, begun = Console(stderr=True, highlight=False), (time.monotonic(), 0)
        last = 0.0

        def listen(step: int, steps: int, values: dict[str, float]) -> None:
            nonlocal last, begun
            now = time.monotonic()
            if begun[1] == 0:
                begun = (now, step)
            if now - last > NEWS_S or step == steps:
                last, speed = now, (step - begun[1]) * self.batch / max(now - begun[0], 1e-9)
                told = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                head = f"{self.network} {phase} {step}/{steps}  {speed:.0f} images/s"
                console.print(f"{head}  {told}", soft_wrap=True)

        return listen


# --- the page --------------------------------------------------------------------------------------------------------


def page(rows: list[Row]) -> str:
    """Rows beside the published figures of the nearest rate."""
    lines = [
        "CIFAR-10 as JPEG, test split: not comparable with figures on the original images to better than some tenths.",
        "Published: of ResNet-18 read off the HMQ paper's figures (float 92.45 %), of ResNet-20 HAWQ's; of the nearest",
        "rate. Made by `python benchmarks/paper.py`, whose head names the schedule.",
        "",
        "| network | R_a | R_w | actual | float % | quantized % | difference | published, rate: % | steps | device |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["network"], r["ra"], r["rw"], r["seed"])):
        points = PUBLISHED.get((row["network"], row["ra"]), ())
        near = min(points, key=lambda point: abs(point[0] - row["rw_actual"]), default=None)
        published = f"{near[0]:g}: {near[1]:.2f}" if near else ""
        lines.append(
            f"| {row['network']} | {row['ra']:g} | {row['rw']:g} | {row['rw_actual']:.2f} "
            f"| {100 * row['float']:.2f} | {100 * row['quantized']:.2f} "
            f"| {100 * (row['quantized'] - row['float']):+.2f} | {published} "
            f"| {' + '.join(map(str, row['steps']))} | {row['device']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
