"""What finished sweeps found, as one table: accuracy and parity by task, R_a and R_w.

hmq-fpga sweep magic_mlp --rw 4 8 12 15 --ra 4 8 --seeds 0 1 2 --estimate model --out build/results/magic_mlp
python benchmarks/results.py build/results/*
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Key = tuple[str, float, float]  # task, R_a, R_w


def main() -> None:
    """Write `results.md` and `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps")
    arguments = parser.parse_args()
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for folder in sorted(run.parent for sweep in arguments.sweeps for run in sweep.glob("*/parity.json")):
        row = _row(folder)
        groups[row["task"], row["ra"], row["rw"]].append(row)
    here = Path(__file__).parent
    rows = [row for key in sorted(groups) for row in groups[key]]
    (here / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (here / "results.md").write_text(_table(groups))


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
        "float": metrics["float_accuracy"],
        "qnet": metrics["qnet_accuracy"],
        "csim_values": simulators["csim"]["values"],
        "mismatches": sum(simulator["mismatches"] for simulator in simulators.values()),
        "values": sum(simulator["values"] for simulator in simulators.values()),
    }


def _table(groups: dict[Key, list[dict[str, Any]]]) -> str:
    lines = [
        "Test split; mean and standard deviation over seeds. The last column counts output codes of QKeras, csim and,",
        "where the network was traced, RTL, on the whole split, but of `resnet8_cifar` on its first 1,000 samples.",
        "Made by `python benchmarks/results.py build/results/*` after",
        "`hmq-fpga sweep TASK --rw … --ra … --seeds 0 1 2 --out build/results/TASK`.",
        "",
        "| task | R_a | R_w asked | seeds | actual | float % | QNet % | difference | values that differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, ra, rw), rows in sorted(groups.items()):
        differences = [100 * (row["qnet"] - row["float"]) for row in rows]
        means = {key: np.mean([row[key] for row in rows]) for key in ("rw_actual", "float", "qnet")}
        lines.append(
            f"| {task} | {ra:g} | {rw:g} | {len(rows)} | {means['rw_actual']:.2f} "
            f"| {100 * means['float']:.2f} | {100 * means['qnet']:.2f} "
            f"| {np.mean(differences):+.2f} ± {np.std(differences):.2f} "
            f"| {sum(row['mismatches'] for row in rows)} of {sum(row['values'] for row in rows):,} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
