"""Sweeps of the tasks, as one table: accuracy and parity by task and R_w.

    python benchmarks/results.py magic_mlp pendigits_mlp --seeds 5

A sweep that was interrupted goes on where it stopped. Rows are kept in `results.json`, and those already there are not
repeated.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import keep, missing

from hmq_fpga.study.sweep.grid import SweepConfig, sweep

Key = tuple[str, float]  # task, R_w
HERE = Path(__file__).parent
ROWS = HERE / "results.json"
RA = 4.0
IDENTITY = ("task", "ra", "rw", "seed")


class Grid(NamedTuple):
    """What a task is swept over, and other settings of its runs."""

    rw: Sequence[float] = (8, 12)
    settings: Mapping[str, Any] = {"estimate": "model"}


TRACED = {"estimate": "trace"}
GRIDS = {
    "pendigits_mlp": Grid(settings=TRACED),
    "letter_mlp": Grid(),
    "magic_mlp": Grid(settings=TRACED),
    "digits_tiny_cnn": Grid(settings=TRACED),
    "conv1d_fsdd": Grid(),
    "tanh_policy": Grid(rw=(8,), settings=TRACED),
    "fsdd_gru": Grid(rw=(8,)),
    "dscnn_fsdd": Grid(),
    "mnist_rows_gru": Grid(rw=(8,)),
    "mnist_cnn": Grid(),
    "fashion_cnn": Grid(),
    "resnet8_cifar": Grid(rw=(8,), settings={"estimate": "model", "label_smoothing": 0.0}),
}


def main() -> None:
    """Sweep what is missing, and write `results.md` and `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(GRIDS)} [all]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/results"), help="where the runs are kept")
    arguments = parser.parse_args()
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    for task in arguments.tasks or GRIDS:
        grid, folder = GRIDS[task], arguments.out / task
        keys = product((task,), (RA,), grid.rw, range(arguments.seeds))
        seeds = {key["seed"] for key in missing(rows, (dict(zip(IDENTITY, key, strict=True)) for key in keys))}
        if not seeds:
            continue
        sweep(
            SweepConfig(
                task=task,
                rw=tuple(grid.rw),
                ra=(RA,),
                seeds=tuple(sorted(seeds)),
                settings=dict(grid.settings),
                out=folder,
            ),
            jobs=arguments.jobs,
        )
        new = [_row(run.parent) for run in sorted(folder.glob("*/parity.json"))]
        made = {_identity(row) for row in new}
        rows = sorted([row for row in rows if _identity(row) not in made] + new, key=_identity)
        keep(ROWS, rows)
    (HERE / "results.md").write_text(page(rows))


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


def _row(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "run.json").read_text())
    simulators = json.loads((folder / "parity.json").read_text())["simulators"]
    config, metrics = record["config"], record["metrics"]
    return {
        "task": config["task"],
        "rw": config["rw"],
        "ra": config["ra"],
        "seed": record["seed"],
        "rw_actual": metrics["rw_actual"],
        "float": _score(metrics, "float"),
        "qnet": _score(metrics, "qnet"),
        "csim_values": simulators["csim"]["values"],
        "mismatches": sum(simulator["mismatches"] for simulator in simulators.values()),
        "values": sum(simulator["values"] for simulator in simulators.values()),
        "bops": metrics["bops"],
        "lut": _lut(folder),
    }


def _score(metrics: dict[str, Any], of: str) -> float:
    """Accuracy, of a regression R²."""
    accuracy: float | None = metrics[f"{of}_accuracy"]
    return metrics[f"{of}_r2"] if accuracy is None else accuracy


def _lut(folder: Path) -> int | None:
    """The tracer's figure, where there is one."""
    stages = {entry["stage"]: entry for entry in json.loads((folder / "resources.json").read_text())}
    return stages["trace"]["lut"] if "trace" in stages else None


def page(rows: list[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds."""
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["rw"]].append(row)
    lines = [
        "R_a = 4, test split; mean and standard deviation over seeds. The last column counts output codes of QKeras,",
        "csim and, where the network was traced, RTL, on the whole split, but of `resnet8_cifar` on its first 1,000",
        "samples; it was trained without label smoothing, as `--label-smoothing 0` does. Of `tanh_policy`, a",
        "regression, percentages are of R². Made by `python benchmarks/results.py`.",
        "",
        "| task | R_w asked | seeds | actual | float % | QNet % | difference | bits · MACs | LUT (trace) "
        "| values that differ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, rw), group in sorted(groups.items()):
        differences = [100 * (row["qnet"] - row["float"]) for row in group]
        means = {key: np.mean([row[key] for row in group]) for key in ("rw_actual", "float", "qnet")}
        lines.append(
            f"| {task} | {rw:g} | {len(group)} | {means['rw_actual']:.2f} "
            f"| {100 * means['float']:.2f} | {100 * means['qnet']:.2f} "
            f"| {np.mean(differences):+.2f} ± {np.std(differences):.2f} "
            f"| {_mean(group, 'bops')} | {_mean(group, 'lut')} "
            f"| {sum(row['mismatches'] for row in group)} of {sum(row['values'] for row in group):,} |"
        )
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    """The mean of a figure, which not every row may have."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return f"{np.mean(known):,.0f}" if len(known) == len(rows) else "–"


if __name__ == "__main__":
    main()
