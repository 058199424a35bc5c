"""Place and route by nextpnr: a small network on the smallest ECP5, for real."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hmq_fpga import cli
from hmq_fpga.deploy import backends
from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl import cutoff, nextpnr
from hmq_fpga.deploy.rtl.devices import DEVICES, find_device
from hmq_fpga.deploy.rtl.nextpnr import DoesNotFit, read_report
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.trace import load_program, stage_layers
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.deploy.toolchain import ToolFailed, ToolMissing
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.run.config import make_config
from tests.deploy.networks import Builder, scheme
from tests.deploy.networks import run_folder as made_run
from tests.outside import needs_nextpnr

ECP5, ICE40 = DEVICES["ecp5-25k"], DEVICES["ice40-up5k"]


def step(kind: str, delay: float, source: str, sink: str) -> dict:
    ends = {"from": {"cell": source, "port": "Q"}, "to": {"cell": sink, "port": "D"}}
    return {"type": kind, "delay": delay, **ends}


PATH = [
    step("clk-to-q", 0.5, "network_inst.stage3_inp_TRELLIS_FF_Q", "network_inst.stage3_inp_TRELLIS_FF_Q"),
    step("routing", 1.25, "network_inst.stage3_inp_TRELLIS_FF_Q", "network_inst._inst_logic3.op_7_LUT4_Z"),
    step("logic", 0.25, "network_inst._inst_logic3.op_7_LUT4_Z", "network_inst._inst_logic3.op_7_LUT4_Z"),
    step("routing", 2.0, "network_inst._inst_logic3.op_7_LUT4_Z", "network_inst.stage4_inp_TRELLIS_FF_Q"),
    step("setup", 0.125, "network_inst.stage4_inp_TRELLIS_FF_Q", "network_inst.stage4_inp_TRELLIS_FF_Q"),
]
REPORT = {
    "fmax": {"$glbnet$clk": {"achieved": 242.4, "constraint": 200}},
    "critical_paths": [
        {"from": "<async>", "to": "posedge $glbnet$clk", "path": [step("routing", 99.0, "pad", "clk")]},
        {"from": "posedge $glbnet$clk", "to": "posedge $glbnet$clk", "path": PATH},
    ],
    "utilization": {"TRELLIS_COMB": {"used": 700, "available": 24288}, "DCCA": {"used": 1, "available": 56}},
}


def test_a_report_is_read():
    report = read_report(json.dumps(REPORT))
    assert report.fmax_mhz == 242.4
    assert report.used == {"TRELLIS_COMB": 700, "DCCA": 1}
    assert report.critical_path == {
        "logic_ns": 0.875,
        "routing_ns": 3.25,
        "source": "network_inst.stage3_inp_TRELLIS_FF_Q",
        "sink": "network_inst.stage4_inp_TRELLIS_FF_Q",
        "file": "src/logic3.v",
    }


@pytest.mark.parametrize(
    ("register", "file"),
    [
        ("network_inst.stage12_inp_TRELLIS_FF_Q_8", "src/logic12.v"),
        ("network_inst.INTERNAL_logic5_inp_SB_DFF_Q_46_DFFLC", "src/logic5.v"),
        ("network_inst._inst_logic2.op_16.in1_TRELLIS_FF_Q", "src/logic2.v"),
        ("network_inst.model_inp_reg_TRELLIS_FF_Q", "src/logic0.v"),
        ("a_name_of_its_own", None),
    ],
)
def test_the_file_of_a_path_is_told_by_the_register_it_begins_at(register, file):
    path = [step("routing", 1.0, register, register)]
    only = {**REPORT, "critical_paths": [{**REPORT["critical_paths"][1], "path": path}]}
    assert read_report(json.dumps(only)).critical_path["file"] == file


def test_an_unknown_device_is_told_those_that_there_are():
    with pytest.raises(InvalidInput, match=r"device 'ecp5-99k': not known, give one of ecp5-25k, .*ice40-hx8k"):
        find_device("ecp5-99k")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> RtlProject:
    net = (
        Builder((4,), scheme(signed=True, bits=4, m=0), seed=1)
        .dense("fc1", 5, scheme(signed=True, bits=3, m=-2))
        .quantize("relu1", scheme(signed=False, bits=3, m=0))
        .dense("fc2", 3, scheme(signed=True, bits=3, m=0))
        .net
    )
    return RtlProject.create(net, tmp_path_factory.mktemp("route") / "rtl", latency_cutoff=2.0)


@pytest.fixture(scope="module")
def routed(project, tmp_path_factory):
    """The folder, the record and what was said, of the best of two placements."""
    folder, said = tmp_path_factory.mktemp("routed"), []
    record = project.route(folder, ECP5, tries=2, on_step=said.append)
    return folder, record, said


def test_each_stage_is_of_the_layers_that_it_works_on(project):
    """With a stage for each layer, of that layer; and no layer is before one that it reads."""
    program = load_program(project.folder)
    stages = stage_layers(project.net, program, project.latency_cutoff)
    assert len(stages) == len(list((project.folder / "src").glob("logic*.v")))
    assert set(stages[0]) <= {"fc1", "relu1"}
    assert stages[-1] == ["fc2"]
    assert [name for names in stages for name in names if name == "fc1"]
    (whole,) = stage_layers(project.net, program, 1e3)
    assert whole == ["fc1", "relu1", "fc2"]


@needs_nextpnr
def test_a_network_is_placed_routed_and_timed(project, routed):
    folder, record, said = routed
    assert (record.stage, record.tool, record.device) == ("route", "nextpnr", "ecp5-25k")
    assert record.part == "LFE5U-25F-6CABGA381"
    assert 50 < record.fmax_mhz < 400
    assert record.latency_ns == pytest.approx(1e3 * project.latency_cycles / record.fmax_mhz, rel=1e-3)
    assert record.achieved_clock_ns == pytest.approx(1e3 / record.fmax_mhz, rel=1e-3)
    cells = json.loads((folder / "cells.json").read_text())["design"]["num_cells_by_type"]
    assert record.lut >= cells["LUT4"] + 2 * cells["CCU2C"]
    assert (record.ff, record.carry) == (cells["TRELLIS_FF"], cells["CCU2C"])
    assert record.to_json()["percent"]["lut"] == pytest.approx(100 * record.lut / 24_288)
    path = record.critical_path
    assert path["logic_ns"] + path["routing_ns"] == pytest.approx(record.achieved_clock_ns, rel=0.01)
    assert (project.folder / path["file"]).exists()
    stage = int(re.search(r"\d+", path["file"])[0])
    layers = stage_layers(project.net, load_program(project.folder), project.latency_cutoff)
    assert path["layers"] == layers[stage] != []
    assert ", ".join(path["layers"]) in record.notes
    assert said[0] == "synthesizing for ecp5"
    assert {"placing, placement 1 of 2", "routing, placement 2 of 2"} <= set(said)
    assert len(said) == len(set(said))


@needs_nextpnr
def test_the_best_of_several_placements_is_kept(routed):
    folder, record, _ = routed
    found = [read_report((folder / f"report-{seed}.json").read_text()).fmax_mhz for seed in (1, 2)]
    assert found[0] != found[1]
    assert record.fmax_mhz == pytest.approx(max(found), abs=0.01)
    assert f"the best of 2 placements ({min(found):.1f} … {max(found):.1f} MHz)" in record.notes
    assert sorted(path.name for path in folder.glob("routed*")) == ["routed.json"]


@needs_nextpnr
def test_the_routed_netlist_has_the_ports_of_the_verilog(project, routed):
    """Every bit of the input reaches, and every bit of the output leaves, the same flip-flops as before placement."""
    before, after = (json.loads((routed[0] / name).read_text())["modules"] for name in ("netlist.json", "routed.json"))
    assert set(after) == {"network_wrapper"}
    for name, elements in (("model_inp", project.input_port), ("model_out", project.output_port)):
        ports = [modules["network_wrapper"]["ports"][name] for modules in (before, after)]
        assert ports[0]["direction"] == ports[1]["direction"]
        assert len(ports[0]["bits"]) == len(ports[1]["bits"]) == elements.elements * elements.width
        ends = [
            [
                flip_flops(modules["network_wrapper"], bit, {"model_inp": ("DI", "M"), "model_out": ("Q",)}[name])
                for bit in port["bits"]
            ]
            for modules, port in zip((before, after), ports, strict=True)
        ]
        assert ends[0] == ends[1]
        assert any(ends[0])


def flip_flops(module: dict, bit: object, ports: tuple[str, ...]) -> set[str]:
    return {
        name
        for name, cell in module["cells"].items()
        if cell["type"] == "TRELLIS_FF" and any(cell["connections"].get(port) == [bit] for port in ports)
    }


@needs_nextpnr
@pytest.mark.parametrize("name", ["ice40-up5k", "nexus-40", "gowin-gw2a18"])
def test_another_family(project, tmp_path, name):
    device = DEVICES[name]
    record = project.route(tmp_path, device, clock_ns=20)
    assert (record.part, record.clock_ns) == (device.part, 20)
    assert 5 < record.fmax_mhz < 500
    assert bool(record.carry) == (device.family.name != "nexus")
    assert 0 < record.to_json()["percent"]["lut"] < 10
    assert (project.folder / record.critical_path["file"]).exists()
    ports = json.loads((tmp_path / "routed.json").read_text())["modules"]["network_wrapper"]["ports"]
    assert {"clk", *ports} == {"clk", "model_inp", "model_out"}


@needs_nextpnr
def test_what_does_not_fit_is_told_with_the_numbers(project, routed, tmp_path):
    folder = routed[0]
    with pytest.raises(DoesNotFit, match=r"does not fit ecp5-25k, .*9 LUT .* by the tracer's figure, before synthesis"):
        project.route(tmp_path / "a", replace(ECP5, luts=9))
    assert not (tmp_path / "a").exists()
    cells = json.loads((folder / "cells.json").read_text())["design"]["num_cells_by_type"]
    counted = rf"{cells['LUT4'] + 2 * cells['CCU2C']} LUT and {cells['TRELLIS_FF']} FF by Yosys, before placement"
    with pytest.raises(DoesNotFit, match=rf"ecp5-25k, .*: {counted}; give a larger device \(.*ecp5-85k"):
        project.route(tmp_path / "b", replace(ECP5, luts=project.lut))


def test_what_cannot_be_routed_is_refused(project, tmp_path):
    with pytest.raises(InvalidInput, match="no registers, hence no clock"):
        project.written_again(tmp_path / "rtl", latency_cutoff=None).route(tmp_path / "out", ECP5)
    with pytest.raises(InvalidInput, match="tries 0: give at least 1"):
        project.route(tmp_path / "out", ECP5, tries=0)


def test_a_missing_program_is_named_with_its_remedy(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HMQ_FPGA_NEXTPNR_ECP5", str(tmp_path / "nowhere"))
    with pytest.raises(ToolMissing, match=r"nextpnr-ecp5 not found, needed to place .*hmq-fpga\[route\]"):
        project.route(tmp_path / "out", ECP5)


@needs_nextpnr
def test_limits(routed, tmp_path):
    shutil.copy(routed[0] / "core.json", tmp_path)
    place = (tmp_path, ECP5, 1, 5.0)
    with pytest.raises(ToolFailed, match=r"time limit of 0\.2 s; its log is .*nextpnr-1\.log"):
        nextpnr._placed(*place, 0.2, 8, lambda _: None)
    with pytest.raises(ToolFailed, match=r"nextpnr-ecp5 failed .*memory limit 0\.1 GB\); its log is .*nextpnr-1\.log"):
        nextpnr._placed(*place, 60, 0.1, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core.json", "nextpnr-1.log"]


@needs_nextpnr
def test_an_interrupt_leaves_no_process_and_no_half_a_result(project, tmp_path):
    def interrupt(said: str) -> None:
        if said == "packing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        project.route(tmp_path, ECP5, on_step=interrupt)
    assert not [process for process in Path("/proc").glob("[0-9]*") if works_in(process, tmp_path)]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "routed", "report"))]


def works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder
    except OSError:
        return False


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a Python program that runs in the place of nextpnr."""

    def make(code: str) -> None:
        program = tmp_path / "mine"
        program.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("HMQ_FPGA_NEXTPNR_ECP5", str(program))

    return make


