"""Whether the Verilog on disk is still what its record and its traced program say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.statements import differences
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet


def verilog_differences(net: QNet, folder: Path, *, latency_cutoff: float | None) -> list[str]:
    """One line for each statement of the Verilog, and each entry of its record, that is not the traced program's.

    That the program is the network's, its recorded digest says; `prove` shows it.

    Args:
        net: the network.
        folder: its project.
        latency_cutoff: that it was made with; None: no registers.
    """
    shown = folder.name
    try:
        project = RtlProject.load(net, folder)
    except InvalidInput as error:
        return [f"{shown}/rtl.json: {error}"]
    with tempfile.TemporaryDirectory() as scratch:
        made = project.written_again(Path(scratch) / "rtl", latency_cutoff=latency_cutoff)
        lines = [
            f"{shown}/rtl.json: {name} is {has}, expected {wanted}"
            for (name, wanted), has in zip(_record(made).items(), _record(project).values(), strict=True)
            if wanted != has and has not in ("", None)  # of an earlier version
        ]
        for path in made.stream_sources:
            file = path.relative_to(made.folder)
            if file.parts[0] == "stream" and not (folder / "stream").exists():  # of an earlier version
                continue
            lines += differences(path, folder / file, f"{shown}/{file}", _no_tensor)
        return lines


def _record(project: RtlProject) -> dict[str, Any]:
    return {key: value for key, value in vars(project).items() if key not in ("net", "folder")}


def _no_tensor(_statement: str, _block: str) -> str:
    """A wire of the Verilog has no tensor's name."""
    return ""
