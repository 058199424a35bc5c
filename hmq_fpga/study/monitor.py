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

from rich.console import Console
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
    if metrics["qnet_accuracy"] is None:
        grid.add_row("squared error", f"{metrics['qnet_mse']:.5g} on the test split (float {metrics['float_mse']:.5g})")
    else:
        grid.add_row(
            "accuracy", f"{metrics['qnet_accuracy']:.2%} on the test split (float {metrics['float_accuracy']:.2%})"
        )
    grid.add_row("parity", verdict(parity))
    if "apply" in metrics.get("outputs", ""):
        grid.add_row("outputs", escape(metrics["outputs"]))
    for line in metrics.get("ranges", []):
        grid.add_row("ranges", escape(line))
    for line in parity.get("left_out", {}).values():
        grid.add_row("left out", escape(line))
    asked = {name: layer["reuse_factor"] or config["reuse_factor"] for name, layer in config["layers"].items()}
    for name, factor in metrics.get("reuse_factors", {}).items():
        if factor != (wish := asked.get(name, config["reuse_factor"])):
            grid.add_row("reuse factor", f"{factor} of {name}, the nearest to {wish} that divides its work")
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
    return f"{'passed' if parity['passed'] else 'BROKEN'}: {counts}"


def resources_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """All figures of `resources.json` entries; a blank is unknown."""
    keys = ("stage", "tool", "version", "part", "clock_ns", "lut", "ff", "dsp", "bram", "latency_cycles", "ii", "notes")
    return table(keys, [["" if r[key] is None else escape(str(r[key])) for key in keys] for r in records])


def _figures(resources: Mapping[str, Any]) -> str:
    units = {
        "lut": "LUT",
        "ff": "FF",
        "carry": "CARRY",
        "dsp": "DSP",
        "bram": "BRAM",
        "latency_cycles": "cycles",
        "ii": "II",
    }
    known = [f"{resources[key]:,} {unit}" for key, unit in units.items() if resources[key]]
    return f"{', '.join(known)} ({resources['tool']})"