def test_a_program_of_ones_own_takes_the_place_of_the_package(stand_in, tmp_path):
    stand_in(
        "if '--version' in sys.argv: sys.exit(print('nextpnr-ecp5 -- (Version 0.7-1-gabc)'))\n"
        f"open(sys.argv[sys.argv.index('--report') + 1], 'w').write({json.dumps(REPORT)!r})"
    )
    assert nextpnr._placed(tmp_path, ECP5, 1, 5.0, 60, 8, lambda _: None).fmax_mhz == 242.4
    assert nextpnr.tool(ECP5.family).version() == "0.7-1-gabc"


def test_what_nextpnr_finds_too_large_is_told_with_its_numbers(stand_in, tmp_path):
    log = """Info: Device utilisation:
Info:            TRELLIS_COMB:   24291/  24288   100%
Info:              TRELLIS_FF:     934/  24288     3%
ERROR: Unable to place cell 'network_inst.x', no BELs remaining to implement cell type 'TRELLIS_COMB'
"""
    stand_in(f"sys.exit(print({log!r}) or 1)")
    with pytest.raises(
        DoesNotFit, match=r"does not fit ecp5-25k, .*: 24,291 TRELLIS_COMB of 24,288; give a larger dev"
    ):
        nextpnr._placed(tmp_path, ECP5, 1, 5.0, 60, 8, lambda _: None)
    stand_in("sys.exit(print('ERROR: it is Friday') or 1)")
    with pytest.raises(ToolFailed, match=r"nextpnr-ecp5 failed with exit code 1 .*; its log is .*nextpnr-1\.log"):
        nextpnr._placed(tmp_path, ECP5, 1, 5.0, 60, 8, lambda _: None)


