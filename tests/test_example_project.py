import pytest

import hmq_fpga as hmq
from tests.example_project import FOLDER, SAMPLES, create

COPIES = ("firmware/ap_types", "firmware/nnet_utils")  # of hls4ml's own headers, which are not committed


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return create(tmp_path_factory.mktemp("example") / "hls")


def _files(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".so"}
    return sorted(name for name in names if not name.startswith(COPIES))


def test_the_committed_project_is_what_its_network_makes(project):
    """Byte for byte in every file: no line is volatile."""
    names = _files(project.folder)
    assert names == _files(FOLDER / "hls")
    assert len(names) > 20
    for name in names:
        assert (project.folder / name).read_bytes() == (FOLDER / "hls" / name).read_bytes(), (
            f"{name}: if the change is wanted, run python -m tests.example_project and commit"
        )
    assert sum((FOLDER / "hls" / name).stat().st_size for name in names) < 300_000


def test_it_computes_what_its_network_does(project):
    net = hmq.QNet.load(FOLDER / "qnet")
    data = hmq.load_data("digits")
    parity = hmq.check(net, [project], data.x_test, data.y_test)
    parity.raise_for_mismatch()
    assert f"{100 * parity.simulators['csim'].accuracy:.2f} %" in (FOLDER.parent / "README.md").read_text()
    assert len((project.folder / "tb_data" / "tb_input_features.dat").read_text().splitlines()) == SAMPLES
