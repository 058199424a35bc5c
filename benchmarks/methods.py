"""Search methods on the same models, data, steps and fine-tuning: accuracy against the weight compression rate.

    python benchmarks/methods.py pendigits_mlp letter_mlp --rates 6 8 10 12 14 --seeds 5
    python benchmarks/methods.py mnist_cnn dscnn_fsdd --seeds 3

Rows are kept in `methods.json`, and those already there are not repeated. Every method starts from the float model of
its seed and ends with the same fine-tuning; seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import Row, baseline, fill

from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.ir import cost, reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import METHODS, find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import finetune
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "methods.json"
RATES = (6, 8, 10, 12, 14)
COLUMNS = 3  # of the figure
LEAST_SEEDS = 3  # from which on a row is told; others are kept until there are as many


def main() -> None:
    """Fill the rows, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        {"task": task, "method": method, "rw": rw, "seed": seed}
        for task, seed, rw, method in product(
            arguments.tasks, range(arguments.seeds), arguments.rates, arguments.methods
        )
    )
    rows = fill(ROWS, wanted, _measure)
    (HERE / "methods.md").write_text(page(rows))
    _draw(_told(rows), HERE / "methods.svg")


def _measure(*, task: str, method: str, rw: float, seed: int) -> Row:
    model, float_accuracy, dataset, training, budget = baseline(task, seed)
    quantized = instrument(model, training.input_shape, input_signed=training.input_signed)
    started = time.process_time()
    try:
        quantized, scheme, _ = find_scheme(
            quantized, training, budget, Target(weight_rate=rw), method=method, seed=seed
        )
    except InvalidInput as refusal:
        return {"refused": str(refusal)}
    searched = time.process_time()
    finetune(quantized, training, steps=budget.finetune_steps, learning_rate=budget.learning_rate, seed=seed)
    net = freeze(quantized)
    codes = reference.run(net, channels_last(dataset.x_test))
    return {
        "actual": cost.weight_rate(scheme),
        "float": float_accuracy,
        "test": float(np.mean(codes.argmax(1) == dataset.y_test)),
        "bops": sum(layer.bops for layer in cost.layer_costs(net, scheme)),
        "lut": traced_luts(net) if TASKS[task].io_type == "io_parallel" else None,
        "search_s": searched - started,
        "finetune_s": time.process_time() - searched,
    }


def page(rows: list[Row]) -> str:
    """Mean and standard deviation over seeds."""
    rows = _told(rows)
    lines = [
        "Test split, mean and standard deviation over seeds; seconds of search are processor time of one thread,",
        "LUTs the tracer's, of networks that are unrolled; two cores of x86-64. Made by",
        "`python benchmarks/methods.py pendigits_mlp letter_mlp --rates 6 8 10 12 14 --seeds 5`, and the same of",
        "`magic_mlp --methods hmq uniform --rates 8 12 14` and of `mnist_cnn dscnn_fsdd --seeds 3`. `zeroq` needs",
        "BatchNorm.",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        lines += [
            "",
            f"## {task}: float {100 * np.mean([row['float'] for row in of_task]):.2f} %",
            "",
            "| R_w asked | method | seeds | actual | test % | kBOPs | LUT | search s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for rw, method in product(sorted({row["rw"] for row in of_task}), METHODS):
            group = [row for row in of_task if (row["rw"], row["method"]) == (rw, method)]
            if not group:
                continue
            mean, spread = _mean_and_spread(group)
            luts = [row["lut"] for row in group if row["lut"]]
            lines.append(
                f"| {rw:g} | {method} | {len(group)} | {np.mean([row['actual'] for row in group]):.2f} "
                f"| {mean:.2f} ± {spread:.2f} "
                f"| {np.mean([row['bops'] for row in group]) / 1000:,.0f} "
                f"| {f'{np.mean(luts):,.0f}' if luts else ''} | {np.mean([row['search_s'] for row in group]):.0f} |"
            )
    return "\n".join(lines) + "\n"


def _told(rows: list[Row]) -> list[Row]:
    """Those of networks that a method took, of enough seeds."""
    taken = [row for row in rows if "refused" not in row]
    seeds = Counter(map(_group, taken))
    return [row for row in taken if seeds[_group(row)] >= LEAST_SEEDS]


def _group(row: Row) -> tuple[str, str, float]:
    return row["task"], row["method"], row["rw"]


def _draw(rows: list[Row], path: Path) -> None:
    """Accuracy against the actual rate: means with standard deviations, a panel for each task."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with mpl.rc_context(
        {"svg.hashsalt": "methods", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        lines, columns = math.ceil(len(tasks) / COLUMNS), min(len(tasks), COLUMNS)
        figure = Figure(figsize=(3.4 * columns, 3 * lines), layout="constrained")
        for number, task in enumerate(tasks):
            axes = figure.add_subplot(lines, columns, number + 1)
            of_task = [row for row in rows if row["task"] == task]
            axes.axhline(100 * np.mean([row["float"] for row in of_task]), color="0.6", lw=1, ls="--", label="float")
            for color, method in enumerate(METHODS):
                points = [
                    (np.mean([row["actual"] for row in group]), *_mean_and_spread(group))
                    for rw in sorted({row["rw"] for row in of_task})
                    if (group := [row for row in of_task if (row["rw"], row["method"]) == (rw, method)])
                ]
                if points:
                    rates, means, spreads = zip(*points, strict=True)
                    axes.errorbar(
                        rates, means, spreads, color=f"C{color}", marker="o", ms=3, lw=1, elinewidth=0.6, label=method
                    )
            axes.set(title=task, xlabel="actual $R_w$", ylabel="test accuracy, %")
            axes.legend(frameon=False, fontsize="x-small")
        figure.savefig(path, metadata={"Date": None})


def _mean_and_spread(group: list[Row]) -> tuple[float, float]:
    tests = 100 * np.array([row["test"] for row in group])
    return float(tests.mean()), float(tests.std(ddof=min(len(tests) - 1, 1)))


if __name__ == "__main__":
    main()
