"""All modules of ir and deploy but those of QKeras are imported, and a network is run: `python -m tests.short_run`.

It needs neither torch nor QKeras, and shows that the package works under a Python without an environment for all tests.
"""

import importlib
import pkgutil
import platform
import tempfile
from pathlib import Path

import numpy as np

import hmq_fpga as hmq
from hmq_fpga import deploy, ir

NETWORK = Path(__file__).parents[1] / "hls_projects" / "digits_example" / "qnet"

if __name__ == "__main__":
    for package in (ir, deploy):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.startswith("hmq_fpga.deploy.qkeras."):
                importlib.import_module(module.name)
    net = hmq.QNet.load(NETWORK)
    x = np.random.default_rng(0).uniform(-0.5, 1.5, (200, 64))  # beyond the range of the input
    with tempfile.TemporaryDirectory() as folder:
        project = hmq.HlsProject.create(net, Path(folder) / "hls")
        project.compile()
        traced = hmq.RtlProject.create(net, Path(folder) / "rtl").interpreter()
        parity = hmq.check(net, [project, traced], x)
    parity.raise_for_mismatch()
    values = ", ".join(f"{name} {result.values} values" for name, result in parity.simulators.items())
    print(f"Python {platform.python_version()}, numpy {np.__version__}: equal to the reference: {values}")  # noqa: T201
