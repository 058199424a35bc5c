"""What a person sees of a run: progress bars, TensorBoard logs, a summary that fits one screen."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from hmq_fpga.study import interrupt
from hmq_fpga.study.run.config import BOUNDS, bounds_in, missed, reached

if TYPE_CHECKING:
    from hmq_fpga.search.train import Listener

REDRAW_S = 0.1


class Bars:
    """One bar per stage on a terminal, silence elsewhere; figures also go to TensorBoard logs.

    Attributes:
        logs: folder of the logs, one sub-folder per stage.
        quiet: draw nothing on a terminal either.
    """

    def __init__(self, logs: Path, *, quiet: bool = False) -> None:
        self._logs = logs
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[news]}"),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
        )

    def __enter__(self) -> Bars:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop drawing."""
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Listener]:
        """Enter a stage; the listener hears of its steps.

        Raises:
            KeyboardInterrupt: at its beginning or at a step, where the run has been asked to stop.
        """
        interrupt.check()
        bar = self._progress.add_task(name, total=None, news="")
        writer = _LazyWriter(self._logs / name)
        last_drawn = 0.0

        def listen(step: int, steps: int, values: dict[str, float]) -> None:
            nonlocal last_drawn
            interrupt.check()
            writer.write(step, values)
            now = time.monotonic()
            if now - last_drawn > REDRAW_S or step == steps:
                last_drawn = now
                news = "  ".join(f"{_LABELS.get(key, key)} {value:.4g}" for key, value in values.items())
                self._progress.update(bar, total=steps, completed=step, news=f"{step}/{steps}  {news}")

        try:
            yield listen
        finally:
            writer.close()
        self._finish(bar)

    def skipped(self, name: str) -> None:
        """Show that a stage was done before."""
        for task in self._progress.tasks:
            if task.description == name:
                self._progress.update(task.id, news="done before")

    def _finish(self, bar: TaskID) -> None:
        task = next(task for task in self._progress.tasks if task.id == bar)
        self._progress.update(bar, total=task.total or 1, completed=task.total or 1)
        self._progress.stop_task(bar)


_LABELS = {
    "val_accuracy": "accuracy",
    "batch_accuracy": "accuracy",
    "rate_expected": "R̃_w",
    "rate_actual": "R_w",
    "rate_target": "target",
    "temperature": "τ",
}


RANGES_SHOWN = 3  # notes on formats that values do not keep to; steps of a recurrent layer have them all alike
_SHARES = ("accuracy", "label_accuracy", "f1_micro", "f1_macro")
_FIGURES = {  # of a run's metrics
    "metric": "metric",
    "loss": "loss",
    "accuracy": "accuracy",
    "label_accuracy": "labels right",
    "f1_micro": "F1 of all",
    "f1_macro": "mean F1",
    "mse": "squared error",
    "mae": "absolute error",
    "r2": "R²",
}


class _LazyWriter:
    """Writes TensorBoard scalars; makes the log's folder with the first one.

    In this thread: a signal that interrupts the run could leave tensorboardX's own `SummaryWriter`, which hands events
    to another thread, waiting for ever.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None and self._folder.parent.parent.is_dir():
            from tensorboardX.event_file_writer import EventsWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))
        if self._writer is not None:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import scalar

            for key, value in values.items():
                if not math.isfinite(value):  # tensorboardX would print about it; the training says so itself
                    continue
                self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table."""
    grid = Table(*header, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        grid.add_row(*row)
    return grid


def scores(metrics: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Figures of merit of the float and of the quantized network; of several targets each, after the output's name."""
    floats, integers = (
        {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        for prefix in ("float_", "qnet_")
    )
    yield "", floats, integers
    for target in metrics.get("targets", ()):
        yield target["output"], target["float"], target["qnet"]


def summary(folder: Path, record: Mapping[str, Any]) -> Table:
    """The outcome of a run on one screen."""
    metrics, config = record["metrics"], record["config"]
    parity = json.loads((folder / "parity.json").read_text())
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="bold")
    grid.add_column()
    grid.add_row("task", f"{config['task']}, method {config['method']}, seed {config['seed']}")
    bounds = bounds_in(config)
    grid.add_row("R_w", f"{metrics['rw_actual']:.2f}" + (f" (asked {rw:g})" if (rw := bounds.pop("rw", None)) else ""))
    for name, most in bounds.items():
        exceeded = "[red]more than the[/] " if name in missed(metrics) else "at most "
        grid.add_row(BOUNDS[name], f"{reached(metrics, name):,.0f} ({exceeded}{most:,.0f})")
    grid.add_row("R_a", f"{metrics['ra_actual']:.2f} (asked {config['ra']:g})")
    for of, floats, integers in scores(metrics):
        for name, label in _FIGURES.items():
            if (value := integers.get(name)) is not None:
                form = ".2%" if name in _SHARES else ".5g"
                told = f"{value:{form}} on the test split (float {floats[name]:{form}})"
                grid.add_row(f"{of}: {label}" if of else label, told)
    if tries := metrics.get("tries"):
        told = f"the best of {len(tries)} searches on validation data, of seed {metrics['seed_kept']}"
        grid.add_row("kept", told)
    grid.add_row("parity", verdict(parity))
    if "coverage" in parity:
        grid.add_row("coverage", covered(parity["coverage"]))
    if "apply" in metrics.get("outputs", ""):
        grid.add_row("outputs", escape(metrics["outputs"]))
    for line in record.get("data", {}).get("notes", []):
        grid.add_row("data", escape(line))
    ranges = metrics.get("ranges", [])
    for line in ranges[:RANGES_SHOWN]:
        grid.add_row("ranges", escape(line))
    if len(ranges) > RANGES_SHOWN:
        grid.add_row("ranges", f"and {len(ranges) - RANGES_SHOWN} more, which the report names")
    for line in parity.get("left_out", {}).values():
        grid.add_row("left out", escape(line))
    for line in metrics.get("hls_limits", []):
        grid.add_row("hls", escape(line))
    for resources in json.loads((folder / "resources.json").read_text()):
        grid.add_row(resources["stage"], _figures(resources))
    grid.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in metrics["seconds"].items()))
    grid.add_row("project", str(folder / "hls"))
    grid.add_row("report", str(folder / "report.html"))
    return grid


