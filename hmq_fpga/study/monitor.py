"""What a person sees of a run: progress bars, TensorBoard logs, a summary that fits one screen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

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
        """Enter a stage; the listener hears of its steps."""
        bar = self._progress.add_task(name, total=None, news="")
        writer = _LazyWriter(self._logs / name)
        last_drawn = 0.0

        def listen(step: int, steps: int, values: dict[str, float]) -> None:
            nonlocal last_drawn
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
    """Writes TensorBoard scalars; makes the log's folder with the first one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None and self._folder.parent.parent.is_dir():
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class SweepView:
    """The live table of a sweep on a terminal, silence elsewhere; a run's stage is read from its `run.json`."""

    def __init__(self) -> None:
        self._folder = Path()
        self._states: dict[str, str] = {}
        self._began = time.monotonic()
        self._live = Live(console=Console(stderr=True), auto_refresh=False)
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> SweepView:
        """Start drawing."""
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop drawing."""
        if self._shown:
            self._live.stop()

    def begin(self, folder: Path, names: list[str]) -> None:
        """Learn of the runs."""
        self._folder, self._states = folder, dict.fromkeys(names, "")

    def look(self, working: list[str]) -> None:
        """Read where the runs that have been handed to workers are, and draw."""
        if self._shown:
            now = {name: _stage_of(self._folder / name) for name in working}
            self._live.update(self._table(now), refresh=True)

    def ended(self, name: str, error: str | None) -> None:
        """Learn that a run has ended."""
        if self._shown:
            self._states[name] = f"[red]{escape(error)}" if error else _result(self._folder / name)

    def _table(self, now: Mapping[str, str]) -> Table:
        """The runs in work, then the others from the last that ended, as many as fit."""
        ended = sum(map(bool, self._states.values()))
        seconds = time.monotonic() - self._began
        lines = [(escape(name), f"[cyan]{state}") for name, state in now.items()]
        lines += [(escape(name), state) for name, state in reversed(self._states.items()) if state]
        lines += [(escape(name), "") for name in self._states if not self._states[name] and name not in now]
        header = (f"{ended} of {len(self._states)} runs", f"{seconds:.0f} s")
        return table(header, lines[: max(3, self._live.console.height - 3)])


def _stage_of(folder: Path) -> str:
    try:
        stages = json.loads((folder / "run.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return "begins"
    return next((name for name, stage in stages.items() if stage["state"] == "running"), "begins")


def _result(folder: Path) -> str:
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    exact = "bit-exact" if metrics["parity_passed"] else "[red]NOT bit-exact[/]"
    return f"R_w {metrics['rw_actual']:.2f}  {metrics['qnet_accuracy']:.2%}  {exact}"


def sweep_summary(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Group:
    """The outcome of a sweep: seeds together, failures, where to look."""
    from hmq_fpga.study import pareto

    found, lut = pareto.groups(rows), pareto.lut_axis(rows)
    axes = {pareto.RATE: ".2f", pareto.ACCURACY: ".2f", pareto.BOPS: ",.0f"} | ({lut: ",.0f"} if lut else {})
    lines = [
        (
            *(escape(group.method), f"{group.rw:g}", f"{group.ra:g}", str(len(group.rows))),
            *(f"{spread[0]:{style}}" if (spread := group.spread(axis)) else "–" for axis, style in axes.items()),
            "bit-exact" if all(row["parity_passed"] for row in group.rows) else "[red]BROKEN",
        )
        for group in found
    ]
    header = ("method", "R_w", "R_a", "seeds", *(axis.label for axis in axes), "parity")
    failures = [f"[red]failed[/] {escape(r['run'])}: {escape(r['error'])}" for r in rows if r["error"]]
    return Group(
        table(header, lines), *failures, f"table   {folder / 'table.csv'}", f"report  {folder / 'report.html'}"
    )


def diff_tables(found: Mapping[str, Any]) -> Group:
    """What `diff` found, for people."""
    a, b = found["runs"]
    parts: list[Any] = [f"a  {escape(a)}", f"b  {escape(b)}"]
    if found["same_network"]:
        parts.append("the integer networks are the same")
    sections = [("setting", {"": found["settings"]}), ("figure", {"": found["figures"]})]
    sections += [("tensor", {"": found["formats"]}), ("layer", found["layers"]), ("resources", found["resources"])]
    for title, changes in sections:
        lines = [
            (escape(f"{name} {key}".strip()), _value(old), _value(new), _change(old, new))
            for name, change in changes.items()
            for key, (old, new) in change.items()
        ]
        if lines:
            parts += ["", table((title, "a", "b", "change"), lines)]
    return Group(*parts)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return escape(f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value))


def _change(old: Any, new: Any) -> str:
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (old, new)) or old == new:
        return ""
    return f"{new - old:+,.4g}" if not old or abs(new / old - 1) < 1e-3 else f"{new / old - 1:+.1%}"


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
    grid.add_row("R_w", f"{metrics['rw_actual']:.2f} (asked {config['rw']:g})")
    grid.add_row("R_a", f"{metrics['ra_actual']:.2f} (asked {config['ra']:g})")
    if metrics["qnet_accuracy"] is None:
        grid.add_row("squared error", f"{metrics['qnet_mse']:.5g} on the test split (float {metrics['float_mse']:.5g})")
    else:
        grid.add_row(
            "accuracy", f"{metrics['qnet_accuracy']:.2%} on the test split (float {metrics['float_accuracy']:.2%})"
        )
    grid.add_row("parity", verdict(parity))
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
    return table(keys, [["" if r[key] is None else str(r[key]) for key in keys] for r in records])


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
