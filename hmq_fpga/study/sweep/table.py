"""The table of a sweep, from what its runs have stored. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.run.config import BOUNDS
from hmq_fpga.study.run.stages import read_record, write_json

SWEEP = "sweep.json"
FORMAT = "hmq-fpga sweep, version 1"
_METRICS = (
    "rw_actual",
    "ra_actual",
    "float_accuracy",
    "qnet_accuracy",
    "parity_passed",
    "macs",
    "weight_bits",
    "bias_bits",
    "zero_weights",
    "bops",
    "ebops",
    "luts_actual",
    "qnet_digest",
)
_ERRORS = ("float_mse", "qnet_mse", "float_loss", "qnet_loss")  # of a regression, and of what has no other figure
RESOURCES = ("lut", "ff", "dsp", "bram", "carry", "latency_cycles", "ii", "fmax_mhz", "latency_ns")


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of `sweep.json`: `settings`, `runs` with `folder` and `config`, and `errors` by folder.

    Raises:
        InvalidInput: when it is missing or damaged.
    """
    try:
        content = json.loads((folder / SWEEP).read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{folder}: not the folder of a sweep: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InvalidInput(f"{folder / SWEEP}: not of this version of hmq-fpga; give a new folder with --out")
    return content


def write_sweep(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `sweep.json` in one step."""
    write_json(folder / SWEEP, {"format": FORMAT, **content})


def rows(folder: Path) -> list[dict[str, Any]]:
    """One row per run, in the order of the grid; the same for the same runs, however they came about.

    Columns: `run` (folder, relative), `task`, `method`, `seed`, targets and actual rates, accuracies (fractions of
    the test split; of a regression the squared errors, of several targets the losses), `parity_passed`, costs as in
    `run.json`, `<stage>_lut` … `<stage>_latency_ns` for each stage in `resources.json`, `state` (`done`, `failed` or
    `open`) and `error` (one line). Unknown is None.
    """
    sweep = read_sweep(folder)
    found = [_row(folder, run, sweep["errors"].get(run["folder"])) for run in sweep["runs"]]
    columns = dict.fromkeys(column for row in found for column in row)
    ordered = sorted(columns, key=lambda column: column in ("state", "error"))
    return [{column: row.get(column) for column in ordered} for row in found]


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Write `table.json` and `table.csv`, each in one step; returns the rows."""
    found = rows(folder)
    write_json(folder / "table.json", {"format": FORMAT, "rows": found})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    new = folder / ".table.csv.new"
    new.write_text(text.getvalue(), encoding="utf-8")
    new.replace(folder / "table.csv")
    return found


def _row(folder: Path, run: Mapping[str, Any], error: str | None) -> dict[str, Any]:
    config = run["config"]
    row: dict[str, Any] = {
        "run": run["folder"],
        "task": config["task"],
        "method": config["method"],
        "seed": config["seed"],
        **{f"{name}_target": config.get(name) for name in BOUNDS},
        "ra_target": config["ra"],
    }
    finished = None if error else _finished(folder / run["folder"], config)
    metrics = finished["metrics"] if finished else {}
    row |= {key: metrics.get(key) for key in _METRICS}
    if finished:
        row |= {key: metrics[key] for key in _ERRORS if key in metrics}
        row |= dict(_resources(folder / run["folder"]))
    return row | {"state": "failed" if error else "done" if finished else "open", "error": error}


def _finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run that has been done with this configuration to its end."""
    if not (folder / "report.html").exists():
        return None
    record = read_record(folder)
    done = {stage["state"] for stage in record["stages"].values()} == {"done"}
    return record if done and record["config"] == config and "parity" in record["stages"] else None


def _resources(folder: Path) -> Iterator[tuple[str, Any]]:
    for entry in json.loads((folder / "resources.json").read_text()):
        for key in RESOURCES:
            yield f"{entry['stage']}_{key}", entry.get(key)