def verdict(parity: Mapping[str, Any]) -> str:
    """Parity in a line: the content of `parity.json`."""
    counts = ", ".join(
        f"{name} {figures['mismatches']} of {figures['values']} values differ"
        for name, figures in parity["simulators"].items()
    )
    if layers := parity.get("layers"):
        wrong, of = (sum(s[key] for s in layers["simulators"].values()) for key in ("mismatches", "values"))
        counts += f"; layer by layer {wrong} of {of}"
    return f"{'passed' if parity['passed'] else 'BROKEN'}: {counts}"


def covered(coverage: Mapping[str, Any]) -> str:
    """Coverage in a line: the entry of `parity.json`."""
    by_layers = coverage.get("layer", 0)
    total = by_layers + sum(coverage[state] for state in ("data", "made", "unreachable", "missed"))
    return (
        f"{coverage['data']} of {total} events by the test split, {coverage['made']} by made samples, "
        + (f"{by_layers} by layers alone, " if by_layers else "")
        + f"{coverage['unreachable']} unreachable, {coverage['missed']} missed"
    )


def audit_table(audit: Mapping[str, Any]) -> Table:
    """Counts, the faults that parity did not catch, and proofs: the content of `audit.json`."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="bold")
    grid.add_column()
    if audit["mutants"]:
        grid.add_row(
            "faults",
            f"{len(audit['mutants'])} planted: {audit['caught']} caught, {audit['equal']} equal for all inputs, "
            f"{audit['hole']} holes",
        )
    for mutant in audit["mutants"]:
        if mutant["result"] != "caught":
            told = f"{mutant['backend']}: {mutant['kind']}, {mutant['where']}, {mutant['change']}: {mutant['reason']}"
            grid.add_row(mutant["result"], escape(told))
    for proof in audit["proofs"]:
        told = f"{proof['state']}, {proof['shown']} of {proof['outputs']} outputs for all inputs"
        if wrong := proof["counterexample"]:
            told += f"; output {wrong['output']} is {wrong['actual']}, not {wrong['expected']}, for {wrong['inputs']}"
        grid.add_row(proof["subject"], escape("; ".join([told, *proof["left"]])))
    return grid


def resources_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """All figures that `resources.json` entries have; a blank is unknown."""
    counts = ("lut", "ff", "carry", "dsp", "bram", "latency_cycles", "ii")
    keys = ("stage", "tool", "version", "part", "clock_ns", *counts, "fmax_mhz", "latency_ns", "notes")
    known = [key for key in keys if any(r.get(key) is not None for r in records)]
    return table(known, [["" if r.get(key) is None else escape(str(r[key])) for key in known] for r in records])


def synthesized(records: Sequence[Mapping[str, Any]], cutoffs: Sequence[Mapping[str, Any]]) -> Group:
    """What an open tool found, below the figures of the latency cutoffs that it was tried with."""
    columns = list(dict.fromkeys(key for one in cutoffs for key in one))
    lines = [[escape(str(one.get(key, ""))) for key in columns] for one in cutoffs]
    above: list[RenderableType] = [table(columns, lines), ""] if cutoffs else []
    return Group(*above, resources_table(records))


def _figures(resources: Mapping[str, Any]) -> str:
    units = {
        "lut": "LUT",
        "ff": "FF",
        "carry": "CARRY",
        "dsp": "DSP",
        "bram": "BRAM",
        "latency_cycles": "cycles",
        "ii": "II",
        "fmax_mhz": "MHz",
        "latency_ns": "ns",
    }
    known = [f"{resources[key]:,} {unit}" for key, unit in units.items() if resources.get(key)]
    return f"{', '.join(known)} ({resources['tool']})"
