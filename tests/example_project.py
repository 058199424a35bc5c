"""The committed example: `python -m tests.example_project` writes its project again from its QNet."""

from pathlib import Path

import hmq_fpga as hmq

FOLDER = Path(__file__).parents[1] / "hls_projects" / "digits_example"
SAMPLES = 100  # of the test split, for the project's own test bench


def create(folder: Path) -> hmq.HlsProject:
    """The hls4ml project of the committed QNet, in a new `folder`."""
    net = hmq.QNet.load(FOLDER / "qnet")
    project = hmq.HlsProject.create(net, folder)
    x = hmq.load_data("digits").x_test[:SAMPLES]
    project.write_tb_data(x, hmq.run_reference(net, x))
    return project


if __name__ == "__main__":
    create(FOLDER / "hls")
