"""What a person sees of a sweep: a live table, and a summary that fits one screen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hmq_fpga.study.monitor import table
from hmq_fpga.study.sweep import pareto


class SweepView:
    """The live table of a sweep on a terminal, silence elsewhere; a run's stage is read from its `run.json`."""

    def __init__(self) -> None:
        self._folder = Path()
        self._states: dict[str, str] = {}
        self._working: list[str] = []
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
        self._working = working
        if self._shown:
            self._live.update(self._table(), refresh=True)

    def ended(self, name: str, error: str | None) -> None:
        """Learn that a run has ended."""
        if self._shown:
            self._states[name] = f"[red]{escape(error)}" if error else _result(self._folder / name)
            self.look([other for other in self._working if other != name])

    def _table(self) -> Table:
        """The runs in work, then the others from the last that ended, as many as fit."""
        now = {name: _stage_of(self._folder / name) for name in self._working}
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
    score = pareto.score_axis([metrics])
    exact = "bit-exact" if metrics["parity_passed"] else "[red]NOT bit-exact[/]"
    return f"R_w {metrics['rw_actual']:.2f}  {score.scale * metrics[score.key]:.4g}  {exact}"


def sweep_summary(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Group:
    """The outcome of a sweep: seeds together, failures, where to look."""
    found, lut = pareto.groups(rows), pareto.lut_axis(rows)
    score = pareto.score_axis(rows)
    axes = {pareto.RATE: ".2f", score: ".4g", pareto.BOPS: ",.0f"} | ({lut: ",.0f"} if lut else {})
    lines = [
        (
            *(escape(group.method), group.asked, f"{group.ra:g}", str(len(group.rows))),
            *(f"{spread[0]:{style}}" if (spread := group.spread(axis)) else "–" for axis, style in axes.items()),
            "bit-exact" if all(row["parity_passed"] for row in group.rows) else "[red]BROKEN",
        )
        for group in found
    ]
    header = (
        "method",
        "asked",
        "R_a",
        "seeds",
        "R_w",
        score.label.removeprefix("test "),
        "bits · MACs",
        *([lut.label] if lut else []),
        "parity",
    )
    choice = pareto.recommended(rows)
    take = [f"take    {choice.taken.asked}, {escape(choice.taken.method)}"] if choice and len(found) > 1 else []
    failures = [f"[red]failed[/] {escape(r['run'])}: {escape(r['error'])}" for r in rows if r["error"]]
    return Group(
        table(header, lines), *failures, *take, f"table   {folder / 'table.csv'}", f"report  {folder / 'report.html'}"
    )
