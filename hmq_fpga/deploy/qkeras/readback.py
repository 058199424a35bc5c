"""Whether a QKeras model on disk is still that of a network: its layers, their settings, connections and weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from hmq_fpga.deploy.differences import settings, values
from hmq_fpga.deploy.qkeras.model import MODEL, export, load
from hmq_fpga.ir.network import QNet

ASIDE = ("shared_object_id", "build_config")  # an address in the writer's memory, and what follows from the rest


def model_differences(net: QNet, folder: Path) -> list[str]:
    """One line for each setting, connection and weight of the model in `folder` that is not the network's.

    Raises:
        ToolMissing: where QKeras is not installed.
        InvalidInput: where there is no readable model.
    """
    shown = f"{folder.name}/{MODEL}"
    model = load(folder / MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        export(net, Path(scratch))
        expected, actual = (_layers(path / MODEL) for path in (Path(scratch), folder))
        lines = [f"{shown}: {line}" for line in settings(expected, actual, aside=ASIDE)]
        if lines:
            return lines
        for made, found in zip(load(Path(scratch) / MODEL).layers, model.layers, strict=True):
            for wanted, has in zip(made.get_weights(), found.get_weights(), strict=True):
                lines += values(f"{shown}: {made.name}", wanted, has)
    return lines


def _layers(path: Path) -> dict[str, Any]:
    """A model's configuration, its layers by name; that of the model itself says nothing."""
    with ZipFile(path) as archive:
        config: dict[str, Any] = json.loads(archive.read("config.json"))["config"]
    del config["name"]
    return {**config, "layers": {layer["name"]: layer for layer in config["layers"]}}
