"""The report of a run: one self-contained page, made from the stored JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.study.pages.run_plots import finetune_figure, formats_figure, search_figure
from hmq_fpga.study.run.config import bounds_in, told
from hmq_fpga.study.run.stages import read_record

PAGE = "report.html"


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
    scheme = Scheme.load(folder / "scheme.json") if (folder / "scheme.json").exists() else Scheme(())
    figures = {
        "formats": formats_figure(scheme.tensors) if scheme else "",
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
            stages=record.get("stages", {}),
            versions=record.get("versions", {}),
            tensors=scheme.tensors,
            found_by=scheme.found_by,
            description=stored(folder / "layers.json"),
            parity=stored(folder / "parity.json"),
            resources=stored(folder / "resources.json") or [],
            figures=figures,
        )
    )


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
