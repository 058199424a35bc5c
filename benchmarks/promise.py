"""Does R_w hold, what does it cost, and is every project exact? One row per task, R_w and seed.

    python benchmarks/promise.py digits_mlp digits_cnn --seeds 5 --exact

Rows are appended to a JSON-lines file; those already there are not repeated. `--exact` also builds the QKeras model and
the hls4ml project of every network, in both io types, and compares every logit of the test split, as it is and scaled
by 8, with the golden model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmq_fpga.ir import cost, reference
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import finetune, fit
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS, training_task

RATES = (4, 6, 8, 10, 12, 14, 15.5)
IO_TYPES = ("io_parallel", "io_stream")


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
    rows_file = arguments.nets / "rows.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    known = {(r["task"], r["method"], r["rw"], r["seed"]): r for r in rows}
    for task in arguments.tasks:
        for seed in range(arguments.seeds):
            wanted = [rw for rw in arguments.rates if (task, arguments.method, rw, seed) not in known]
            for row in _train(task, arguments.method, wanted, seed, arguments.nets):
                known[task, arguments.method, row["rw"], seed] = row
                with rows_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    exact_file = arguments.nets / "exact.jsonl"
    if arguments.exact:
        _check(known, arguments, exact_file)
    exact = [json.loads(line) for line in exact_file.read_text().splitlines()] if exact_file.exists() else []
    here = Path(__file__).parent
    (here / "promise.md").write_text(_table(list(known.values()), exact))
    _draw(list(known.values()), here / "promise.svg")


def _net_folder(nets: Path, task: str, method: str, rw: float, seed: int) -> Path:
    return nets / f"{task}-{method}-rw{rw:g}-seed{seed}"


def _train(name: str, method: str, rates: list[float], seed: int, nets: Path) -> Any:
    """The rows of one task and seed; the float baseline is shared."""
    if not rates:
        return
    task = TASKS[name]
    dataset = task.load(None)
    training, budget = training_task(dataset, task.batch_size), task.budget
    torch.manual_seed(seed)
    model = task.build()
    fit(model, training, steps=budget.float_steps, learning_rate=budget.float_learning_rate, seed=seed)
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in torch.from_numpy(dataset.x_test).split(1024)]).numpy()
    float_accuracy = float(np.mean(outputs.argmax(1) == dataset.y_test))
    for rw in rates:
        quantized = instrument(model, training.input_shape, input_signed=training.input_signed)
        quantized, scheme, _ = find_scheme(
            quantized, training, budget, Target(weight_rate=rw), method=method, seed=seed
        )
        finetune(quantized, training, steps=budget.finetune_steps, learning_rate=budget.learning_rate, seed=seed)
        net = freeze(quantized)
        net.save(_net_folder(nets, name, method, rw, seed))
        codes = reference.run(net, channels_last(dataset.x_test))
        yield {
            "task": name,
            "method": method,
            "rw": rw,
            "seed": seed,
            "actual": cost.weight_rate(scheme),
            "repaired": bool(scheme.found_by.get("repaired")),
            "float": float_accuracy,
            "accuracy": float(np.mean(codes.argmax(1) == dataset.y_test)),
            "bits": [t.format.width for t in scheme.of_kind("weight")],
        }


def _check(rows: dict[Any, dict[str, Any]], arguments: argparse.Namespace, done_file: Path) -> None:
    """Parity of every network, in both io types, on the test split and on the test split times 8."""
    from hmq_fpga.deploy.hls.project import HlsProject
    from hmq_fpga.deploy.parity import check
    from hmq_fpga.deploy.qkeras.model import QKerasSimulator
    from hmq_fpga.ir.network import QNet

    done = {json.loads(line)["digest"] for line in done_file.read_text().splitlines()} if done_file.exists() else set()
    for (task, method, rw, seed), _ in sorted(rows.items()):
        net = QNet.load(_net_folder(arguments.nets, task, method, rw, seed))
        if task not in arguments.tasks or net.digest in done:
            continue
        x = channels_last(TASKS[task].load(None).x_test)
        simulators: list[Any] = [QKerasSimulator(net)]
        with tempfile.TemporaryDirectory() as folder:
            for io_type in IO_TYPES:
                project = HlsProject.create(net, Path(folder) / io_type, io_type=io_type)
                project.compile()
                simulators.append(project)
            counts: dict[str, list[int]] = {}
            for simulator, label in zip(simulators, ("qkeras", *IO_TYPES), strict=True):
                for scale in (1, 8):
                    (result,) = check(net, [simulator], x * np.float32(scale), None).simulators.values()
                    counts[f"{label} x{scale}"] = [result.mismatches, result.values]
        with done_file.open("a") as file:
            row = {"task": task, "method": method, "rw": rw, "seed": seed, "digest": net.digest}
            file.write(json.dumps(row | {"mismatches": counts}) + "\n")


def _table(rows: list[dict[str, Any]], exact: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds, and how many logits differ in QKeras and both C simulations."""
    lines = [
        "| task | method | R_w | actual, all seeds | repaired | float % | QNet % | difference | logits that differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(r["task"], r["method"], r["rw"]) for r in rows}):
        group = [r for r in rows if (r["task"], r["method"], r["rw"]) == key]
        actual = [r["actual"] for r in group]
        before, after = (np.array([r[name] for r in group]) * 100 for name in ("float", "accuracy"))
        counts = [c for e in exact if (e["task"], e["method"], e["rw"]) == key for c in e["mismatches"].values()]
        compared = f"{sum(m for m, _ in counts)} of {sum(n for _, n in counts):,}" if counts else "not compared"
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
