"""Does R_w hold, what does it cost, and is every project exact? One row per task, R_w and seed.

    python benchmarks/promise.py digits_mlp digits_cnn --seeds 5 --exact

Rows are kept in `promise.json`; those already there are not repeated. `--exact` also builds the QKeras model and
the hls4ml project of every network, in both io types, and compares every logit of the test split, as it is and scaled
by 8, with the golden model.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, baseline, fill, keep

from hmq_fpga.ir import cost, reference
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import finetune
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

RATES = (4, 8, 12, 15.5)
IO_TYPES = ("io_parallel", "io_stream")
HERE = Path(__file__).parent
ROWS = HERE / "promise.json"


def main() -> None:
    """Fill the table and write it as Markdown beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--method", default="hmq")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--nets", type=Path, default=Path("build/promise"), help="where the networks are kept")
    arguments = parser.parse_args()
    arguments.nets.mkdir(parents=True, exist_ok=True)
    wanted = (
        {"task": task, "method": arguments.method, "rw": rw, "seed": seed}
        for task, seed, rw in product(arguments.tasks, range(arguments.seeds), arguments.rates)
    )
    rows = fill(ROWS, wanted, partial(_measure, nets=arguments.nets))
    if arguments.exact:
        _check(rows, arguments)
    (HERE / "promise.md").write_text(page(rows))
    _draw(rows, HERE / "promise.svg")


def _net_folder(nets: Path, task: str, method: str, rw: float, seed: int) -> Path:
    return nets / f"{task}-{method}-rw{rw:g}-seed{seed}"


def _measure(*, task: str, method: str, rw: float, seed: int, nets: Path) -> Row:
    model, float_accuracy, dataset, training, budget = baseline(task, seed, TASKS[task].label_smoothing)
    quantized = instrument(model, training.input_shape, input_signed=training.input_signed)
    quantized, scheme, _ = find_scheme(quantized, training, budget, Target(weight_rate=rw), method=method, seed=seed)
    finetune(quantized, training, steps=budget.finetune_steps, learning_rate=budget.learning_rate, seed=seed)
    net = freeze(quantized)
    net.save(_net_folder(nets, task, method, rw, seed))
    codes = reference.run(net, channels_last(dataset.x_test))
    return {
        "actual": cost.weight_rate(scheme),
        "repaired": bool(scheme.found_by.get("repaired")),
        "float": float_accuracy,
        "accuracy": float(np.mean(codes.argmax(1) == dataset.y_test)),
        "bits": [t.format.width for t in scheme.of_kind("weight")],
    }


def _check(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Parity of every network, in both io types, on the test split and on the test split times 8."""
    from hmq_fpga.deploy.hls.project import HlsProject
    from hmq_fpga.deploy.parity import check
    from hmq_fpga.deploy.qkeras.model import QKerasSimulator
    from hmq_fpga.ir.network import QNet

    for row in sorted(rows, key=lambda row: row["seed"]):
        task, method, rw, seed = (row[name] for name in ("task", "method", "rw", "seed"))
        if task not in arguments.tasks or "mismatches" in row:
            continue
        folder = _net_folder(arguments.nets, task, method, rw, seed)
        if not folder.exists():
            _measure(task=task, method=method, rw=rw, seed=seed, nets=arguments.nets)
        net = QNet.load(folder)
        x = channels_last(TASKS[task].load(None).x_test)
        simulators: list[Any] = [QKerasSimulator(net)]
        with tempfile.TemporaryDirectory() as scratch:
            for io_type in IO_TYPES:
                project = HlsProject.create(net, Path(scratch) / io_type, io_type=io_type)
                project.compile()
                simulators.append(project)
            counts: dict[str, list[int]] = {}
            for simulator, label in zip(simulators, ("qkeras", *IO_TYPES), strict=True):
                for scale in (1, 8):
                    (result,) = check(net, [simulator], x * np.float32(scale), None).simulators.values()
                    counts[f"{label} x{scale}"] = [result.mismatches, result.values]
        row |= {"digest": net.digest, "mismatches": counts}
        keep(ROWS, rows)


def page(rows: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds, and how many logits differ in QKeras and both C simulations."""
    seeds = len({row["seed"] for row in rows})
    tasks = " ".join(sorted({row["task"] for row in rows}, reverse=True))
    lines = [
        f"Mean and standard deviation over {seeds} seeds, test split. Logits are those of QKeras and of both io types'",
        "C simulation, on the test split and on 8 times its inputs. Made by",
        f"`python benchmarks/promise.py {tasks} --seeds {seeds} --exact`; two cores of x86-64.",
        "",
        "| task | method | R_w | actual, all seeds | repaired | float % | QNet % | difference | logits that differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(r["task"], r["method"], r["rw"]) for r in rows}):
        group = [r for r in rows if (r["task"], r["method"], r["rw"]) == key]
        actual = [r["actual"] for r in group]
        before, after = (np.array([r[name] for r in group]) * 100 for name in ("float", "accuracy"))
        checked = [r["mismatches"].values() for r in group if "mismatches" in r]
        counts = [c for row in checked for c in row]
        compared = f"{sum(m for m, _ in counts)} of {sum(n for _, n in counts):,}"
        if len(checked) < len(group):
            compared += f", {len(checked)} of {len(group)} seeds"
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]:g} | {min(actual):.2f} … {max(actual):.2f} "
            f"| {sum(r['repaired'] for r in group)} of {len(group)} | {before.mean():.2f} | {after.mean():.2f} "
            f"| {(after - before).mean():+.2f} ± {(after - before).std():.2f} | {compared} |"
        )
    return "\n".join(lines) + "\n"


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the actual rate, every seed a point, the mean of the float model a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks = sorted({r["task"] for r in rows})
    with mpl.rc_context(
        {"svg.hashsalt": "promise", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(3.2 * len(tasks), 2.6), layout="constrained")
        for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
            group = [r for r in rows if r["task"] == task]
            axes.axhline(100 * np.mean([r["float"] for r in group]), color="0.6", lw=1, ls="--", label="float")
            axes.plot(
                [r["actual"] for r in group], [100 * r["accuracy"] for r in group], "o", ms=4, alpha=0.6, label="HMQ"
            )
            axes.set(title=task, xlabel="actual $R_w$", ylabel="test accuracy, %")
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