@pytest.fixture
def run_folder(project, tmp_path) -> Path:
    """What a run leaves, as far as tools read it."""
    return made_run(project, tmp_path / "run", latency_cutoff=2.0)


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hmq-fpga", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@needs_nextpnr
def test_the_command_keeps_the_record_and_the_netlist(run_folder, monkeypatch, capsys):
    options = ("--tool", "nextpnr", "--device", "ecp5-25k", "--clock", "20", "--json")
    code, out, err = call(monkeypatch, capsys, "synth", run_folder, *options)
    assert (code, err) == (0, "")
    trace, route = json.loads(out)
    assert (trace["stage"], route["stage"], route["device"], route["clock_ns"]) == ("trace", "route", "ecp5-25k", 20)
    assert json.loads((run_folder / "resources.json").read_text()) == [trace, route]
    assert (run_folder / "synth" / "nextpnr" / "routed.json").exists()
    page = re.sub(r"\s+", " ", (run_folder / "report.html").read_text())
    assert f"<td>{route['fmax_mhz']:.4g}</td>" in page
    assert f"<td>{route['latency_ns']:.4g}</td>" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tool nextpnr --device ecp5-26k", "device 'ecp5-26k': not known"),
        ("--tool nextpnr --csim", "--csim: is for --tool vitis or vivado, not for nextpnr"),
        ("--tool yosys --clock 5", "--clock: is for --tool vitis or vivado or nextpnr, not for yosys"),
        ("--tool vitis --device ecp5-25k", "--device: is for --tool nextpnr, not for vitis"),
        ("--tool yosys --tries 2", "--tries: is for --tool nextpnr, not for yosys"),
        ("--tool nextpnr --goal fmax", "--goal: is for --clock auto"),
        ("--tool vitis --clock auto", "--clock auto: is for --tool nextpnr"),
        ("--tool nextpnr --clock soon", "--clock soon: give a period in ns, or auto"),
    ],
)
def test_options_that_a_tool_does_not_have(run_folder, monkeypatch, capsys, options, message):
    code, _, err = call(monkeypatch, capsys, "synth", run_folder, *options.split())
    assert code == 2
    assert message in err


