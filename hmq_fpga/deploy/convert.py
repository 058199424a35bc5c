"""From a QNet to files: what every installed back end makes of it."""

from __future__ import annotations

from pathlib import Path

from hmq_fpga.deploy.backends import split_by_installed
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.deploy.toolchain import GXX
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.files import check_path, replacing
from hmq_fpga.ir.network import QNet


def convert_folder(source: Path, out: Path, hardware: Hardware) -> tuple[QNet, dict[str, str]]:
    """Convert a saved QNet, or that of a run, into a new folder; or a QKeras model, whose QNet is written there too.

    Returns:
        the network, and by the name of each back end that was left out the line that says why.

    Raises:
        InvalidInput: when `source` holds no QNet, `out` holds something already, or a back end cannot have the network.
    """
    check_path(out)
    is_model = source.suffix == ".keras" and source.is_file()
    net = _of_qkeras(source) if is_model else QNet.load(source / "qnet" if (source / "qnet").is_dir() else source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{out}: is not empty; give a new folder with --out")
    GXX.require()
    installed, left_out = split_by_installed()
    for backend in installed:
        backend.check(net, hardware)
    with replacing(out) as new:
        if is_model:
            net.save(new / "qnet")
        for backend in installed:
            made = backend.create(net, new, hardware, None)
            if made.left_out:
                left_out[backend.name] = made.left_out
    return net, left_out


def _of_qkeras(path: Path) -> QNet:
    from hmq_fpga.deploy.qkeras.model import load
    from hmq_fpga.deploy.qkeras.reader import from_qkeras

    return from_qkeras(load(path))
