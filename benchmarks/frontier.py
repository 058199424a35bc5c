"""Accuracy under a bound on logic: the pen digits' network with so many LUTs and no more.

    python benchmarks/frontier.py --luts 7000 4000 2600 --seeds 8

Every network is written as Verilog, compared with the golden model on the whole test split, and synthesized by Yosys.
Rows are kept in `frontier.json`, and those already there are not repeated. Nothing is chosen by the test split: a row
is what its settings and seed gave.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir import cost
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Distillation, evaluate, finetune, fit
from hmq_fpga.study.budgets import pruning
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS, training_task

TASK = "pendigits_mlp"
HERE = Path(__file__).parent
ROWS = HERE / "frontier.json"
# Test accuracy in % and Yosys LUTs of HGQ2 0.2.0 on the same data, by the same alkaid and Yosys: one run each
HGQ2 = ((99.24, 17_198), (98.91, 9_041), (98.57, 3_893), (97.39, 4_633), (94.66, 2_128))
UNIFORM = ((98.85, 35_368, "6w8a"), (98.94, 15_069, "4w6a"))
SHOWN = (95.6, 99.5)  # accuracies in the figure


def main() -> None:
    """Fill the rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--luts", type=float, nargs="+", default=[7000, 4000, 2600])
    parser.add_argument("--steps", type=int, default=20_000, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        for luts in arguments.luts:
            key = {"luts": luts, "steps": arguments.steps, "seed": seed}
            if not any(key.items() <= row.items() for row in rows):
                rows.append(key | _measure(**key))
                ROWS.write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "frontier.md").write_text(_table(rows))
    _draw(rows, HERE / "frontier.svg")


@lru_cache(maxsize=1)
def _trained(seed: int) -> nn.Module:
    task = TASKS[TASK]
    training, budget = training_task(task.load(None), task.batch_size), task.budget
    torch.manual_seed(seed)
    model = task.build()
    fit(model, training, steps=budget.float_steps, learning_rate=budget.float_learning_rate, seed=seed)
    return model


def _measure(*, luts: float, steps: int, seed: int) -> dict[str, Any]:
    task = TASKS[TASK]
    dataset = task.load(None)
    training, budget = training_task(dataset, task.batch_size), task.budget
    model, target = copy.deepcopy(_trained(seed)), Target(luts=luts)
    quantized = instrument(model, training.input_shape, input_signed=training.input_signed)
    quantized, scheme, _ = find_scheme(quantized, training, budget, target, seed=seed)
    finetune(
        quantized,
        training,
        steps=steps,
        learning_rate=budget.learning_rate,
        seed=seed,
        shaping=pruning(quantized, target),
        distillation=Distillation(teacher=model),
    )
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
        "| LUTs asked | seeds | R_w | zeros % | test % | alkaid LUT | Yosys LUT / CARRY4 / FF |",
        "|---|---|---|---|---|---|---|",
    ]
    for luts in sorted({row["luts"] for row in rows}, reverse=True):
        group = [row for row in rows if row["luts"] == luts]
        mean = {name: np.mean([row[name] for row in group]) for name in group[0]}
        spread = 100 * np.std([row["test"] for row in group], ddof=1)
        lines.append(
            f"| {luts:,.0f} | {len(group)} | {mean['actual']:.1f} | {100 * mean['zero_weights']:.0f} "
            f"| {100 * mean['test']:.2f} ± {spread:.2f} | {mean['alkaid_lut']:,.0f} "
            f"| {mean['yosys_lut']:,.0f} / {mean['yosys_carry']:,.0f} / {mean['yosys_ff']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against Yosys LUTs, every run a dot, a line through means, beside HGQ2 and fixed bit-widths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    if (estimates := HERE / "estimates.json").exists():
        plain = [row for row in json.loads(estimates.read_text()) if row["task"] == TASK]
        axes.plot(*_points(plain, "yosys", "accuracy"), ".", label="hmq, 8-bit activations, R_w 4 … 15.5")
    asked = sorted({row["luts"] for row in rows})
    means = [np.mean(_points([row for row in rows if row["luts"] == luts], "yosys_lut", "test"), 1) for luts in asked]
    (line,) = axes.plot(*zip(*means, strict=True), "-", label="hmq, --luts")
    axes.plot(*_points(rows, "yosys_lut", "test"), ".", color=line.get_color())
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
