"""Figures of a sweep, for its page and for papers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.study.pages.run_plots import INK, STYLE, WIDTH, History, short
from hmq_fpga.study.sweep.pareto import Axis, Group, mean_front

PALETTE = ("#3b76c4", "#d9822b", "#5b9a68", "#a05195", "#7f7f7f")
DPI = 200


def comparison_figure(found: Sequence[Group], x: Axis, y: Axis, baseline: float) -> Figure:
    """`y` against `x`: every run, the mean and range over seeds, the Pareto front of the means.

    Args:
        found: runs by method and targets.
        x: the axis across.
        y: the axis up.
        baseline: mean `y` of the float models.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
        axes = figure.subplots()
        known = [(g, a, b) for g in found if (a := g.spread(x)) and (b := g.spread(y))]
        colours = dict(zip(dict.fromkeys(g.method for g, _, _ in known), cycle(PALETTE), strict=False))
        for group, (mx, lx, hx), (my, ly, hy) in known:
            colour = colours[group.method]
            axes.plot(group.values(x) or (), group.values(y) or (), ".", color=colour, alpha=0.45, markersize=4)
            if len(group.rows) > 1:
                axes.errorbar(mx, my, [[my - ly], [hy - my]], [[mx - lx], [hx - mx]], color=colour, elinewidth=0.9)
            axes.plot(mx, my, "o", color=colour, markersize=5)
        means = [
            (a[0], b[0])
            for group in (found[i] for i in mean_front(found, x, y))
            if (a := group.spread(x)) and (b := group.spread(y))
        ]
        axes.plot(*zip(*means, strict=True), color=INK, linewidth=0.9, zorder=1, label="Pareto front of the means")
        for method, colour in colours.items():
            axes.plot([], [], "o", color=colour, markersize=5, label=method)
        axes.axhline(baseline, color=INK, linestyle=":", linewidth=0.9, label="float")
        if max(a[2] for _, a, _ in known) >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel=x.label, ylabel=y.label)
        figure.legend(loc="outside upper right", ncols=2 + len(colours))
        return figure


def heat_map(schemes: Mapping[str, Scheme]) -> Figure:
    """Bits, or their mean, and log2 of the threshold of each tensor (a row), for each run (a column)."""
    names = list(dict.fromkeys(name for scheme in schemes.values() for name in scheme))
    bits = np.full((len(names), len(schemes)), np.nan)
    exponents = np.full_like(bits, np.nan)
    for column, scheme in enumerate(schemes.values()):
        for tensor in scheme.tensors:
            at = names.index(tensor.name), column
            bits[at], exponents[at] = tensor.mean_width, tensor.format.threshold_log2
    with mpl.rc_context(STYLE):
        size = (max(WIDTH, 1.9 + 0.27 * len(schemes)), 1.3 + 2 * (0.35 + 0.24 * len(names)))
        figure = Figure(figsize=size, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        _cells(top, bits, "bits", "viridis")
        _cells(bottom, exponents, "log2 of the threshold", "cividis")
        for axes in (top, bottom):
            axes.set_yticks(np.arange(len(names)) + 0.5, [short(name) for name in names])
        bottom.set_xticks(np.arange(len(schemes)) + 0.5, [short(name) for name in schemes], rotation=90)
        return figure


def _cells(axes: Axes, values: np.ndarray[Any, Any], title: str, colours: str) -> None:
    axes.pcolormesh(values, cmap=colours, edgecolor="white", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if value < middle else "black"
            axes.text(column + 0.5, row + 0.5, f"{value:.2g}", ha="center", va="center", fontsize=7, color=ink)


def curves_figure(histories: Mapping[str, History]) -> Figure:
    """For each run: rate asked for, expected and actual over the steps of the search, and temperature."""
    with mpl.rc_context(STYLE):
        lines = -(-len(histories) // 2)
        figure = Figure(figsize=(WIDTH, 0.5 + 1.5 * lines), layout="constrained")
        grid = figure.subplots(lines, 2, sharex=True, squeeze=False)
        for axes in grid.flat[len(histories) :]:
            axes.set_visible(False)
        styles: dict[str, dict[str, Any]] = {
            "rate_target": {"color": INK, "linestyle": "--", "linewidth": 0.9, "label": "R_w asked for"},
            "rate_expected": {"color": PALETTE[0], "label": "expected"},
            "rate_actual": {"color": PALETTE[1], "label": "actual"},
        }
        handles = []
        for axes, (name, history) in zip(grid.flat, histories.items(), strict=False):
            drawn = [axes.plot(history["step"], history[key], **style)[0] for key, style in styles.items()]
            axes.set_title(short(name), fontsize=8, loc="left")
            warm = axes.twinx()
            drawn += warm.plot(history["step"], history["temperature"], color=PALETTE[2], label="temperature (right)")
            warm.grid(visible=False)
            warm.set_ylim(bottom=0)
            handles = drawn
        figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=8)
        figure.supxlabel("optimizer step", fontsize=9)
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `path` with `.svg` and `.png`; the same bytes for the same data."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of names in other scripts
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.set_facecolor("white")
        FigureCanvasSVG(figure).print_figure(path.with_suffix(".svg"), metadata=nothing)
        FigureCanvasAgg(figure).print_figure(path.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
