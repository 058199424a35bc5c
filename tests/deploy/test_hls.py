import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.hls import project as hls
from hmq_fpga.deploy.hls import settings
from hmq_fpga.deploy.hls.project import HlsProject, LayerSettings, expected_types
from hmq_fpga.deploy.parity import ParityError, check
from hmq_fpga.deploy.toolchain import ToolFailed, ToolMissing
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, Flatten, Input, MaxPool, Quantize
from tests.deploy.networks import Builder, scheme

PROJECTS = {
    "mlp-parallel": ("mlp", {}),
    "mlp-stream": (
        "mlp",
        {
            "io_type": "io_stream",
            "backend": "Vivado",
            "strategy": "Resource",
            "reuse_factor": 2,
            "layers": {"fc2": LayerSettings(reuse_factor=8), "fc4": LayerSettings(strategy="Latency", reuse_factor=3)},
        },
    ),
    "mlp-adders": ("mlp", {"strategy": "distributed_arithmetic"}),
    "cnn-parallel": ("cnn", {}),
    "cnn-stream": (
        "cnn",
        {"io_type": "io_stream", "layers": {"uneven": LayerSettings(strategy="distributed_arithmetic")}},
    ),
    "heads-parallel": ("heads", {}),
    "heads-stream": ("heads", {"io_type": "io_stream"}),
}


@pytest.fixture(scope="module", params=PROJECTS)
def made(request, tmp_path_factory):
    fixture, options = PROJECTS[request.param]
    net = request.getfixturevalue(fixture)
    return net, HlsProject.create(net, tmp_path_factory.mktemp("hls") / "project", **options)


def test_the_c_simulation_equals_the_reference(made, samples):
    net, project = made
    x = samples(net)
    expected = reference.run(net, x)
    assert len(np.unique(expected, axis=0)) > len(x) / 2, "the network should tell its inputs apart"
    parity = check(net, [HlsProject.load(project.folder)], x)
    assert parity.passed, parity.to_json()
    assert [c.values for c in parity.simulators.values()] == [expected.size]


def _typedefs(folder):
    """From `defines.h` and `parameters.h` alone: type names to types, and layer names to their `config` structs."""
    firmware = folder / "firmware"
    types = {
        name: re.sub(r"nnet::array<(ap_.*), .*>|(SAT),0", r"\1\2", kind).replace("SAT,0>", "SAT>")
        for kind, name in re.findall(r"typedef (.*) (\w+);", (firmware / "defines.h").read_text())
    }
    calls = re.findall(r"nnet::\w+<(.*), (\w+), (\w+)>\(.*\); // (\w+)", (firmware / "myproject.cpp").read_text())
    configs = dict(re.findall(r"struct (\w+) : (.*?\n)};", (firmware / "parameters.h").read_text(), re.DOTALL))
    return types, {layer: (result, configs.get(config, "")) for _, result, config, layer in calls}


def test_reuse_factor_and_strategy_are_the_layers_own(mlp, tmp_path, caplog):
    caplog.set_level("DEBUG")
    _, options = PROJECTS["mlp-stream"]
    project = HlsProject.create(mlp, tmp_path / "project", **options)
    _, layers = _typedefs(project.folder)
    reuse = {name: re.search(r"reuse_factor = (\d+);", layers[name][1])[1] for name in ("fc1", "fc2", "fc3", "fc4")}
    assert reuse == {"fc1": "2", "fc2": "8", "fc3": "1", "fc4": "3"}
    assert project.reuse_factors == {name: int(factor) for name, factor in reuse.items()}
    assert HlsProject.load(project.folder) == project
    assert 'Invalid ReuseFactor=2 in layer "fc3"' in caplog.text  # hls4ml takes the nearest that divides the work
    strategy = {name: re.search(r"strategy = nnet::(\w+);", layers[name][1])[1] for name in reuse}
    assert strategy == {"fc1": "resource", "fc2": "resource", "fc3": "resource", "fc4": "latency"}
    with pytest.raises(InvalidInput, match=r"layer 'relu1' has no reuse factor.*fc1, fc2, fc3, fc4"):
        HlsProject.create(mlp, tmp_path / "other", layers={"relu1": LayerSettings(reuse_factor=2)})
    with pytest.raises(InvalidInput, match=r"'fc3' cannot have the reuse factor 2: .* the nearest is 1"):
        HlsProject.create(mlp, tmp_path / "other", strategy="Resource", layers={"fc3": LayerSettings(reuse_factor=2)})
    with pytest.raises(InvalidInput, match="'Magic' is none of"):
        HlsProject.create(mlp, tmp_path / "other", layers={"fc1": LayerSettings(strategy="Magic")})
    assert not (tmp_path / "other").exists()


