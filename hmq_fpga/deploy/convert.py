"""From a QNet to files: the QKeras model and the hls4ml project."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.qkeras.model import save, to_qkeras
from hmq_fpga.deploy.toolchain import GXX
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet


def convert(net: QNet, folder: Path, samples: np.ndarray[Any, Any] | None = None, **settings: Any) -> HlsProject:
    """Write `qkeras/model.keras` and the project `hls/` of a network.

    Args:
        net: the network.
        folder: holds the two; made if need be.
        samples: real inputs `(n, *input shape)` for the project's own test bench, with the golden outputs.
        settings: of `HlsProject.create`.
    """
    (folder / "qkeras").mkdir(parents=True)
    save(to_qkeras(net), folder / "qkeras" / "model.keras")
    project = HlsProject.create(net, folder / "hls", **settings)
    if samples is not None:
        project.write_tb_data(samples, reference.run(net, samples))
    return project


def convert_folder(source: Path, out: Path, **settings: Any) -> QNet:
    """Convert a saved QNet, or that of a run, into a new folder.

    Raises:
        InvalidInput: when `source` holds no QNet or `out` holds something already.
    """
    net = QNet.load(source / "qnet" if (source / "qnet").is_dir() else source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{out}: is not empty; give a new folder with --out")
    GXX.require()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as new:
        convert(net, Path(new) / "out", **settings)
        if out.exists():
            out.rmdir()
        (Path(new) / "out").rename(out)
    return net
