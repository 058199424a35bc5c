"""How far the estimates without synthesis are from Yosys, on the trained networks of finished sweeps.

    python benchmarks/results.py digits_tiny_cnn magic_mlp pendigits_mlp
    python benchmarks/estimates.py build/results/digits_tiny_cnn build/results/magic_mlp build/results/pendigits_mlp

Every run with Verilog is synthesized by Yosys. Rows are kept in `estimates.json`, and those already there are not
repeated: of these no folder is needed. The formula (`model`) was fitted to networks of seed 0,
so only the others test it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Row, fill
from lut_model import FITTED_SEED

from hmq_fpga.ir import logic
from hmq_fpga.ir.network import QNet
from hmq_fpga.study.run.hardware import synthesize_by_yosys

HERE = Path(__file__).parent
ROWS = HERE / "estimates.json"
PAIRS = (("trace", "yosys"), ("model", "trace"), ("model", "yosys"))


class Key(NamedTuple):
    """Tells a run from others."""

    task: str
    seed: int
    rw_target: float


def main() -> None:
    """Synthesize what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps")
    arguments = parser.parse_args()
    folders = {_key(run.parent): run.parent for sweep in arguments.sweeps for run in sorted(sweep.glob("*/rtl"))}
    rows = fill(ROWS, (key._asdict() for key in folders), lambda **key: _row(folders[Key(**key)]))
    for sweep in arguments.sweeps:
        if not any(row["task"] == sweep.name for row in rows):
            parser.error(f"{sweep}: no runs with Verilog: python benchmarks/results.py {sweep.name} makes them")
    (HERE / "estimates.md").write_text(page(rows))


def _key(folder: Path) -> Key:
    record = json.loads((folder / "run.json").read_text())
    return Key(record["config"]["task"], record["seed"], record["config"]["rw"])


def _row(folder: Path) -> Row:
    seconds_file = folder / "synth" / "seconds"
    if not seconds_file.exists():
        start = time.monotonic()
        synthesize_by_yosys(folder, time_limit_s=None)
        seconds_file.write_text(f"{time.monotonic() - start:.0f}")
    record = json.loads((folder / "run.json").read_text())
    stages = {entry["stage"]: entry for entry in json.loads((folder / "resources.json").read_text())}
    return {
        "rw_actual": record["metrics"]["rw_actual"],
        "accuracy": record["metrics"]["qnet_accuracy"],
        "ebops": record["metrics"]["ebops"],
        "latency_cycles": stages["trace"]["latency_cycles"],
        "model": round(logic.luts(QNet.load(folder / "qnet"))),
        **{stage: stages[stage]["lut"] for stage in ("trace", "yosys")},
        **{key: stages["yosys"][key] for key in ("carry", "ff", "dsp")},
        "trace_seconds": record["metrics"]["seconds"]["rtl"],
        "yosys_seconds": int(seconds_file.read_text()),
        "tools": f"alkaid {stages['trace']['version']}, Yosys {stages['yosys']['version']}",
    }


def page(rows: list[dict[str, Any]]) -> str:
    """Errors of the estimates, and the designs."""
    return _errors(rows) + "\n" + _designs(rows)


def _errors(rows: list[dict[str, Any]]) -> str:
    tasks = sorted({row["task"] for row in rows})
    folders = " ".join(f"build/results/{task}" for task in tasks)
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"Made by `python benchmarks/estimates.py {folders}`;",
        f"{seeds} seeds of training; two cores of x86-64.",
        "",
        f"{len(rows)} designs, {min(r['yosys'] for r in rows):,} to {max(r['yosys'] for r in rows):,} Yosys LUT; "
        f"{rows[0]['tools']}. R² is of the logarithms.",
        "",
        "| estimate | of | task | designs | ratio, median | 5 … 95 % | R² |",
        "|---|---|---|---|---|---|---|",
    ]
    for estimate, truth in PAIRS:
        for task in (*tasks, None):
            tested = [row for row in rows if estimate != "model" or row["seed"] != FITTED_SEED]
            group = [row for row in tested if task in (row["task"], None)]
            x, y = (np.log([row[key] for row in group]) for key in (estimate, truth))
            low, middle, high = np.exp(np.percentile(x - y, [5, 50, 95]))
            fit = 1 - np.sum((x - y) ** 2) / np.sum((y - y.mean()) ** 2)
            lines.append(
                f"| {estimate} | {truth} | {task or 'all'} | {len(group)} "
                f"| {middle:.3f} | {low:.3f} … {high:.3f} | {fit:.3f} |"
            )
    return "\n".join(lines) + "\n"


def _designs(rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    lines = [
        "| task | R_w asked | seeds | actual | test % | model LUT | trace LUT | Yosys LUT / CARRY4 / FF | cycles "
        "| trace s | Yosys s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, rw in sorted({(row["task"], row["rw_target"]) for row in rows}):
        group = [row for row in rows if (row["task"], row["rw_target"]) == (task, rw)]
        mean = {key: np.mean([row[key] for row in group]) for key in group[0] if key not in ("task", "tools")}
        lines.append(
            f"| {task} | {rw:g} | {len(group)} | {mean['rw_actual']:.2f} | {100 * mean['accuracy']:.2f} "
            f"| {mean['model']:,.0f} | {mean['trace']:,.0f} "
            f"| {mean['yosys']:,.0f} / {mean['carry']:,.0f} / {mean['ff']:,.0f} "
            f"| {mean['latency_cycles']:.1f} | {mean['trace_seconds']:.1f} | {mean['yosys_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