def test_the_types_in_the_files_are_the_learned_ones(made):
    net, project = made
    types, layers = _typedefs(project.folder)

    def plain(format_):
        return f"{'ap_fixed' if format_.signed else 'ap_ufixed'}<{format_.width},{format_.width - format_.frac}>"

    for op in net.ops:
        match op:
            case Input():
                assert types["input_t"] == str(op.format)
            case Quantize():
                assert types[layers[op.name][0]] == str(op.format)
            case MaxPool():
                assert types[layers[op.name][0]] == str(net.formats[op.source])
            case Dense() | Conv() if op.name not in layers:  # additions alone: no constants
                code = (project.folder / "firmware" / "myproject.cpp").read_text()
                assert types[re.search(rf", (\w+)>\(.*; // {op.name}\n", code)[1]] == plain(net.formats[op.name])
            case Dense() | Conv():
                result, config = layers[op.name]
                accumulator = plain(net.formats[op.name])
                assert types[result] == accumulator
                assert types[f"{op.name}_weight_t"] == plain(op.weight_format)
                assert types[f"{op.name}_bias_t"] == plain(net.bias_format(op))
                assert types[f"{op.name}_accum_t"] == accumulator
                for role in ("accum", "weight", "bias"):
                    assert f"typedef {op.name}_{role}_t {role}_t;" in config
            case Flatten():
                pass
    expected = expected_types(net)
    for op, roles in project.types().items():
        assert roles == {role: expected[op][role] for role in roles}


def test_the_same_network_makes_the_same_files(mlp, tmp_path):
    first, second = (HlsProject.create(mlp, tmp_path / name).folder for name in "ab")
    files = sorted(f.relative_to(first) for f in first.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(second) for f in second.rglob("*") if f.is_file())
    for file in files:
        text = (first / file).read_bytes()
        assert text == (second / file).read_bytes(), file
        assert str(tmp_path).encode() not in text, file


NAMES = st.text(st.sampled_from("ab -'\"$#:%&;`()[]{}*?!~<>|\\\täöüß日本語é"), min_size=1).filter(
    lambda name: len(name.encode()) <= 255
)
ODD = ("o ü", "\"$HOME\" 'x' `id` \\ ??/", "#:%日本 -D", "é" * 127)


def _everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
@example(name="x" * 255)
@example(name="日" * 85)
def test_no_file_depends_on_how_the_path_is_spelled(name, mlp, intact, tmp_path):
    project = HlsProject.create(mlp, tmp_path / name / name)
    assert _everything(project.folder) == _everything(intact)
    assert HlsProject.load(project.folder) == project


@pytest.mark.parametrize("name", ODD)
def test_a_project_compiles_wherever_it_is(name, mlp, samples, intact, tmp_path):
    project = HlsProject.load(Path(shutil.copytree(intact, tmp_path / name / "hls")))
    assert check(mlp, [project], samples(mlp)).passed
    assert project.trace(samples(mlp, 2)).keys() == {op.name for op in mlp.ops}


