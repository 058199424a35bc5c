"""The report of a run: one self-contained page, made from the stored JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from hmq_fpga.deploy.coverage import EVENTS
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.study.pages.run_plots import finetune_figure, formats_figure, search_figure
from hmq_fpga.study.run.config import bounds_in, told
from hmq_fpga.study.run.stages import read_record
from hmq_fpga.study.sweep.pareto import STAGES

PAGE = "report.html"
ACCURACY = ("accuracy", "accuracy", True)
FIGURES = (  # name among the metrics, what it is called, whether it is a share
    ("metric", "metric of one's own", False),
    ("loss", "loss", False),
    ("label_accuracy", "labels right", True),
    ("f1_micro", "F1 of all labels", True),
    ("f1_macro", "mean F1 of a label", True),
    ("mse", "squared error", False),
    ("rmse", "root of it", False),
    ("mae", "absolute error", False),
    ("r2", "R²", False),
)
AUDIT = "audit.json"


def write_page(folder: Path) -> Path:
    """Write `report.html` of the run in `folder`; what the run has not made yet is left out.

    Raises:
        InvalidInput: when `folder` is not a run's, or one of its files is damaged.
    """
    return put(folder, _page(folder))


def put(folder: Path, text: str) -> Path:
    """Write a folder's page in one step."""
    new = folder / f".{PAGE}.new"
    new.write_text(text, encoding="utf-8")
    return new.replace(folder / PAGE)


def _page(folder: Path) -> str:
    record = read_record(folder)
    config = record.get("config", {})
    parity = stored(folder / "parity.json") or {}
    had = {event for tensor in parity.get("coverage", {}).get("tensors", ()) for event in tensor["events"]}
    scheme = Scheme.load(folder / "scheme.json") if (folder / "scheme.json").exists() else Scheme(())
    resources = stored(folder / "resources.json") or []
    ranges = stored(folder / "ranges.json")
    figures = {
        "formats": formats_figure(scheme.tensors, ranges) if scheme else "",
        "search": search_figure(stored(folder / "search.json") or {}),
        "finetune": finetune_figure(stored(folder / "finetune.json") or {}),
    }
    return (
        environment()
        .get_template(f"{PAGE}.jinja")
        .render(
            config=config,
            asked=told(bounds_in(config)),
            settings=yaml.safe_dump(given(config), sort_keys=False, default_flow_style=None, allow_unicode=True),
            metrics=record.get("metrics", {}),
            data=record.get("data", {"notes": []}),
            figures_told=FIGURES,
            figures_of_target=(ACCURACY, *FIGURES),
            stages=record.get("stages", {}),
            versions=record.get("versions", {}),
            tensors=scheme.tensors,
            found_by=scheme.found_by,
            description=stored(folder / "layers.json"),
            parity=parity,
            events={event: meaning for event, meaning in EVENTS.items() if event in had},
            audit=_audit(folder, record),
            resources=resources,
            told_by=most_telling(resources),
            ranges=ranges,
            figures=figures,
        )
    )


def most_telling(resources: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of the stage that is nearest to hardware, of those that count LUTs."""
    found = {record["stage"]: record for record in resources if record.get("lut") is not None}
    return next((found[stage] for stage in STAGES if stage in found), None)


def _audit(folder: Path, record: Mapping[str, Any]) -> Any:
    """The audit of the run's network, if there was one."""
    found = stored(folder / AUDIT)
    return found if found and found["qnet"] == record.get("metrics", {}).get("qnet_digest") else None


def environment() -> Environment:
    """Templates of pages, which escape what they are given."""
    made = Environment(
        loader=PackageLoader("hmq_fpga.study", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": _percent, "number": _number}
    return made


def given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something, as a `CONFIG.yaml` takes them."""
    return {key: value for key, value in config.items() if value not in (None, {}, []) and value is not False}


def stored(path: Path) -> Any:
    """Content of a JSON file; None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read: {error}; run again to make it anew") from error


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    """A count with thin spaces between thousands, any other number with four digits; a dash for what is unknown."""
    if value is None:
        return "–"
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else f"{value:.4g}"
