"""What changed between two runs: settings, accuracy, formats, resources, layer by layer. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hmq_fpga.ir import cost
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import Scheme, Tensor
from hmq_fpga.study.stages import read_record

FIGURES = (
    "float_accuracy",
    "qnet_accuracy",
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
_RESOURCES = ("lut", "ff", "dsp", "bram", "carry", "latency_cycles", "ii")


def diff(a: Path, b: Path) -> dict[str, Any]:
    """What differs between the finished runs in the folders `a` and `b`, always as `[of a, of b]`.

    Returns:
        `settings`: those that differ; `figures`: accuracies, rates and costs, all of them; `formats`: tensors whose
        format differs, as HLS types with `None` where a tensor is missing; `layers`: per linear layer, costs that
        differ; `resources`: per stage, figures that differ; `same_network`: whether the integers are the same.

    Raises:
        InvalidInput: when one is not the folder of a run that has come as far as parity.
    """
    records = [_finished(folder) for folder in (a, b)]
    schemes = [Scheme.load(folder / "scheme.json") for folder in (a, b)]
    layers = [_layers(folder) for folder in (a, b)]
    resources = [_resources(folder) for folder in (a, b)]
    metrics = [record["metrics"] for record in records]
    return {
        "runs": [str(a), str(b)],
        "same_network": metrics[0]["qnet_digest"] == metrics[1]["qnet_digest"],
        "settings": _changed(*(record["config"] for record in records)),
        "figures": {key: [m.get(key) for m in metrics] for key in FIGURES},
        "formats": _changed(*({t.name: _type(t) for t in scheme.tensors} for scheme in schemes)),
        "layers": {name: change for name in _names(layers) if (change := _changed(*_of(layers, name)))},
        "resources": {name: change for name in _names(resources) if (change := _changed(*_of(resources, name)))},
    }


def _finished(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record["stages"].get("parity", {}).get("state") != "done":
        raise InvalidInput(f"{folder}: this run was not finished; run it again first")
    return record


def _layers(folder: Path) -> dict[str, dict[str, Any]]:
    costs = [asdict(layer) for layer in cost.layer_costs(QNet.load(folder / "qnet"))]
    return {layer.pop("name"): layer for layer in costs}


def _resources(folder: Path) -> dict[str, dict[str, Any]]:
    entries = json.loads((folder / "resources.json").read_text())
    return {f"{entry['stage']} ({entry['tool']})": {key: entry.get(key) for key in _RESOURCES} for entry in entries}


def _type(tensor: Tensor) -> str:
    """The HLS type, whose bits and integer bits say width and threshold."""
    kind = "ap_fixed" if tensor.format.signed else "ap_ufixed"
    return f"{kind}<{tensor.format.width},{tensor.format.integer}>"


def _names(pair: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for side in pair for name in side))


def _of(pair: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [side.get(name, {}) for side in pair]


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in _names([a, b]) if a.get(key) != b.get(key)}
