"""Accuracy against logic on pendigits: narrow activations and zero weights at one R_w.

    python benchmarks/frontier.py --zeros 0 0.6 0.65 0.7 0.75 0.8
    python benchmarks/frontier.py --zeros 0 --rw 8 13 15.5 --act-bits 3 4 5 6

Every network is written as Verilog, compared with the golden model on the whole test split, and synthesized by Yosys.
Rows are appended to a JSON-lines file, and those already there are not repeated. Nothing is chosen by the test split: a
row is what its settings and seed gave.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir import cost
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.pruning import Nonzeros, Pruning, widen_thresholds
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import evaluate, finetune, fit
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS, training_task

TASK = "pendigits_mlp"
HERE = Path(__file__).parent
# Test accuracy in % and Yosys LUTs of HGQ2 0.2.0 on the same data, by the same alkaid and Yosys: one run each
HGQ2 = ((99.24, 17_198), (98.91, 9_041), (98.57, 3_893), (97.39, 4_633), (94.66, 2_128))
UNIFORM = ((98.85, 35_368, "6w8a"), (98.94, 15_069, "4w6a"))
SHOWN = (97.9, 99.5)  # accuracies in the figure


def main() -> None:
    """Fill the rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0, 0.5, 0.6, 0.7])
    parser.add_argument("--rw", type=float, nargs="+", default=[13])
    parser.add_argument("--act-bits", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=30_000, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path("build/frontier.jsonl"))
    arguments = parser.parse_args()
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()] if arguments.rows.exists() else []
    torch.set_num_threads(1)
    for seed, rw, act_bits, zeros in product(range(arguments.seeds), arguments.rw, arguments.act_bits, arguments.zeros):
        key = {"rw": rw, "act_bits": act_bits, "zeros": zeros, "steps": arguments.steps, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(key | _measure(**key))
        with arguments.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    (HERE / "frontier.md").write_text(_table(rows))
    _draw(rows, HERE / "frontier.svg")


@cache
def _searched(rw: float, act_bits: int, seed: int) -> tuple[QModel, Scheme]:
    task = TASKS[TASK]
    training, budget = training_task(task.load(None), task.batch_size), task.budget
    torch.manual_seed(seed)
    model = task.build()
    fit(model, training, steps=budget.float_steps, learning_rate=budget.float_learning_rate, seed=seed)
    quantized = instrument(model, training.input_shape, input_signed=training.input_signed)
    target = Target(weight_rate=rw, max_activation_bits=act_bits)
    return find_scheme(quantized, training, budget, target, seed=seed)[:2]


def _measure(*, rw: float, act_bits: int, zeros: float, steps: int, seed: int) -> dict[str, Any]:
    task = TASKS[TASK]
    dataset = task.load(None)
    training, budget = training_task(dataset, task.batch_size), task.budget
    quantized, scheme = copy.deepcopy(_searched(rw, act_bits, seed))
    if zeros:
        scheme = widen_thresholds(quantized, scheme, zeros)
        quantized.set_scheme(scheme)
    shaping = Pruning(quantized, Nonzeros(zeros)) if zeros else None
    finetune(quantized, training, steps=steps, learning_rate=budget.learning_rate, seed=seed, shaping=shaping)
    net = freeze(quantized)
    with tempfile.TemporaryDirectory() as folder:
        project = RtlProject.create(net, Path(folder) / "rtl")
        parity = check(net, [project.interpreter()], channels_last(dataset.x_test), dataset.y_test)
        parity.raise_for_mismatch()
        yosys = project.synthesize()
    return {
        "actual": cost.weight_rate(scheme),
        "zero_weights": float(np.mean(np.concatenate([op.weight.ravel() for op in net.linears]) == 0)),
        "validation": evaluate(quantized, training)["val_accuracy"],
        "test": parity.simulators["trace"].accuracy,
        "alkaid_lut": project.lut,
        "yosys_lut": yosys.lut,
        "yosys_carry": yosys.carry,
        "yosys_ff": yosys.ff,
        "latency_cycles": project.latency_cycles,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = [
        "| R_w asked | activation bits | zeros asked | seeds | R_w | zeros % | test % | alkaid LUT "
        "| Yosys LUT / CARRY4 / FF |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(r["rw"], r["act_bits"], r["zeros"], r["steps"]) for r in rows}):
        group = [r for r in rows if (r["rw"], r["act_bits"], r["zeros"], r["steps"]) == key]
        mean = {name: np.mean([r[name] for r in group]) for name in group[0]}
        spread = 100 * np.std([r["test"] for r in group])
        lines.append(
            f"| {key[0]:g} | {key[1]} | {key[2] or 'off'} | {len(group)} | {mean['actual']:.1f} "
            f"| {100 * mean['zero_weights']:.0f} | {100 * mean['test']:.2f} ± {spread:.2f} | {mean['alkaid_lut']:,.0f} "
            f"| {mean['yosys_lut']:,.0f} / {mean['yosys_carry']:,.0f} / {mean['yosys_ff']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against Yosys LUTs, every run a dot, lines through means, beside HGQ2 and fixed bit-widths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    if (estimates := HERE / "estimates.json").exists():
        plain = [row for row in json.loads(estimates.read_text()) if row["task"] == TASK]
        axes.plot(*_points(plain, "yosys", "accuracy"), ".", label="hmq, 8-bit activations, R_w 4 … 15.5")
    lines = sorted({(row["act_bits"], row["zeros"] > 0) for row in rows}, key=lambda line: (line[1], -line[0]))
    for bits, zeros in lines:
        group = [row for row in rows if (row["act_bits"], row["zeros"] > 0) == (bits, zeros)]
        points = sorted({(row["rw"], row["zeros"]) for row in group})
        means = [
            [
                np.mean(values)
                for values in _points([r for r in group if (r["rw"], r["zeros"]) == point], "yosys_lut", "test")
            ]
            for point in points
        ]
        name = f"R_w {group[0]['rw']:g}, zeros asked" if zeros else "R_w " + ", ".join(f"{rw:g}" for rw, _ in points)
        (line,) = axes.plot(*zip(*means, strict=True), "-", label=f"hmq, {bits}-bit activations, {name}")
        axes.plot(*_points(group, "yosys_lut", "test"), ".", color=line.get_color())
    shown = sorted((lut, test) for test, lut in HGQ2 if test > SHOWN[0])
    axes.plot(*zip(*shown, strict=True), "k^--", label="HGQ2 0.2.0, bits per weight")
    axes.plot([lut for _, lut, _ in UNIFORM], [test for test, _, _ in UNIFORM], "ks", label="fixed bit-widths")
    for test, lut, name in UNIFORM:
        axes.annotate(name, (lut, test), textcoords="offset points", xytext=(5, 5))
    axes.set(xscale="log", xlabel="Yosys LUTs", ylabel="test accuracy, %", ylim=SHOWN)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def _points(rows: list[dict[str, Any]], lut: str, accuracy: str) -> tuple[list[float], list[float]]:
    return [row[lut] for row in rows], [100 * row[accuracy] for row in rows]


if __name__ == "__main__":
    main()
