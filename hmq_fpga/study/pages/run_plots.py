"""Figures as SVG text: without pyplot, the same bytes for the same data, in the colours of the page around them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hmq_fpga.ir.scheme import Kind, Tensor

History = Mapping[str, Sequence[float]]

WIDTH = 5.4  # inches: 9-point text stays readable on a phone
LONGEST = 28  # characters of a name
COLOURS: Mapping[Kind, str] = {"weight": "#3b76c4", "activation": "#d9822b", "input": "#5b9a68"}
INK = "#010203"  # stands for the text colour of the page
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # names may hold dollar signs
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}


def formats_figure(tensors: Sequence[Tensor], ranges: Mapping[str, Any] | None = None) -> str:
    """Bit-width of each tensor, or its mean, and its values against what its format holds.

    Args:
        tensors: of a scheme.
        ranges: content of `ranges.json`: a box and whiskers of the magnitudes of each tensor's values, as `_box` draws.
    """
    boxes = ranges["tensors"] if ranges else {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(tensors)), layout="constrained")
        bits, spans = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        rows = range(len(tensors))
        colours = [COLOURS[t.kind] for t in tensors]
        widths = [t.mean_width for t in tensors]
        bars = bits.barh(rows, widths, color=colours, height=0.62)
        bits.bar_label(bars, fmt="%.3g", padding=2)
        bits.set(xlabel="bits", xlim=(0, max(widths) * 1.15), yticks=rows, yticklabels=[short(t.name) for t in tensors])
        bits.invert_yaxis()
        steps = [-t.format.frac for t in tensors]
        lengths = [t.format.threshold_log2 + t.format.frac for t in tensors]
        spans.barh(rows, lengths, left=steps, color=INK, alpha=0.16, height=0.62)
        for row, (tensor, colour) in enumerate(zip(tensors, colours, strict=True)):
            if quantiles := boxes.get(tensor.name, {}).get("log2"):
                _box(spans, row, quantiles, colour)
        spans.set_xlabel("log2 of |value|")
        for axes in (bits, spans):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        kinds = [kind for kind in COLOURS if kind in {t.kind for t in tensors}]
        handles = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds))
        return inline_svg(figure, "formats")


def _box(axes: Axes, row: int, quantiles: Sequence[float], colour: str) -> None:
    """Whiskers from one in a hundred values to the largest, a box of the quartiles, a line at the median."""
    _, low, first, median, third, high = quantiles
    axes.plot([low, high], [row, row], "-", color=colour, linewidth=1.1)
    axes.plot([low, high], [row, row], "|", color=colour, markersize=5)
    axes.barh(row, third - first, left=first, height=0.36, color=colour, alpha=0.75)
    axes.plot([median, median], [row - 0.18, row + 0.18], "-", color=INK, linewidth=1.1)


def short(name: str) -> str:
    """The end of a long path, which tells more than its start."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def search_figure(history: History) -> str:
    """Weight rates over the steps of the search (asked for, expected, and of the current choice), and temperature."""
    lines = {"rate_target": "asked for", "rate_expected": "expected", "rate_actual": "actual"}
    return _curves(history, "search", [("R_w, float bits / bits", lines), ("temperature", {"temperature": ""})])


def finetune_figure(history: History) -> str:
    """Loss and validation accuracy over the steps of the fine-tuning."""
    losses = {"loss": "training", "val_loss": "validation"}
    percent = {"val_accuracy": [100 * share for share in history.get("val_accuracy", ())]}
    shown = {**history, **(percent if "val_accuracy" in history else {})}
    return _curves(shown, "finetune", [("loss", losses), ("val. accuracy, %", {"val_accuracy": ""})])


def _curves(history: History, name: str, panels: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Stacked panels `(title, {key: label})` over the steps; empty where the history has none of the keys."""
    there = [
        (title, present) for title, lines in panels if (present := {k: v for k, v in lines.items() if k in history})
    ]
    if "step" not in history or not there:
        return ""
    with mpl.rc_context(STYLE):
        heights = [1.9, 1.1][: len(there)]
        figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(there), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, (title, lines) in zip(grid[:, 0], there, strict=True):
            _panel(axes, history, lines)
            axes.set_ylabel(title)
        grid[-1, 0].set_xlabel("optimizer step")
        return inline_svg(figure, name)


def _panel(axes: Axes, history: History, lines: Mapping[str, str]) -> None:
    styles: dict[str, dict[str, Any]] = {"rate_target": {"color": INK, "linestyle": "--", "linewidth": 0.9}}
    colours = iter(COLOURS.values())
    for key, label in lines.items():
        style = styles.get(key) or {"color": next(colours)}
        axes.plot(history["step"], history[key], label=label, **style)
    if len(lines) > 1:
        axes.legend(loc="best")


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an inline `<svg>`, whose ids start with `name` and whose ink is the page's."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of names in other scripts: the reader's fonts have them
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for reference in (' id="', 'href="#', "url(#"):
        svg = svg.replace(reference, f"{reference}{name}-")
    return svg
