"""A fault on disk is one line with file, tensor and both values, and nothing is simulated for it."""

import re
import shutil

import pytest

from hmq_fpga.deploy.backends import HLS, RTL, require_unchanged
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.parity import ParityError
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.settings import Hardware
from tests.outside import needs_qkeras


@pytest.fixture(scope="module")
def written(cnn, mlp, tmp_path_factory):
    """A folder with the project and the Verilog of each."""
    folder = tmp_path_factory.mktemp("written")
    HlsProject.create(cnn, folder / "hls")
    RtlProject.create(mlp, folder / "rtl")
    return folder


@pytest.fixture
def edited(written):
    """Change the first match of a pattern in a file; undone afterwards."""
    before = {}

    def edit(file, pattern, replacement):
        path = written / file
        before.setdefault(path, path.read_text())
        text, count = re.subn(pattern, replacement, path.read_text(), count=1)
        assert count, pattern
        path.write_text(text)

    yield edit
    for path, text in before.items():
        path.write_text(text)


DEFINES, PARAMETERS, CODE = (f"hls/firmware/{name}" for name in ("defines.h", "parameters.h", "myproject.cpp"))


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "line"),
    [
        (DEFINES, r"AP_SAT,0> layer3_t", "AP_WRAP,0> layer3_t", r"relu1: ap_ufixed<.*AP_WRAP,0>, expected .*AP_SAT,0>"),
        (
            DEFINES,
            r"<\d+,(-?\d+)> uneven_accum_t",
            r"<5,\1> uneven_accum_t",
            r"uneven: ap_fixed<5,.*, expected ap_f",
        ),
        (
            PARAMETERS,
            "stride_height = 2",
            "stride_height = 1",
            r"(pool|strided): 1, expected 2",
        ),
        (PARAMETERS, "pad_top = 1", "pad_top = 0", r"same: 0, expected 1"),
        (CODE, r"w2, b2", "w2, b4", r"same: b4, expected b2"),
        (CODE, r"nnet::relu<", "nnet::linear<", r"relu1: .*linear"),
        ("hls/firmware/weights/w2.h", r"= \{[-\d.]+", "= {9.5", r"same: 9.5, expected"),
        ("hls/project.tcl", r"clock_period \d+", "clock_period 7", r"7"),
    ],
)
def test_a_fault_of_a_project_is_named(file, pattern, replacement, line, written, edited, cnn):
    edited(file, pattern, replacement)
    found = HLS.differences(cnn, written, Hardware())
    assert len(found) == 1
    assert re.match(rf"{re.escape(file)}: {line}", found[0]), found
    with pytest.raises(ParityError, match=re.escape(file)):
        require_unchanged(cnn, written, Hardware(), [HLS])


def test_layout_and_pragmas_may_differ(written, edited, cnn):
    edited(CODE, r"#pragma HLS ARRAY_PARTITION.*", "// and a remark\n\n")
    edited(PARAMETERS, r"static const unsigned n_in = ", "static  const unsigned\n n_in =   ")
    assert HLS.differences(cnn, written, Hardware()) == []


def test_another_networks_project_is_found(written, mlp):
    assert any("missing" in line or "expected" in line for line in HLS.differences(mlp, written, Hardware()))


def test_a_constant_of_the_verilog_is_found(written, edited, mlp):
    assert RTL.differences(mlp, written, Hardware()) == []
    file = next(p for p in sorted((written / "rtl" / "src").glob("logic*.v")) if "shift_adder" in p.read_text())
    edited(file.relative_to(written), r"shift_adder #\((\d+),(\d+)", r"shift_adder #(\1,9\2")
    (line,) = RTL.differences(mlp, written, Hardware())
    assert line.startswith(f"rtl/src/{file.name}: 9") and ", expected " in line


def test_a_change_of_the_stream_core_is_found_and_a_project_without_one_is_of_an_earlier_version(
    written, edited, mlp, tmp_path
):
    edited("rtl/stream/network_stream.v", r"unclaimed != 0", "unclaimed != 1")
    (line,) = RTL.differences(mlp, written, Hardware())
    assert line.startswith("rtl/stream/network_stream.v: ") and "expected 0 in 'assign s_axis_tready" in line
    shutil.copytree(written / "rtl", tmp_path / "rtl")
    shutil.rmtree(tmp_path / "rtl" / "stream")
    assert RTL.differences(mlp, tmp_path, Hardware()) == []


@needs_qkeras
def test_faults_of_a_saved_model_are_named(cnn, tmp_path):
    from hmq_fpga.deploy.qkeras import model as qkeras
    from hmq_fpga.deploy.qkeras.readback import model_differences

    qkeras.export(cnn, tmp_path / "qkeras")
    assert model_differences(cnn, tmp_path / "qkeras") == []
    model = qkeras.load(tmp_path / "qkeras" / qkeras.MODEL)
    weight, bias = model.get_layer("strided").get_weights()
    weight[0, 1, 0, 0] += 0.125
    model.get_layer("strided").set_weights([weight, bias])
    qkeras.save(model, tmp_path / "qkeras" / qkeras.MODEL)
    (line,) = model_differences(cnn, tmp_path / "qkeras")
    assert re.fullmatch(r"qkeras/model.keras: strided: weight \[0, 1, 0, 0\] is \S+, expected \S+", line)
    model.get_layer("pool").pool_size = (2, 1)
    qkeras.save(model, tmp_path / "qkeras" / qkeras.MODEL)
    (line,) = model_differences(cnn, tmp_path / "qkeras")
    assert re.match(r"qkeras/model.keras: pool.config.pool_size\[1\] is 1, expected 2", line)
