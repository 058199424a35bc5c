"""The page of a sweep: one self-contained file, made from the stored JSON alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.study.pages import sweep_plots
from hmq_fpga.study.pages.run_page import PAGE, environment, given, put, stored
from hmq_fpga.study.pages.run_plots import inline_svg
from hmq_fpga.study.sweep import pareto, table
from hmq_fpga.study.sweep.pareto import Group, Row

FIGURES = "figures"
_CURVES = {"step", "rate_target", "rate_expected", "rate_actual", "temperature"}


def write_sweep_page(folder: Path) -> Path:
    """Write `report.html`, and `figures/` as SVG and PNG, of the sweep in `folder`.

    Raises:
        InvalidInput: when `folder` is not a sweep's, or a file of its is damaged.
    """
    sweep, rows = table.read_sweep(folder), table.rows(folder)
    found = pareto.groups(rows)
    (folder / FIGURES).mkdir(exist_ok=True)
    pictures = {}
    for name, figure in _figures(folder, rows, found).items():
        pictures[name] = Markup(inline_svg(figure, name))
        sweep_plots.save(figure, folder / FIGURES / name)
    script = _script()
    return put(
        folder,
        environment()
        .get_template("sweep.html.jinja")
        .render(
            task=rows[0]["task"],
            rows=rows,
            asked={row["run"]: pareto.asked(row) for row in rows},
            groups=[_summary(group) for group in found],
            choice=_choice(pareto.recommended(rows)),
            lut=pareto.lut_axis(rows),
            score=pareto.score_axis(rows),
            float_score=_float(pareto.score_axis(rows)),
            links={row["run"]: f"{quote(row['run'])}/{PAGE}" for row in rows},
            figures=pictures,
            settings=yaml.safe_dump(_settings(sweep), sort_keys=False, default_flow_style=None, allow_unicode=True),
            versions=_versions(folder, rows),
            data=Markup(_inert(_explorer(rows, found))),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        ),
    )


def _figures(folder: Path, rows: Sequence[Row], found: Sequence[Group]) -> dict[str, Figure]:
    """Figures by name, those that there are data for."""
    done = [row for row in rows if row["state"] == "done"]
    if not done:
        return {}
    score, lut = pareto.score_axis(rows), pareto.lut_axis(rows)
    baseline = fmean(score.scale * row[_float(score)] for row in done)
    made = {"accuracy_rw": sweep_plots.comparison_figure(found, pareto.RATE, score, baseline)}
    if lut and any(group.spread(lut) for group in found):
        made["accuracy_lut"] = sweep_plots.comparison_figure(found, lut, score, baseline)
    made["accuracy_bops"] = sweep_plots.comparison_figure(found, pareto.BOPS, score, baseline)
    made["formats"] = sweep_plots.heat_map({r["run"]: Scheme.load(folder / r["run"] / "scheme.json") for r in done})
    histories = {group.rows[0]["run"]: stored(folder / group.rows[0]["run"] / "search.json") for group in found}
    if drawn := {name: history for name, history in histories.items() if history and set(history) >= _CURVES}:
        made["search"] = sweep_plots.curves_figure(drawn)
    return made


def _float(score: pareto.Axis) -> str:
    """The column of the float model's score."""
    return score.key.replace("qnet", "float")


def _summary(group: Group) -> dict[str, Any]:
    """A group's line: means, and standard deviations over seeds."""
    score = pareto.score_axis(group.rows)
    scores = [score.scale * row[score.key] for row in group.rows]
    rates = [row["rw_actual"] for row in group.rows]
    return {
        "method": group.method,
        "asked": group.asked,
        "ra": group.ra,
        "seeds": len(group.rows),
        "rates": (min(rates), max(rates)),
        "score": fmean(scores),
        "deviation": stdev(scores) if len(scores) > 1 else None,
        "difference": fmean(score.scale * (row[score.key] - row[_float(score)]) for row in group.rows),
        "bops": fmean(row["bops"] for row in group.rows),
        "lut": spread[0] if (axis := pareto.lut_axis(group.rows)) and (spread := group.spread(axis)) else None,
        "exact": all(row["parity_passed"] for row in group.rows),
    }


def _choice(choice: pareto.Choice | None) -> dict[str, Any] | None:
    """What to take, as the page says it."""
    if choice is None:
        return None

    def told(group: Group) -> dict[str, Any]:
        spreads = {"score": group.spread(choice.score), "cost": group.spread(choice.cost)}
        return {"asked": group.asked, "method": group.method, "ra": group.ra, "seeds": len(group.rows)} | {
            name: spread[0] for name, spread in spreads.items() if spread
        }

    taken, cheaper = told(choice.taken), choice.cheaper and told(choice.cheaper)
    return {
        "taken": taken,
        "best": told(choice.best),
        "is_best": choice.taken is choice.best,
        "error": choice.error,
        "cheaper": cheaper,
        "lost": choice.lost(),
        "saved": 1 - cheaper["cost"] / taken["cost"] if cheaper else 0.0,
        "score": choice.score.label,
        "cost": choice.cost.label,
        "unit": "points" if choice.score.scale == 100 else "of squared error",
    }


def _explorer(rows: Sequence[Row], found: Sequence[Group]) -> dict[str, Any]:
    """What the page's script draws: axes, runs with their values, groups, and the front of every two axes."""
    axes = pareto.axes(rows)
    return {
        "axes": [{"key": axis.key, "label": axis.label} for axis in axes],
        "groups": [
            {"method": group.method, "spread": {axis.key: group.spread(axis) for axis in axes}} for group in found
        ],
        "runs": [
            {
                "name": row["run"],
                "link": f"{quote(row['run'])}/{PAGE}",
                "group": number,
                "parity": row["parity_passed"],
                "values": {axis.key: axis.scale * row[axis.key] for axis in axes if row.get(axis.key) is not None},
            }
            for number, group in enumerate(found)
            for row in group.rows
        ],
        "fronts": pareto.all_fronts(found, axes),
        "score": pareto.score_axis(rows).key,
        "palette": sweep_plots.PALETTE,
    }


def _inert(value: Any) -> str:
    """JSON that can stand in a `<script>` element whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script() -> str:
    return Path(__file__).with_name("sweep.js").read_text(encoding="utf-8")


def _settings(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a sweep, as its `CONFIG.yaml` takes them."""
    own = dict(sweep["settings"])
    rest = own.pop("settings")
    return given({**own, **rest})


def _versions(folder: Path, rows: Sequence[Row]) -> dict[str, str]:
    first = next((row["run"] for row in rows if row["state"] == "done"), None)
    return stored(folder / first / "run.json")["versions"] if first else {}