def test_names_that_no_folder_can_have_are_refused(mlp, tmp_path):
    for name, fault in (("a\nb", "line breaks"), ("a\rb", "line breaks"), ("ü" * 128, "256 bytes")):
        with pytest.raises(InvalidInput, match=fault):
            HlsProject.create(mlp, tmp_path / name)
    assert not list(tmp_path.iterdir())


ALONE = """
import sys
from pathlib import Path
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.ir.network import QNet
HlsProject.create(QNet.load(Path("qnet")), Path("hls"))
print(sorted({"keras", "qkeras", "tensorflow", "torch"} & sys.modules.keys()))
"""


def test_conversion_imports_neither_keras_nor_tensorflow(mlp, tmp_path):
    """Not even by hls4ml, where they are installed."""
    mlp.save(tmp_path / "qnet")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_an_existing_project_is_replaced_as_a_whole(mlp, tmp_path):
    folder = tmp_path / "hls"
    HlsProject.create(mlp, folder, project_name="older")
    HlsProject.create(mlp, folder, project_name="newer")
    assert (folder / "firmware" / "newer.cpp").exists()
    assert not (folder / "firmware" / "older.cpp").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_test_bench_data_keep_every_digit(mlp, samples, tmp_path):
    project = HlsProject.create(mlp, tmp_path / "hls")
    x = samples(mlp)
    project.write_tb_data(x, reference.run(mlp, x))
    written = np.loadtxt(project.folder / "tb_data" / "tb_input_features.dat")
    assert_array_equal(written.astype(np.float32), x)
    predictions = np.loadtxt(project.folder / "tb_data" / "tb_output_predictions.dat")
    assert_array_equal(predictions, mlp.decode(reference.run(mlp, x)))


def _rewrite(path, pattern, replacement):
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == 1, (path, pattern, count)
    path.write_text(text)


class FromTrace:
    """A project whose output is taken from its trace: one compilation for both."""

    def __init__(self, project):
        self.name, self.trace, self.output = project.name, project.trace, project.tensors[-1].op

    def predict(self, x):
        return self.trace(x)[self.output]


FAULTS = {"truncation": ("relu1", "AP_RND_CONV", "AP_TRN"), "wrong type": ("identity2", "<5,1,", "<5,2,")}


@pytest.fixture(scope="module")
def intact(mlp, tmp_path_factory):
    return HlsProject.create(mlp, tmp_path_factory.mktemp("faults") / "intact").folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_type_is_caught_and_named(fault, mlp, samples, intact, tmp_path):
    op, right, wrong = FAULTS[fault]
    project = HlsProject.load(Path(shutil.copytree(intact, tmp_path / "hls")))
    (typedef,) = (t.typedefs["result"] for t in project.tensors if t.op == op)
    _rewrite(project.folder / "firmware" / "defines.h", rf"{right}(.* {typedef};)", rf"{wrong}\1")
    parity = check(mlp, [FromTrace(project)], samples(mlp))
    assert not parity.passed
    assert parity.simulators["csim"].first_difference.tensor == op


def test_a_changed_weight_is_caught_and_named(mlp, samples, intact, tmp_path):
    folder = tmp_path / "hls"
    shutil.copytree(intact, folder)
    text = folder / "firmware" / "weights" / "w2.txt"  # of fc1
    first, rest = text.read_text().split(",", 1)
    other = f"{-float(first) or 0.0625}"
    text.write_text(f"{other},{rest}")
    with pytest.raises(ParityError, match=r"w2.txt differs from w2.h"):
        HlsProject.load(folder).compile()
    _rewrite(text.with_suffix(".h"), rf"{{{re.escape(first)},", f"{{{other},")
    parity = check(mlp, [HlsProject.load(folder)], samples(mlp))
    assert not parity.passed
    assert parity.simulators["csim"].first_difference.tensor == "fc1"


