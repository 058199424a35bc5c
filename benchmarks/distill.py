"""Whether fine-tuning had better learn from the float network, too: tasks with `--distill` and without.

    python benchmarks/distill.py digits_mlp digits_tiny_cnn pendigits_mlp letter_mlp magic_mlp --seeds 5

Each as `run` does it: without `--distill` labels are smoothed where the task says so, in the float network's training,
too. Rows are kept in `distill.json`, and those already there are not repeated.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import Row, asked, baseline, fill, quantize

from hmq_fpga.ir import cost, reference
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.target import Target
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "distill.json"
RATES = (8.0, 12.0)
COMMAND = "python benchmarks/distill.py digits_mlp digits_tiny_cnn pendigits_mlp letter_mlp magic_mlp --seeds 5"


def main() -> None:
    """Fill the rows, and write the table."""
    arguments = asked(__doc__)
    torch.set_num_threads(1)
    wanted = (
        {"task": task, "seed": seed, "distill": distill, "rw": rw}
        for task, seed, distill, rw in product(arguments.tasks, range(arguments.seeds), (False, True), RATES)
    )
    (HERE / "distill.md").write_text(page(fill(ROWS, wanted, _measure)))


def _measure(*, task: str, seed: int, distill: bool, rw: float) -> Row:
    base = baseline(task, seed, 0.0 if distill else TASKS[task].label_smoothing)
    quantized, scheme = quantize(base, Target(weight_rate=rw, activation_rate=4), seed=seed, distill=distill)
    codes = reference.run(freeze(quantized), channels_last(base.dataset.x_test))
    return {
        "actual": cost.weight_rate(scheme),
        "float": base.accuracy,
        "test": float(np.mean(codes.argmax(1) == base.dataset.y_test)),
    }


def page(rows: list[Row]) -> str:
    """Means over seeds, and the mean and standard deviation of the difference of each seed."""
    lines = [
        f"R_a = 4, test split; means over seeds, with standard deviations. Made by `{COMMAND}`;",
        "two cores of x86-64.",
        "",
        "| task | R_w asked | seeds | float | without | with `--distill` | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, rw in dict.fromkeys((row["task"], row["rw"]) for row in sorted(rows, key=lambda r: (r["task"], r["rw"]))):
        tests = [
            {
                row["seed"]: 100 * row["test"]
                for row in rows
                if (row["task"], row["rw"], row["distill"]) == (task, rw, on)
            }
            for on in (False, True)
        ]
        seeds = sorted(tests[0].keys() & tests[1].keys())
        floats = np.mean([100 * row["float"] for row in rows if row["task"] == task and not row["distill"]])
        without, taught = (np.array([of[seed] for seed in seeds]) for of in tests)
        lines.append(
            f"| {task} | {rw:g} | {len(seeds)} | {floats:.2f} | {_told(without)} | {_told(taught)} "
            f"| {np.mean(taught - without):+.2f} ± {np.std(taught - without, ddof=1):.2f} |"
        )
    return "\n".join(lines) + "\n"


def _told(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


if __name__ == "__main__":
    main()
