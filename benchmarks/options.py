"""Which options of `hmq` matter: each alone against the paper's way, at one R_w and R_a.

    python benchmarks/options.py pendigits_mlp letter_mlp --seeds 5

Rows are kept in `options.json`, and those already there are not repeated. Every search starts from the float model of
its seed and ends with the same fine-tuning. Its processor time is given as a ratio to that of the paper's way; that of
more steps is as many times as long.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, asked, baseline, fill

from hmq_fpga.ir import cost, reference
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import evaluate, finetune
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "options.json"
FIGURES = ("actual", "repaired", "float", "validation", "test", "search_s")
RW, RA = 12.0, 8.0  # where four bits of activations leave something to learn
PAPER, STEPS = "the paper's", 2.5
OPTIONS: dict[str, dict[str, Any]] = {
    PAPER: {},
    "`expected_bits: softmax`": {"expected_bits": "softmax"},
    "`noise: slice`": {"noise": "slice"},
    "`weight_decay: 0.01`": {"weight_decay": 0.01},
    "`weight_decay: 0.1`": {"weight_decay": 0.1},
    "`headroom: 1`": {"headroom": 1},
    "`activation_widths: learnt`": {"activation_widths": "learnt"},
}
LONGER = f"{PAPER}, {STEPS} times the steps"  # about as long as `noise: slice` takes


def main() -> None:
    """Fill the rows, and write the table."""
    arguments = asked(__doc__)
    torch.set_num_threads(1)
    wanted = (
        {"task": task, "option": option, "seed": seed}
        for task, seed, option in product(arguments.tasks, range(arguments.seeds), (*OPTIONS, LONGER))
    )
    (HERE / "options.md").write_text(page(fill(ROWS, wanted, _measure)))


def _measure(*, task: str, option: str, seed: int) -> Row:
    model, float_accuracy, dataset, training, budget = baseline(task, seed, TASKS[task].label_smoothing)
    quantized = instrument(model, training.input_shape, input_signed=training.input_signed)
    searching = replace(budget, search_steps=int(STEPS * budget.search_steps)) if option == LONGER else budget
    target, options = Target(weight_rate=RW, activation_rate=RA), OPTIONS.get(option, {})
    started = time.process_time()
    quantized, scheme, _ = find_scheme(quantized, training, searching, target, seed=seed, options=options)
    searched = time.process_time()
    finetune(quantized, training, steps=budget.finetune_steps, learning_rate=budget.learning_rate, seed=seed)
    codes = reference.run(freeze(quantized), channels_last(dataset.x_test))
    return {
        "actual": cost.weight_rate(scheme),
        "repaired": len(scheme.found_by.get("repaired", {})),
        "float": float_accuracy,
        "validation": evaluate(quantized, training)["val_accuracy"],
        "test": float(np.mean(codes.argmax(1) == dataset.y_test)),
        "search_s": searched - started,
    }


def page(rows: list[Row]) -> str:
    """Means over seeds, with the standard deviation of the test accuracy."""
    lines = [
        f"R_w = {RW:g}, R_a = {RA:g}; means over seeds, of accuracies in % with the standard deviation.",
        "Made by `python benchmarks/options.py pendigits_mlp letter_mlp --seeds 5`.",
        "",
        "| task | option | seeds | actual R_w | repaired tensors | float | validation | test | time of search |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in sorted({row["task"] for row in rows}):
        usual = np.mean([row["search_s"] for row in rows if (row["task"], row["option"]) == (task, PAPER)])
        for option in (*OPTIONS, LONGER):
            group = [row for row in rows if (row["task"], row["option"]) == (task, option)]
            if group:
                mean = {name: np.mean([row[name] for row in group]) for name in FIGURES}
                longer = STEPS if option == LONGER else mean["search_s"] / usual
                spread = {name: 100 * np.std([row[name] for row in group], ddof=1) for name in ("validation", "test")}
                lines.append(
                    f"| {task} | {option} | {len(group)} | {mean['actual']:.2f} | {mean['repaired']:.1f} "
                    f"| {100 * mean['float']:.2f} | {100 * mean['validation']:.2f} ± {spread['validation']:.2f} "
                    f"| {100 * mean['test']:.2f} ± {spread['test']:.2f} | {longer:.1f} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