@pytest.mark.parametrize(
    ("layer", "precision", "message"),
    [
        ("fc1", {"result": "auto"}, "dropped layer 'relu1'|made the result of layer 'fc1'"),
        ("fc2", {"result": "auto"}, "dropped layer 'identity2'"),
        ("input", {"result": "fixed<16,6>"}, "made the result of layer 'input' ap_fixed<16,6> instead of"),
        ("identity2", {"result": "fixed<5,1>"}, "made the result of layer 'identity2' ap_fixed<5,1> instead of"),
        ("fc3", {"weight": "fixed<2,0>"}, "made the weight of layer 'fc3' ap_fixed<2,0> instead of"),
    ],
)
def test_what_hls4ml_makes_of_another_configuration_is_noticed(layer, precision, message, mlp, tmp_path, monkeypatch):
    configuration = hls.precisions(mlp)
    configuration[layer] |= precision
    monkeypatch.setattr(hls, "precisions", lambda net: configuration)
    with pytest.raises(ToolFailed, match=f"hls4ml ({message})"):
        HlsProject.create(mlp, tmp_path / "hls")
    assert not list(tmp_path.iterdir())


def test_a_layer_of_zeros_is_exact(samples, tmp_path):
    """Its accumulator is one bit, far below the step of the next quantizer."""
    net = (
        Builder((4,), scheme(signed=False, bits=4, m=0))
        .dense("zeros", 3, scheme(signed=True, bits=2, m=-6), bias=0)
        .quantize("relu", scheme(signed=False, bits=2, m=4))
        .dense("out", 2, scheme(signed=True, bits=3, m=0))
    )
    net.ops[1].weight[:] = 0
    project = HlsProject.create(net.net, tmp_path / "hls")
    assert check(net.net, [project], samples(net.net)).passed


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
def test_a_tensor_that_is_a_copy_is_its_sources_variable(io_type, samples, tmp_path):
    """An identity scale, on its source's grid or a finer one, and a quantizer to the format that is there."""
    net = (
        Builder((3, 2), scheme(signed=True, bits=4, m=1), seed=2)
        .identity("coarse", 2, 0)
        .quantize("same", scheme(signed=True, bits=4, m=1))
        .conv("conv", (2,), 3, scheme(signed=True, bits=3, m=0), stride=(1,), padding=((1, 0),))
        .identity("fine", 3, 2)
        .quantize("relu", scheme(signed=False, bits=4, m=1))
        .flatten()
        .dense("fc", 3, scheme(signed=True, bits=3, m=0))
        .identity("last", 3, 1)
        .net
    )
    project = HlsProject.create(net, tmp_path / "hls", io_type=io_type)
    variables = {t.op: t.variable for t in project.tensors}
    assert variables["coarse"] == variables["same"] == variables["input"]
    assert variables["fine"] == variables["conv"]
    assert variables["last"] == variables["fc"]
    assert project.reuse_factors.keys() == {"conv", "fc"}
    x = samples(net)
    assert check(net, [project], x).passed
    expected = reference.trace(net, x)
    for op, codes in project.trace(x).items():
        assert_array_equal(codes, expected[op], op)


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
def test_a_flattened_output_is_exact_and_every_output_has_its_port(io_type, samples, tmp_path):
    image = Builder((3, 2), scheme(signed=True, bits=4, m=1)).conv(
        "conv", (2,), 3, scheme(signed=True, bits=3, m=0), stride=(1,), padding=((0, 0),)
    )
    image.quantize("relu", scheme(signed=False, bits=4, m=1)).flatten().dense("fc", 2, scheme(signed=True, bits=3, m=0))
    image.flatten("flat2", source="relu").identity("flat3", 6, 0)
    image.quantize("again", scheme(signed=False, bits=4, m=1), source="relu")
    image.quantize("same", scheme(signed=True, bits=4, m=1), source="input")
    net = QNet(tuple(image.ops), ("fc", "flat3", "again", "same"))
    project = HlsProject.create(net, tmp_path / "hls", io_type=io_type)
    assert check(net, [project], samples(net)).passed