def placements(monkeypatch, found):
    """Routing that knows Fmax by latency in cycles, and takes no time; what was asked for, by cycles."""
    asked = []

    def route(project, folder, device, *, tries=1, time_limit_s=3600, on_step=None):
        asked.append(project.latency_cycles)
        fmax = found(project.latency_cycles)
        if fmax is None:
            raise DoesNotFit(f"does not fit in {project.latency_cycles} cycles")
        (folder / "routed.json").write_text(str(project.latency_cycles))
        latency = 1e3 * project.latency_cycles / fmax
        figures = {"fmax_mhz": fmax, "latency_ns": latency, "latency_cycles": project.latency_cycles}
        return Resources(stage="route", tool="nextpnr", **figures, notes="routed")

    monkeypatch.setattr(RtlProject, "route", route)
    monkeypatch.setattr(cutoff, "require_tools", lambda device: None)
    return asked


@pytest.mark.parametrize("goal", ["latency", "fmax"])
def test_the_best_cutoff_is_found_and_its_verilog_kept(project, tmp_path, monkeypatch, goal):
    asked = placements(monkeypatch, lambda cycles: 40.0 + 25.0 * cycles - 1.5 * cycles**2)
    best, tried = cutoff.find_cutoff(project, tmp_path, ECP5, goal=goal)
    figures = [one.to_json() for one in tried]
    key, choose = {"latency": ("latency_ns", min), "fmax": ("fmax_mhz", max)}[goal]
    assert getattr(best, key) == choose(one[key] for one in figures)
    assert len(set(asked)) == len(asked) == len(tried) > 3  # cutoffs that cut at the same places are routed once
    assert [one.cutoff for one in tried] == sorted(one.cutoff for one in tried)
    chosen = next(one.cutoff for one in tried if one.found and one.found.latency_cycles == best.latency_cycles)
    assert best.notes.startswith(f"at a latency cutoff of {chosen:g} ns, of ")
    kept = RtlProject.load(project.net, tmp_path / "rtl")
    assert kept.latency_cycles == best.latency_cycles
    assert (tmp_path / "routed.json").read_text() == str(best.latency_cycles)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routed.json", "rtl"]


