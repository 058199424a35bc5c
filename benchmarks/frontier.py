"""Accuracy under a bound on logic: a network with so many LUTs and no more.

    python benchmarks/frontier.py pendigits_shallow --luts 1700 2600 4000 --seeds 8

Every network is written as Verilog, its trace compared with the golden model on the whole test split, and, unless
`--no-yosys` leaves it out, synthesized by Yosys. Rows are kept in `frontier.json`, and those already there are not
repeated. Nothing is chosen by the test split: a row is what its settings and seed gave.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import Row, baseline, fill

from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir import cost
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Distillation, evaluate, finetune
from hmq_fpga.study.budgets import pruning
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "frontier.json"
PEERS = HERE / "hgq2.json"  # runs of HGQ2 0.2.0 on the same data, by the same alkaid and Yosys
BITS_PER_WEIGHT = "HGQ2, bits per weight"
YOSYS = ("lut", "carry", "ff")
SHOWN = {"pendigits": (95.6, 99.5), "mnist14": (92, 98.2)}  # accuracies in the figure


def main() -> None:
    """Fill the rows, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--luts", type=float, nargs="+", default=[4000, 2600, 1700])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--yosys", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        {
            "task": task,
            "luts": luts,
            "steps": TASKS[task].budget.finetune_steps,
            "seed": seed,
            "yosys": arguments.yosys,
        }
        for task, seed, luts in product(arguments.tasks, range(arguments.seeds), arguments.luts)
    )
    rows = fill(ROWS, wanted, _measure)
    (HERE / "frontier.md").write_text(page(rows))
    _draw(rows, HERE / "frontier.svg")


def _measure(*, task: str, luts: float, steps: int, seed: int, yosys: bool) -> Row:
    teacher, _, dataset, training, budget = baseline(task, seed)
    target = Target(luts=luts)
    quantized = instrument(teacher, training.input_shape, input_signed=training.input_signed)
    quantized, scheme, _ = find_scheme(quantized, training, budget, target, seed=seed)
    finetune(
        quantized,
        training,
        steps=steps,
        learning_rate=budget.learning_rate,
        seed=seed,
        shaping=pruning(quantized, target, training),
        distillation=Distillation(teacher=teacher),
    )
    net = freeze(quantized)
    with tempfile.TemporaryDirectory() as folder:
        project = RtlProject.create(net, Path(folder) / "rtl")
        parity = check(net, [project.interpreter()], channels_last(dataset.x_test), dataset.y_test)
        parity.raise_for_mismatch()
        synthesized = project.synthesize() if yosys else None
    return {
        "actual": cost.weight_rate(scheme),
        "zero_weights": float(np.mean(np.concatenate([op.weight.ravel() for op in net.linears]) == 0)),
        "validation": evaluate(quantized, training)["val_accuracy"],
        "test": parity.simulators["trace"].accuracy,
        "alkaid_lut": project.lut,
        "latency_cycles": project.latency_cycles,
        **({f"yosys_{name}": getattr(synthesized, name) for name in YOSYS} if synthesized else {}),
    }


def page(rows: list[Row]) -> str:
    """Mean and standard deviation over seeds, alone and beside HGQ2's."""
    lines = [
        "## Under a bound on logic",
        "",
        "Made by `python benchmarks/frontier.py pendigits_shallow --luts 4000 2600 1700 --no-yosys` and",
        "the same of `mnist14_wide --luts 14000` and of `mnist14_mlp --luts 6000 3000`; two cores of x86-64.",
        "",
        "| task | LUTs asked | seeds | R_w | zeros % | test % | alkaid LUT | Yosys LUT / CARRY4 / FF |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours: dict[str, list[str]] = {name: [] for name in SHOWN}
    for task, luts in sorted({(row["task"], row["luts"]) for row in rows}, key=lambda key: (key[0], -key[1])):
        group = [row for row in rows if (row["task"], row["luts"]) == (task, luts)]
        spread = 100 * np.std([row["test"] for row in group], ddof=min(len(group) - 1, 1))
        test, alkaid = f"{100 * _mean(group, 'test'):.2f} ± {spread:.2f}", f"{_mean(group, 'alkaid_lut'):,.0f}"
        seeds = len({row["seed"] for row in group})
        yosys = [f"{_mean(group, f'yosys_{name}'):,.0f}" for name in YOSYS if any(row["yosys"] for row in group)]
        lines.append(
            f"| {task} | {luts:,.0f} | {seeds} | {_mean(group, 'actual'):.1f} "
            f"| {100 * _mean(group, 'zero_weights'):.0f} | {test} | {alkaid} | {' / '.join(yosys) or '–'} |"
        )
        data = next(name for name in SHOWN if task.startswith(name))
        told = f"hmq_fpga, `{task} --luts {luts:.0f} --distill`, {seeds} seeds"
        ours[data].append(f"| {data} | {told} | {test} | {alkaid} | {yosys[0] if yosys else '–'} |")
    lines += ["", "## Beside HGQ2", "", "| data | | test % | alkaid LUT | Yosys LUT |", "|---|---|---|---|---|"]
    for data in SHOWN:
        for row in json.loads(PEERS.read_text()):
            if row["data"] == data:
                known = " | ".join(f"{lut:,}" if (lut := row[key]) else "–" for key in ("alkaid_lut", "yosys_lut"))
                lines.append(f"| {data} | {row['what']} | {row['test']:g} | {known} |")
        lines += ours[data]
    return "\n".join(lines) + "\n"


def _mean(rows: list[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows if name in row]))


def _draw(rows: list[Row], path: Path) -> None:
    """Accuracy against LUTs, every run a dot, a line through means, beside HGQ2: a panel for each data set."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    data = [name for name in SHOWN if any(row["task"].startswith(name) for row in rows)]
    with mpl.rc_context({"svg.hashsalt": "frontier", "font.size": 9}):
        figure = Figure(figsize=(5.2 * len(data), 4), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(data), squeeze=False)[0], data, strict=True):
            for task in sorted({row["task"] for row in rows if row["task"].startswith(name)}):
                of_task = [row for row in rows if row["task"] == task]
                asked = sorted({row["luts"] for row in of_task})
                means = [np.mean(_points([row for row in of_task if row["luts"] == luts]), 1) for luts in asked]
                (line,) = axes.plot(*zip(*means, strict=True), "-", label=f"--luts, {task}")
                axes.plot(*_points(of_task), ".", color=line.get_color())
            peers = [row for row in json.loads(PEERS.read_text()) if row["data"] == name and row["alkaid_lut"]]
            found = [row for row in peers if row["what"].startswith(BITS_PER_WEIGHT) and row["test"] > SHOWN[name][0]]
            shown = sorted((row["alkaid_lut"], row["test"]) for row in found)
            axes.plot(*zip(*shown, strict=True), "k^--", label="HGQ2 0.2.0, bits per weight")
            axes.set(xscale="log", xlabel="LUTs (alkaid)", ylabel="test accuracy, %", ylim=SHOWN[name], title=name)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", loc="lower right")
        figure.savefig(path, metadata={"Date": None})


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row["alkaid_lut"] for row in rows], [100 * row["test"] for row in rows]


if __name__ == "__main__":
    main()