def test_names_that_hls4ml_would_mix_up_are_told_apart(samples, tmp_path):
    names = ("fc", "FC", "input_values", "clone_fc", "Fc_padding", "zp1d_wide")
    net = Builder((2, 4), scheme(signed=True, bits=4, m=0), seed=4)
    for i, name in enumerate(names):  # of widths and thresholds of their own
        net.conv(name, (1,), 4, scheme(signed=True, bits=2 + i % 3, m=i - 2), stride=(1,), padding=((0, 1),))
        net.quantize(f"{name}_q", scheme(signed=i % 2 == 0, bits=3 + i % 2, m=i - 1))
    net.conv("out", (1,), 3, scheme(signed=True, bits=3, m=0), stride=(1,), padding=((0, 0),))
    project = HlsProject.create(net.net, tmp_path / "hls", io_type="io_stream")
    assert check(net.net, [project], samples(net.net)).passed


def test_unknown_options_are_refused(mlp, tmp_path):
    with pytest.raises(InvalidInput, match="'vitis' is none of Vitis, Vivado, VivadoAccelerator"):
        HlsProject.create(mlp, tmp_path / "hls", backend="vitis")


def test_without_a_compiler_nothing_is_written(mlp, tmp_path, monkeypatch):
    monkeypatch.setenv("HMQ_FPGA_GXX", "no-such-compiler")
    with pytest.raises(ToolMissing, match=r"g\+\+ not found, needed to compile the C simulation"):
        HlsProject.create(mlp, tmp_path / "new" / "hls")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_project_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="not an hls4ml project"):
        HlsProject.load(tmp_path)


def test_what_does_not_compile_is_an_error_with_the_compilers_words(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "hls")
    (tmp_path / "hls" / "firmware" / "defines.h").write_text("#error broken on purpose\n")
    with pytest.raises(ToolFailed, match="broken on purpose"):
        HlsProject.load(tmp_path / "hls").compile()


def test_inputs_that_no_hardware_takes_are_refused(intact):
    project = HlsProject.load(intact)
    for x in (np.zeros((1, 5), np.float32), np.full((1, 6), np.nan, np.float32)):
        with pytest.raises(InvalidInput, match="finite values of shape"):
            project.predict(x)


def test_a_strategy_is_refused_where_it_cannot_be(mlp, tmp_path, monkeypatch):
    strategy = {"strategy": "distributed_arithmetic"}
    with pytest.raises(InvalidInput, match="'fc1': distributed_arithmetic has no multipliers to reuse"):
        HlsProject.create(mlp, tmp_path / "hls", reuse_factor=2, **strategy)
    depthwise = Builder((4, 4, 2), scheme(signed=False, bits=3, m=0)).depthwise(
        "dw", (2, 2), scheme(signed=True, bits=3, m=0)
    )
    with pytest.raises(InvalidInput, match="'dw': hls4ml has no distributed_arithmetic"):
        HlsProject.create(depthwise.net, tmp_path / "hls", **strategy)
    with pytest.raises(InvalidInput, match="'dw': hls4ml's io_parallel has no Resource strategy of depthwise"):
        HlsProject.create(depthwise.net, tmp_path / "hls", strategy="Resource")
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"needs da4ml.*pip install 'hmq-fpga\[da\]'"):
        HlsProject.create(mlp, tmp_path / "hls", **strategy)
    assert not list(tmp_path.iterdir())


WIDE = """
from pathlib import Path
import numpy as np
from torch import nn
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.ir import reference
from hmq_fpga.search.freeze import outline
from hmq_fpga.search.reading import instrument
net = outline(instrument(nn.Sequential(nn.Linear(2048, 1500)), (2048,)))
x = np.random.default_rng(0).normal(size=(2, 2048)).astype(np.float32)
np.testing.assert_array_equal(HlsProject.create(net, Path("hls")).predict(x), reference.run(net, x))
"""


def test_a_layer_of_three_million_products_does_not_break_the_stack(tmp_path):
    """In a process of its own, whose main thread has the stack that the system gives."""
    done = subprocess.run([sys.executable, "-c", WIDE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