def test_cutoffs_that_do_not_fit_are_passed_over(project, tmp_path, monkeypatch):
    placements(monkeypatch, lambda cycles: None if cycles > 4 else 10.0 * cycles)
    best, tried = cutoff.find_cutoff(project, tmp_path / "some", ECP5)
    assert best.latency_cycles <= 4
    assert any("does not fit in" in one.to_json().get("refused", "") for one in tried)
    placements(monkeypatch, lambda cycles: None)
    with pytest.raises(DoesNotFit, match="does not fit in"):
        cutoff.find_cutoff(project, tmp_path / "none", ECP5)


@needs_nextpnr
def test_the_command_finds_the_clock(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(cutoff, "CUTOFFS", (2.0, 8.0))
    options = ("--tool", "nextpnr", "--device", "ecp5-25k", "--clock", "auto", "--goal", "fmax")
    before = (run_folder / "rtl" / "rtl.json").read_text()
    code, out, err = call(monkeypatch, capsys, "synth", run_folder, *options)
    assert (code, err) == (0, "")
    route = json.loads((run_folder / "resources.json").read_text())[1]
    curve = json.loads((run_folder / "synth" / "nextpnr" / "cutoffs.json").read_text())
    assert route["fmax_mhz"] == max(one["fmax_mhz"] for one in curve)
    assert len(curve) > 1
    assert all(str(one["fmax_mhz"]) in out for one in curve)
    assert (run_folder / "rtl" / "rtl.json").read_text() == before
    assert call(monkeypatch, capsys, "report", run_folder)[0] == 0


@needs_nextpnr
def test_the_estimate_route_of_a_run(project, tmp_path):
    hardware = Hardware(estimate="route", route_device="ecp5-25k", latency_cutoff=2.0)
    backends.RTL.check(project.net, hardware)
    records = backends.RTL.create(project.net, tmp_path, hardware, None).resources
    assert [record.stage for record in records] == ["model", "trace", "route"]
    assert records[-1].device == "ecp5-25k"
    assert (tmp_path / "rtl" / "route" / "routed.json").exists()
    assert backends.RTL.differences(project.net, tmp_path, hardware) == []
    with pytest.raises(InvalidInput, match=r"latency_cutoff 0: .* no clock"):
        backends.RTL.check(project.net, replace(hardware, latency_cutoff=0))


def test_a_run_goes_on_where_its_network_does_not_fit(project, tmp_path, monkeypatch):
    placements(monkeypatch, lambda cycles: None)
    records = backends.RTL.create(project.net, tmp_path, Hardware(estimate="route"), None).resources
    assert [record.stage for record in records] == ["model", "trace"]
    assert "not routed: does not fit in" in records[-1].notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimate": "route", "route_device": "ecp5-26k"}, "device 'ecp5-26k': not known"),
        ({"route_device": "ecp5-25k"}, "route_device: is for estimate: route"),
    ],
)
def test_settings_of_a_run_that_cannot_be(settings, message):
    with pytest.raises(InvalidInput, match=message):
        make_config({"task": "digits_mlp", **settings})
