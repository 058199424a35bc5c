"""What `--drop-dead` takes out: channels that no training or validation sample activates, at R_w = 8 and R_a = 4.

    python benchmarks/dead.py digits_mlp pendigits_mlp letter_mlp magic_mlp --seeds 5

Rows are kept in `dead.json`, and those already there are not repeated.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import Row, asked, baseline, fill, quantize

from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.ir import reference
from hmq_fpga.ir.dead import without_dead
from hmq_fpga.ir.ops import Quantize
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.target import Target
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "dead.json"
RW, RA = 8.0, 4.0


def main() -> None:
    """Fill the rows, and write the table."""
    arguments = asked(__doc__)
    torch.set_num_threads(1)
    wanted = ({"task": task, "seed": seed} for task, seed in product(arguments.tasks, range(arguments.seeds)))
    (HERE / "dead.md").write_text(page(fill(ROWS, wanted, _measure)))


def _measure(*, task: str, seed: int) -> Row:
    base = baseline(task, seed, TASKS[task].label_smoothing)
    dataset = base.dataset
    quantized, _ = quantize(base, Target(weight_rate=RW, activation_rate=RA), seed=seed, distill=False)
    net = freeze(quantized)
    smaller, dead = without_dead(net, map(channels_last, (dataset.x_train, dataset.x_val)))
    codes = [reference.run(of, channels_last(dataset.x_test)) for of in (net, smaller)]
    test, test_smaller = (float(np.mean(of.argmax(1) == dataset.y_test)) for of in codes)
    return {
        "float": base.accuracy,
        "channels": sum(net.shapes[op.name][-1] for op in net.ops if isinstance(op, Quantize)),
        "dead": sum(dead.values()),
        "test": test,
        "test_smaller": test_smaller,
        "samples": len(dataset.x_test),
        "samples_that_differ": int((codes[0] != codes[1]).reshape(len(codes[0]), -1).any(axis=1).sum()),
        "lut": traced_luts(net),
        "lut_smaller": traced_luts(smaller),
    }


def page(rows: list[Row]) -> str:
    """Means over seeds."""
    lines = [
        f"R_w = {RW:g}, R_a = {RA:g}; means over seeds; LUTs by the tracer; samples differ in an output code.",
        "Made by `python benchmarks/dead.py digits_mlp pendigits_mlp letter_mlp magic_mlp --seeds 5`.",
        "",
        "| task | seeds | dead of all channels | test % | without | test samples that differ | LUTs | without "
        "| LUTs saved % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in sorted({row["task"] for row in rows}):
        group = [row for row in rows if row["task"] == task]
        mean = {name: np.mean([row[name] for row in group]) for name in group[0] if name != "task"}
        saved = [100 * (1 - row["lut_smaller"] / row["lut"]) for row in group]
        lines.append(
            f"| {task} | {len(group)} | {mean['dead']:.1f} of {mean['channels']:.0f} | {100 * mean['test']:.2f} "
            f"| {100 * mean['test_smaller']:.2f} | {sum(row['samples_that_differ'] for row in group)} of "
            f"{sum(row['samples'] for row in group):,} | {mean['lut']:,.0f} | {mean['lut_smaller']:,.0f} "
            f"| {np.mean(saved):.1f} ± {np.std(saved, ddof=1):.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
