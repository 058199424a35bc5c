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
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import Row, baseline, fill, quantize

from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir import cost
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import evaluate
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "frontier.json"
PEERS = HERE / "hgq2.json"  # made by hgq2.py
METHODS_ROWS = HERE / "methods.json"  # made by methods.py
PLAIN = ("hmq", "uniform")  # methods that know of no bound on logic
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
    base = baseline(task, seed)
    base = base._replace(budget=replace(base.budget, finetune_steps=steps))
    dataset, training = base.dataset, base.training
    quantized, scheme = quantize(base, Target(luts=luts), seed=seed, distill=True)
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
        "Made by `python benchmarks/frontier.py pendigits_shallow --luts 4000 3600 2600 2350 1700 1580`, the same of",
        "`mnist14_mlp --luts 6000 5800 3000 2950` and `mnist14_wide --luts 14000 13500` and, with `--no-yosys`, of",
        "`letter_mlp --luts 20000` and of `magic_mlp --luts 9000 4000`; two cores of x86-64.",
        "",
        "| task | LUTs asked | seeds | R_w | zeros % | test % | alkaid LUT | Yosys LUT / CARRY4 / FF |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peers, beside = _peers(), list[str]()
    for task, luts in sorted({(row["task"], row["luts"]) for row in rows}, key=lambda key: (key[0], -key[1])):
        group = [row for row in rows if (row["task"], row["luts"]) == (task, luts)]
        yosys = [f"{_mean(group, f'yosys_{name}'):,.0f}" for name in YOSYS if any(row["yosys"] for row in group)]
        lines.append(
            f"| {task} | {luts:,.0f} | {_seeds(group)} | {_mean(group, 'actual'):.1f} "
            f"| {100 * _mean(group, 'zero_weights'):.0f} | {_told(group)} | {' / '.join(yosys) or '–'} |"
        )
        if best := _best(peers, task, luts):
            for what, found in ((f"hmq_fpga, `--luts {luts:.0f} --distill`", group), ("HGQ2", best)):
                beside.append(f"| {task} | {luts:,.0f} | {what} | {_seeds(found)} | {_told(found)} |")
    lines += ["", "## Beside R_w alone", "", *_beside_rates(rows)]
    lines += [
        "",
        "## Beside HGQ2",
        "",
        "| task | LUTs at most | | seeds | test % | alkaid LUT |",
        "|---|---|---|---|---|---|",
    ]
    lines += [*beside, "", "## HGQ2 by schedule", ""]
    lines += [
        "Made by `make environment-hgq2` and",
        "`.venv-hgq2/bin/python benchmarks/hgq2.py pendigits_shallow --luts 4000 2600 1700`, and the same of",
        "`mnist14_mlp --luts 6000 3000`; two cores of x86-64. Of how many seeds the front has a network with so few",
        "LUTs, and the best of those on validation data; where no seed's has one there is no row.",
        "",
        "| task | LUTs at most | penalty | seeds | test % | alkaid LUT |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["task"], row["luts"], row["schedule"]) for row in peers):
        of_schedule = [row for row in peers if (row["task"], row["luts"], row["schedule"]) == key]
        if group := [row for row in of_schedule if "refused" not in row]:
            lines.append(
                f"| {key[0]} | {key[1]:,.0f} | {key[2]} | {len(group)} of {len(of_schedule)} | {_told(group)} |"
            )
    return "\n".join(lines) + "\n"


def _beside_rates(rows: list[Row]) -> list[str]:
    """Letters and the telescope's, beside what R_w alone gives."""
    lines = [
        "Made by `python benchmarks/methods.py` beside what stands above.",
        "",
        "| task | | seeds | test % | alkaid LUT |",
        "|---|---|---|---|---|",
    ]
    plain = json.loads(METHODS_ROWS.read_text())
    for task in ("letter_mlp", "magic_mlp"):
        bounds = sorted({row["luts"] for row in rows if row["task"] == task}, reverse=True)
        groups = {
            f"`--luts {luts:.0f} --distill`": [row for row in rows if (row["task"], row["luts"]) == (task, luts)]
            for luts in bounds
        }
        for method, rw in product(PLAIN, sorted({row["rw"] for row in plain if row["task"] == task})):
            groups[f"`{method}`, R_w {rw:g}"] = [
                {**row, "alkaid_lut": row["lut"]}
                for row in plain
                if (row["task"], row["method"], row["rw"]) == (task, method, rw)
            ]
        lines += [f"| {task} | {what} | {_seeds(of)} | {_told(of)} |" for what, of in groups.items() if of]
    return lines


def _peers() -> list[Row]:
    """HGQ2's, by task, bound and schedule."""
    rows: list[Row] = json.loads(PEERS.read_text())
    return sorted(rows, key=lambda row: (row["task"], -row["luts"], row["schedule"], row["seed"]))


def _best(peers: list[Row], task: str, luts: float) -> list[Row]:
    """Of each of HGQ2's seeds the network under a bound that is best on validation data, over all schedules."""
    found: dict[int, Row] = {}
    for row in peers:
        if (row["task"], row["luts"]) == (task, luts) and "refused" not in row:
            found[row["seed"]] = max(row, found.get(row["seed"], row), key=lambda row: row["validation"])
    return list(found.values())


def _seeds(rows: list[Row]) -> int:
    return len({row["seed"] for row in rows})


def _told(rows: list[Row]) -> str:
    """Two cells: accuracy with its spread, and LUTs."""
    spread = 100 * np.std([row["test"] for row in rows], ddof=min(len(rows) - 1, 1))
    return f"{100 * _mean(rows, 'test'):.2f} ± {spread:.2f} | {_mean(rows, 'alkaid_lut'):,.0f}"


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
            peers = [row for row in _peers() if row["task"].startswith(name) and "refused" not in row]
            axes.plot(*_points(peers), "k^", markersize=4, alpha=0.6, label="HGQ2 0.2.0")
            axes.set(xscale="log", xlabel="LUTs (alkaid)", ylabel="test accuracy, %", ylim=SHOWN[name], title=name)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", loc="lower right")
        figure.savefig(path, metadata={"Date": None})


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row["alkaid_lut"] for row in rows], [100 * row["test"] for row in rows]


if __name__ == "__main__":
    main()
