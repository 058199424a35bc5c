"""What changed between two runs: settings, accuracy, formats, resources, layer by layer. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape

from hmq_fpga.ir import cost
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import Scheme, Tensor
from hmq_fpga.study.monitor import table
from hmq_fpga.study.run.stages import read_record
from hmq_fpga.study.sweep.table import RESOURCES

FIGURES = (
    "float_accuracy",
    "qnet_accuracy",
    "float_mse",
    "qnet_mse",
    "float_loss",
    "qnet_loss",
    "float_metric",
    "qnet_metric",
    "float_label_accuracy",
    "qnet_label_accuracy",
    "float_f1_micro",
    "qnet_f1_micro",
    "float_f1_macro",
    "qnet_f1_macro",
    "float_mae",
    "qnet_mae",
    "float_rmse",
    "qnet_rmse",
    "float_r2",
    "qnet_r2",
    "parity_passed",
    "rw_actual",
    "ra_actual",
    "weight_bits",
    "bias_bits",
    "zero_weights",
    "macs",
    "bops",
    "ebops",
)


def diff(a: Path, b: Path) -> dict[str, Any]:
    """What differs between the finished runs in the folders `a` and `b`, always as `[of a, of b]`.

    Returns:
        `settings`: those that differ; `figures`: accuracies, rates and costs, all that are known; `formats`: tensors
        whose format differs, as HLS types with `None` where a tensor is missing; `layers`: per linear layer, costs
        that differ; `resources`: per stage, figures that differ; `same_network`: whether the integers are the same.

    Raises:
        InvalidInput: when one is not the folder of a run that has come as far as parity.
    """
    records = [_finished(folder) for folder in (a, b)]
    schemes = [Scheme.load(folder / "scheme.json") for folder in (a, b)]
    layers = [_layers(folder, scheme) for folder, scheme in zip((a, b), schemes, strict=True)]
    resources = [_resources(folder) for folder in (a, b)]
    metrics = [record["metrics"] for record in records]
    return {
        "runs": [str(a), str(b)],
        "same_network": metrics[0]["qnet_digest"] == metrics[1]["qnet_digest"],
        "settings": _changed(*(record["config"] for record in records)),
        "figures": {
            key: [m.get(key) for m in metrics] for key in FIGURES if any(m.get(key) is not None for m in metrics)
        },
        "formats": _changed(*({t.name: _type(t) for t in scheme.tensors} for scheme in schemes)),
        "layers": {name: change for name in _names(layers) if (change := _changed(*_of(layers, name)))},
        "resources": {name: change for name in _names(resources) if (change := _changed(*_of(resources, name)))},
    }


def _finished(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record["stages"].get("parity", {}).get("state") != "done":
        raise InvalidInput(f"{folder}: this run was not finished; run it again first")
    return record


def _layers(folder: Path, scheme: Scheme) -> dict[str, dict[str, Any]]:
    costs = [asdict(layer) for layer in cost.layer_costs(QNet.load(folder / "qnet"), scheme)]
    return {layer.pop("name"): layer for layer in costs}


def _resources(folder: Path) -> dict[str, dict[str, Any]]:
    entries = json.loads((folder / "resources.json").read_text())
    return {f"{entry['stage']} ({entry['tool']})": {key: entry.get(key) for key in RESOURCES} for entry in entries}


def _type(tensor: Tensor) -> str:
    """The HLS type, whose bits and integer bits say width and threshold, and the mean of widths of single weights."""
    kind = "ap_fixed" if tensor.format.signed else "ap_ufixed"
    own = "" if tensor.widths is None else f", {tensor.mean_width:.4g} bits a weight"
    return f"{kind}<{tensor.format.width},{tensor.format.integer}>{own}"


def _names(pair: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for side in pair for name in side))


def _of(pair: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [side.get(name, {}) for side in pair]


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in _names([a, b]) if a.get(key) != b.get(key)}


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
