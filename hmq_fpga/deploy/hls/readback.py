"""Whether a project on disk is still that of a network, read back without compiling it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.deploy.statements import differences
from hmq_fpga.ir.network import QNet

_OTHERS = ("tb_data",)  # samples are no part of a network


def project_differences(net: QNet, folder: Path, hardware: Hardware, *, firmware_alone: bool = False) -> list[str]:
    """One line for each type, constant, layer, parameter and connection that is not the network's.

    The project is compared with one made anew from the network, file by file; layout and pragmas may differ.

    Args:
        net: the network.
        folder: its project.
        hardware: the settings that it was made with.
        firmware_alone: leave out what vendors' tools are told, as another part or clock.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = HlsProject.of(net, Path(scratch) / "hls", hardware, HlsProject.load(folder).top)
        names = _names(made)

        def named(statement: str, block: str) -> str:
            words = re.findall(r"\w+", f"{block} {statement}")
            known = sorted((word for word in words if word in names), key=lambda word: "config" not in word)
            return names[known[0]] if known else ""

        lines: list[str] = []
        for path in sorted(made.folder.rglob("*")):
            file = path.relative_to(made.folder)
            wanted = file.parts[0] == "firmware" if firmware_alone else file.parts[0] not in _OTHERS
            if path.is_file() and wanted:
                lines += differences(path, folder / file, f"{folder.name}/{file}", named)
        return lines


def _names(project: HlsProject) -> dict[str, str]:
    """Tensors by the names that stand for them in the code: of types, variables, configurations and weights."""
    names: dict[str, str] = {}
    variables: dict[str, str] = {}
    for tensor in project.tensors:
        variables.setdefault(tensor.variable, tensor.op)
        for name in tensor.typedefs.values():
            names.setdefault(name, tensor.op)
    code = (project.folder / "firmware" / f"{project.top}.cpp").read_text()
    for call in re.findall(r"^\s*nnet::\w+<.*\);", code, re.MULTILINE):
        words = re.findall(r"\w+", call)
        made = [variables[word] for word in words if word in variables]
        for word in words:
            if made and re.fullmatch(r"\w*config\d+|[wbs]\d+", word):
                names[word] = made[-1]
    return names | variables
