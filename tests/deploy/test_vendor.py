"""The vendor's tools by a stand-in on PATH, on a project that hls4ml wrote."""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from vendor_texts import Figures, timing_text, utilization_text

from hmq_fpga.deploy import toolchain
from hmq_fpga.deploy.hls.project import RECORD, HlsProject
from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.toolchain import ToolMissing
from hmq_fpga.deploy.vendor.pack import RETURNED, collect, pack
from hmq_fpga.deploy.vendor.run import SimulationLog, Target, examine, read_inputs, synthesize, write_options
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput

STAND_IN = Path(__file__).with_name("stand_in_tool.py")
PROGRAMS = {"vitis": ("vitis-run", "vivado"), "vivado": ("vivado_hls", "vivado")}
ALL = {"csim": True, "cosim": True, "vsynth": True}


def make_project(net, x, folder: Path, backend: str) -> HlsProject:
    project = HlsProject.create(net, folder, backend=backend)
    project.write_tb_data(x, reference.run(net, x))
    return project


@pytest.fixture(scope="module")
def vitis(mlp, samples, tmp_path_factory) -> HlsProject:
    return make_project(mlp, samples(mlp, 5), tmp_path_factory.mktemp("vitis") / "hls", "Vitis")


@pytest.fixture(scope="module")
def vivado(mlp, samples, tmp_path_factory) -> HlsProject:
    return make_project(mlp, samples(mlp, 5), tmp_path_factory.mktemp("vivado") / "hls", "Vivado")


@pytest.fixture(scope="module")
def verilog(mlp, tmp_path_factory) -> RtlProject:
    return RtlProject.create(mlp, tmp_path_factory.mktemp("verilog") / "rtl")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Puts stand-ins by these names on PATH, alone with the system's own programs."""

    def install(*names: str) -> Path:
        folder = tmp_path / "tool s"  # a path with a space in it
        folder.mkdir(exist_ok=True)
        for name in names:
            command = shlex.join([sys.executable, str(STAND_IN), name])
            (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return folder

    for tool in (*toolchain.TOOLS,):
        monkeypatch.delenv(tool.variable, raising=False)
    monkeypatch.setattr(toolchain, "GRACE_S", 0.5)
    install()
    return install


def stages(outcome) -> list[str]:
    return [record.stage for record in outcome.records]


def stand_in_records(f: Figures, vendor: str, version: str) -> list[Resources]:
    bram, dsp, ff, lut, _ = f.total
    hls = {"tool": f"{vendor.title()} HLS", "version": version, "part": f.part, "clock_ns": 5.0}
    used = {"lut": lut, "ff": ff, "dsp": dsp, "bram": bram}
    return [
        Resources(
            stage="csynth", **hls, **used, achieved_clock_ns=3.649, latency_cycles=11, ii=1, notes="estimate of HLS"
        ),
        Resources(stage="cosim", **hls, latency_cycles=11, ii=1, notes="simulated Verilog"),
        Resources(stage="vsynth", tool="Vivado", version="2024.2", part=f.part, **used, notes="design state Optimized"),
    ]


# --- Runs


@pytest.mark.parametrize("vendor", PROGRAMS)
def test_all_steps(vendor, request, mlp, tools, tmp_path):
    project = request.getfixturevalue(vendor)
    tools(*PROGRAMS[vendor])
    steps: list[str] = []
    outcome = synthesize(project, mlp, tmp_path / "out", vendor=vendor, **ALL, on_step=steps.append)
    assert outcome.passed and outcome.failures == ()
    assert steps == ["C SIMULATION", "C/RTL SYNTHESIS", "C/RTL SIMULATION", "VIVADO SYNTHESIS"]
    version = {"vitis": "2024.2", "vivado": "2019.2"}[vendor]
    assert list(outcome.records) == stand_in_records(Figures(), vendor, version)
    assert outcome.parity is not None and outcome.parity.samples == 15
    assert set(outcome.parity.simulators) == {f"{vendor}_csim", f"{vendor}_cosim"}
    assert outcome.folder == tmp_path / "out"
    assert "***** VIVADO SYNTHESIS *****" in (tmp_path / "out" / "build.log").read_text()
    assert outcome.to_json()["passed"] is True
    assert not list(project.folder.glob("*_prj")) and not list((project.folder / "tb_data").glob("*.log"))


def test_only_what_is_asked_for(vitis, mlp, tools, tmp_path):
    tools("vitis-run")
    outcome = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis")
    assert outcome.passed and stages(outcome) == ["csynth"] and outcome.parity is None


def test_the_older_program_where_the_newer_is_not_there(vitis, mlp, tools, tmp_path):
    tools("vitis_hls")
    outcome = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", csim=True)
    assert outcome.passed and outcome.records[0].version == "2023.1"


def test_part_and_clock_instead_of_the_project_s(vitis, mlp, tools, tmp_path):
    tools(*PROGRAMS["vitis"])
    outcome = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", **ALL, part="xcku115-flvb2104-2-i", clock_ns=2.5)
    assert outcome.passed
    assert [(r.part, r.clock_ns) for r in outcome.records[:2]] == 2 * [("xcku115-flvb2104-2-i", 2.5)]
    assert outcome.records[2].part == "xcku115-flvb2104-2-i"
    assert Target.of(vitis.folder).part == "xcvu13p-flga2577-2-e"


def assert_ended(pid: str) -> None:
    """A process that was killed is gone soon, or waits for its parent to hear of it."""
    stat, deadline = Path("/proc") / pid / "stat", time.monotonic() + 20
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the tool's child lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("scenario", "good", "failure"),
    [
        ("synthesis failure", [], r"vitis-run failed with exit code 1: ERROR: \[HLS 200-70\] Pre-synthesis failed"),
        ("crash", [], r"vitis-run failed with exit code -11: no error in its log; its log is .*/build\.log"),
        ("cosim failure", ["csynth", "vsynth"], r"cosimulation of the Verilog ended with 'Fail'"),
        ("csim mismatch", ["csynth", "cosim", "vsynth"], r"vitis_csim: 1 of 60 output codes differ"),
        ("cosim mismatch", ["csynth", "cosim", "vsynth"], r"vitis_cosim: 1 of 60 output codes differ"),
        (
            "licence failure",
            ["csynth", "cosim"],
            r"exit code 1: ERROR: \[Common 17-345\] A valid license was not found",
        ),
        ("hang", ["csynth"], r"vitis-run: stopped at the time limit of 4 s; its log is"),
    ],
)
def test_failures(scenario, good, failure, vitis, mlp, tools, tmp_path, monkeypatch):
    tools(*PROGRAMS["vitis"])
    before = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", **ALL)
    monkeypatch.setenv("STAND_IN", scenario)
    limit = 4 if scenario == "hang" else 60
    outcome = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", **ALL, time_limit_s=limit)
    assert not outcome.passed and re.search(failure, " ".join(outcome.failures)), outcome.failures
    assert all("\n" not in line for line in outcome.failures)
    assert stages(outcome) == good
    assert outcome.folder == tmp_path / "out.failed"
    if scenario == "hang":
        pid = (outcome.folder / "child.pid").read_text()
        assert_ended(pid)
    # the last good reports are still there
    assert examine(tmp_path / "out", mlp, ["csim", "csynth", "cosim", "vsynth"]) == before


def test_what_an_earlier_run_left_in_the_project_is_never_read(vitis, mlp, tools, tmp_path, monkeypatch):
    tools(*PROGRAMS["vitis"])
    built = synthesize(vitis, mlp, tmp_path / "built", vendor="vitis", **ALL).folder
    monkeypatch.setenv("STAND_IN", "synthesis failure")
    outcome = synthesize(HlsProject.load(built), mlp, tmp_path / "out", vendor="vitis", cosim=True, vsynth=True)
    assert outcome.records == () and outcome.parity is None and len(outcome.failures) == 1


def test_a_crash_half_way_through_the_report_is_no_report(vitis, mlp, tools, tmp_path, monkeypatch):
    tools("vitis-run")
    monkeypatch.setenv("STAND_IN", "crash")
    outcome = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis")
    assert not outcome.records and re.search(r"myproject_csynth\.xml: truncated or damaged", outcome.failures[1])


def test_ctrl_c_leaves_nothing_running_and_the_last_good_run(vitis, mlp, tools, tmp_path, monkeypatch):
    tools(*PROGRAMS["vitis"])
    before = synthesize(vitis, mlp, tmp_path / "out", vendor="vitis")
    monkeypatch.setenv("STAND_IN", "hang")

    def on_step(step: str) -> None:
        if step == "C/RTL SIMULATION":
            while not (tmp_path / "out.failed" / "child.pid").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", cosim=True, on_step=on_step)
    pid = (tmp_path / "out.failed" / "child.pid").read_text()
    assert_ended(pid)
    assert examine(tmp_path / "out", mlp, ["csynth"]) == before


# --- Tools and options


def test_missing_tools_are_one_line_with_the_remedy(vitis, vivado, mlp, tools, tmp_path):
    with pytest.raises(
        ToolMissing, match=r"neither vitis-run nor vitis_hls found: .*HMQ_FPGA_VITIS_RUN.*hmq-fpga pack"
    ):
        synthesize(vitis, mlp, tmp_path / "out", vendor="vitis")
    with pytest.raises(ToolMissing, match=r"vivado_hls not found, .* or set HMQ_FPGA_VIVADO_HLS to its path"):
        synthesize(vivado, mlp, tmp_path / "out", vendor="vivado")
    tools("vitis-run")
    with pytest.raises(ToolMissing, match=r"vivado not found, needed to synthesize the generated Verilog"):
        synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", vsynth=True)
    assert not list(tmp_path.glob("out*"))


def test_the_variables_are_enough(vitis, mlp, tools, tmp_path, monkeypatch):
    folder = tools("vitis-run", "vivado")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HMQ_FPGA_VITIS_RUN", str(folder / "vitis-run"))
    monkeypatch.setenv("HMQ_FPGA_VIVADO", str(folder / "vivado"))
    assert synthesize(vitis, mlp, tmp_path / "out", vendor="vitis", vsynth=True).passed


@pytest.mark.parametrize(
    ("vendor", "program", "version", "needs"),
    [
        ("vitis", "vitis-run", "2022.2", "2023.1 or later"),
        ("vitis", "vitis_hls", "2021.1", "2022.2 or later"),
        ("vivado", "vivado_hls", "2018.1", "2018.2 to 2020.1"),
        ("vivado", "vivado_hls", "2020.2", "2018.2 to 2020.1"),
    ],
)
def test_versions_that_the_scripts_do_not_work_with(
    vendor, program, version, needs, request, mlp, tools, tmp_path, monkeypatch
):
    tools(program)
    monkeypatch.setenv("STAND_IN_VERSION", version)
    with pytest.raises(InvalidInput, match=f"version {version}; hls4ml's scripts need {needs}"):
        synthesize(request.getfixturevalue(vendor), mlp, tmp_path / "out", vendor=vendor)


def test_what_does_not_fit(vitis, mlp, cnn, tools, tmp_path):
    tools("vitis-run", "vivado_hls")
    out = tmp_path / "out"
    with pytest.raises(InvalidInput, match=r"for vitis, not vivado: convert the network with --backend Vivado"):
        synthesize(vitis, mlp, out, vendor="vivado")
    with pytest.raises(InvalidInput, match=r"made from the QNet"):
        synthesize(vitis, cnn, out, vendor="vitis")
    for part in ('x"; exec touch pwned; "', "[exec touch pwned]", "", "a b"):
        with pytest.raises(InvalidInput, match=r"give a name such as"):
            synthesize(vitis, mlp, out, vendor="vitis", part=part)
    for clock_ns in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match=r"give a positive period"):
            synthesize(vitis, mlp, out, vendor="vitis", clock_ns=clock_ns)


def test_without_test_data_there_is_nothing_to_simulate(vitis, mlp, tools, tmp_path):
    tools("vitis-run")
    shutil.copytree(vitis.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tb_data"))
    bare = HlsProject.load(tmp_path / "bare")
    with pytest.raises(InvalidInput, match=r"no samples to simulate"):
        synthesize(bare, mlp, tmp_path / "out", vendor="vitis", csim=True)
    with pytest.raises(InvalidInput, match=r"no samples to simulate"):
        pack(bare, mlp, tmp_path / "p.tar.gz")
    assert synthesize(bare, mlp, tmp_path / "out", vendor="vitis").passed


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "not the settings"),
        ("", "'backend'"),
        ('set backend "quartus"\nset clock_period 5\n', "'quartus' is none of vitis, vivado"),
        ('set backend "vitis"\nset clock_period five\n', "five"),
        ('set backend "vitis"\nset clock_period 5\nset project_name "a; rm"\nset part "x"\n', "names no function"),
    ],
)
def test_settings_that_are_not_hls4ml_s(text, problem, tmp_path):
    if text is not None:
        (tmp_path / "project.tcl").write_text(text)
    with pytest.raises(InvalidInput, match=problem):
        Target.of(tmp_path)


def test_the_switches_are_hls4ml_s_own(vitis, tmp_path):
    """A switch that a new hls4ml renames would be ignored by its scripts."""
    spec = find_spec("hls4ml")
    assert spec is not None and spec.origin is not None
    theirs = (Path(spec.origin).parent / "templates" / "vitis" / "build_opt.tcl").read_text()
    (tmp_path / "build_opt.tcl").write_text(theirs)
    write_options(tmp_path, ["csynth"])
    ours = (tmp_path / "build_opt.tcl").read_text()
    names = r"^ +(\w+) +\d$"
    assert re.findall(names, ours, re.MULTILINE) == re.findall(names, theirs, re.MULTILINE)
    assert ours != theirs


# --- Reports and outputs


@pytest.fixture
def built(vitis, mlp, tools, tmp_path) -> Path:
    tools(*PROGRAMS["vitis"])
    return synthesize(vitis, mlp, tmp_path / "built", vendor="vitis", **ALL).folder


STEPS = ("csim", "csynth", "cosim", "vsynth")
REPORT = "myproject_prj/solution1/syn/report/myproject_csynth"


@pytest.mark.parametrize(
    ("name", "change", "failure", "lost"),
    [
        (
            "vivado_synth.rpt",
            lambda t: t.replace("xcvu13p-flga2577-2-e", "xcku115-flvb2104-2-i"),
            "not its report",
            "vsynth",
        ),
        ("vivado_synth.rpt", lambda t: "", "empty", "vsynth"),
        ("vivado_synth.rpt", None, "no such report", "vsynth"),
        ("myproject_prj/solution1/sim/report/myproject_cosim.rpt", None, "no such report", "cosim"),
        ("tb_data/csim_results.log", None, "not readable", None),
        ("tb_data/csim_results.log", lambda t: t[: len(t) // 2], "line 8 holds|outputs of", None),
        (
            "tb_data/csim_results.log",
            lambda t: t[: t[:-1].rindex("\n") + 1],
            "outputs of 14 samples, expected 15",
            None,
        ),
        ("tb_data/csim_results.log", lambda t: t.replace(" \n", " 1\n", 1), "line 1 holds 5 values, expected 4", None),
        ("tb_data/rtl_cosim_results.log", lambda t: "nan" + t[t.index(" ") :], "not a multiple", None),
        ("tb_data/rtl_cosim_results.log", lambda t: "x" + t[t.index(" ") :], "line 1: could not convert", None),
        ("tb_data/rtl_cosim_results.log", lambda t: "0.1" + t[t.index(" ") :], "not a multiple of its step", None),
        (f"{REPORT}.rpt", lambda t: t[:300], "csynth.rpt", "csynth"),
    ],
)
def test_outputs_that_cannot_be_trusted(name, change, failure, lost, built, mlp):
    path = built / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    outcome = examine(built, mlp, STEPS)
    assert not outcome.passed and re.search(failure, " ".join(outcome.failures)), outcome.failures
    assert lost not in stages(outcome)


def test_a_report_for_another_clock_is_not_this_project_s(built, mlp):
    path = built / "project.tcl"
    path.write_text(path.read_text().replace("set clock_period 5", "set clock_period 4"))
    assert re.search(r"for 5\.0 ns, but the project is for 4 ns", " ".join(examine(built, mlp, STEPS).failures))


def test_routed_reports_that_the_user_adds(built, mlp):
    (built / "vivado_utilization.rpt").write_text(utilization_text(Figures(), "Routed"))
    assert stages(examine(built, mlp, STEPS)) == ["csynth", "cosim", "vsynth", "impl"]
    (built / "vivado_timing.rpt").write_text(timing_text(Figures(), -0.25))
    impl = examine(built, mlp, STEPS).records[-1]
    assert (impl.stage, impl.clock_ns, impl.achieved_clock_ns) == ("impl", 5.0, 5.25)


def test_the_generated_test_bench_writes_what_is_read_here(vitis, mlp, tmp_path):
    """The test bench itself, compiled by g++: exact outputs, and a changed weight shows."""

    project = tmp_path / "project"
    shutil.copytree(vitis.folder, project)
    weights = project / "firmware" / "weights"
    sources = ["myproject_test.cpp", "firmware/myproject.cpp"]
    command = ["g++", "-std=c++11", "-w", f'-DWEIGHTS_DIR="{weights}"', "-Ifirmware/ap_types", *sources, "-o", "bench"]
    subprocess.run(command, cwd=project, check=True)
    log = SimulationLog(name="csim", path=project / "tb_data" / "csim_results.log", project=vitis)
    x = read_inputs(project, vitis)
    subprocess.run(["./bench"], cwd=project, check=True, stdout=subprocess.DEVNULL)
    assert check(mlp, [log], x).passed
    bias = max(weights.glob("b*.txt"), key=lambda path: int(path.stem[1:]))  # the last layer's
    bias.write_text(", ".join(f"{float(v) + 1}" for v in bias.read_text().split(",")))
    subprocess.run(["./bench"], cwd=project, check=True, stdout=subprocess.DEVNULL)
    assert check(mlp, [log], x).simulators["csim"].mismatches == 60


def test_a_test_bench_of_several_outputs_writes_a_line_for_each(heads, samples, tmp_path):
    project = HlsProject.create(heads, tmp_path / "hls")
    x = samples(heads, 5)
    project.write_tb_data(x, reference.run(heads, x))
    sources = ["myproject_test.cpp", "firmware/myproject.cpp"]
    weights = f'-DWEIGHTS_DIR="{project.folder}/firmware/weights"'
    command = ["g++", "-std=c++11", "-w", weights, "-Ifirmware/ap_types", *sources, "-o", "bench"]
    subprocess.run(command, cwd=project.folder, check=True)
    subprocess.run(["./bench"], cwd=project.folder, check=True, stdout=subprocess.DEVNULL)
    path = project.folder / "tb_data" / "csim_results.log"
    log = SimulationLog(name="csim", path=path, project=project)
    assert check(heads, [log], read_inputs(project.folder, project)).passed
    assert len(path.read_text().splitlines()) == 3 * len(x)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InvalidInput, match=f"outputs of {len(x) - 1} samples, expected {len(x)}"):
        log.predict(x)


# --- Elsewhere and back


def run_elsewhere(archive: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (project,) = folder.iterdir()
    return subprocess.run([project / "run.sh"], cwd="/", capture_output=True, text=True)


@pytest.mark.parametrize("vendor", PROGRAMS)
def test_pack_run_and_collect(vendor, request, mlp, tools, tmp_path):
    project = request.getfixturevalue(vendor)
    tools(*PROGRAMS[vendor])
    pack(project, mlp, tmp_path / "digits.tar.gz")
    ran = run_elsewhere(tmp_path / "digits.tar.gz", tmp_path / "else where")
    assert ran.returncode == 0, ran.stderr
    work = tmp_path / "else where" / "digits"
    here = synthesize(project, mlp, tmp_path / "out", vendor=vendor, **ALL)
    collected = collect(mlp, work / RETURNED, tmp_path / "collected")
    assert collected.passed and collected.folder == tmp_path / "collected"
    assert (collected.records, collected.parity) == (here.records, here.parity)
    assert collect(mlp, work, tmp_path / "unused").records == here.records
    (work / "exit_code").unlink()  # as after a run by hand
    assert collect(mlp, work, tmp_path / "unused").records == here.records
    assert not (tmp_path / "unused").exists()


def routed(clock_ns: float, cycles: int) -> Resources:
    """What the stand-in's routing gives: 0.625 ns to spare."""
    f, achieved = Figures(), clock_ns - 0.625
    bram, dsp, ff, lut, _ = f.total
    return Resources(
        stage="rtl_impl",
        tool="Vivado",
        version="2024.2",
        part=f.part,
        clock_ns=clock_ns,
        achieved_clock_ns=achieved,
        lut=lut,
        ff=ff,
        dsp=dsp,
        bram=bram,
        latency_cycles=cycles,
        ii=1,
        fmax_mhz=round(1000 / achieved, 1),
        latency_ns=max(cycles, 1) * achieved,
        notes="design state Routed; timing met; the Verilog, out of context: no pads; delays of the constraints "
        "included",
    )


def test_the_verilog_is_routed_elsewhere(vitis, verilog, mlp, cnn, tools, tmp_path, monkeypatch):
    """After HLS, or by Vivado alone; and its failure is not HLS's."""
    pack(vitis, mlp, tmp_path / "p.tar.gz", rtl=verilog.folder)
    tools("vivado")
    ran = run_elsewhere(tmp_path / "p.tar.gz", tmp_path / "alone")
    assert ran.returncode == 0 and "HLS is left out: vitis-run or vitis_hls is not on PATH" in ran.stderr
    expected = routed(5.0, verilog.latency_cycles)
    work = tmp_path / "alone" / "p"
    alone = collect(mlp, work / RETURNED, tmp_path / "collected")
    assert alone.passed and (alone.records, alone.parity) == ((expected,), None)
    assert collect(mlp, work, tmp_path / "unused").records == (expected,)
    with pytest.raises(InvalidInput, match="made from the QNet"):
        pack(vitis, mlp, tmp_path / "q.tar.gz", rtl=RtlProject.create(cnn, tmp_path / "rtl").folder)

    pack(vitis, mlp, tmp_path / "fast.tar.gz", rtl=verilog.folder, clock_ns=2.5)
    tools(*PROGRAMS["vitis"])
    assert run_elsewhere(tmp_path / "fast.tar.gz", tmp_path / "both").returncode == 0
    work = tmp_path / "both" / "fast"
    both = collect(mlp, work / RETURNED, tmp_path / "collected")
    assert both.passed and stages(both) == ["csynth", "cosim", "vsynth", "rtl_impl"]
    assert both.records[-1] == routed(2.5, verilog.latency_cycles)
    utilization = work / "rtl" / "utilization.rpt"
    for change, failure in {
        ("xcvu13p", "xcku115"): "of a xcvu13p-flga2577-2-e, but the utilization is of a xcku115|not its report",
        ("State : Routed", "State : Synthesized"): "timing of stage impl",
        ("Design       : network_wrapper", "Design       : myproject"): "expected 'network_wrapper'",
    }.items():
        text = utilization.read_text()
        utilization.write_text(text.replace(*change))
        wrong = collect(mlp, work, tmp_path / "unused")
        assert stages(wrong) == ["csynth", "cosim", "vsynth"] and re.search(failure, wrong.failures[0]), wrong.failures
        utilization.write_text(text)

    monkeypatch.setenv("STAND_IN", "routing failure")
    assert run_elsewhere(tmp_path / "fast.tar.gz", tmp_path / "large").returncode == 1
    failed = collect(mlp, tmp_path / "large" / "fast" / RETURNED, tmp_path / "collected")
    assert stages(failed) == ["csynth", "cosim", "vsynth"] and failed.parity.passed
    assert re.search(r"exit code 1: ERROR: \[Place 30-640\].*rtl/build\.log", " ".join(failed.failures))


def test_combinational_verilog_is_routed_between_the_edges_of_a_clock_of_no_port(vitis, mlp, tools, tmp_path):
    rtl = RtlProject.create(mlp, tmp_path / "rtl", latency_cutoff=None).folder
    pack(vitis, mlp, tmp_path / "p.tar.gz", rtl=rtl, clock_ns=20)
    tools("vivado")
    assert run_elsewhere(tmp_path / "p.tar.gz", tmp_path / "there").returncode == 0
    outcome = collect(mlp, tmp_path / "there" / "p" / RETURNED, tmp_path / "collected")
    assert outcome.passed and outcome.records == (routed(20.0, 0),)


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.parametrize("old_python", [False, True])
def test_nothing_is_unpacked_outside_the_folder(old_python, vitis, mlp, tmp_path, monkeypatch):
    """Python before 3.10.12 and 3.11.4 has no filter for it."""
    if old_python:
        monkeypatch.delattr(tarfile, "data_filter")
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as tar:
        for path in sorted(vitis.folder.iterdir()):
            tar.add(path, path.name)
        tar.add(vitis.folder / RECORD, "../outside")
    with contextlib.suppress(InvalidInput):  # the filter refuses the whole archive
        collect(mlp, tmp_path / "results.tar.gz", tmp_path / "collected")
    assert (tmp_path / "collected.failed" / RECORD).exists()
    assert not (tmp_path / "outside").exists()


def test_failure_elsewhere(vitis, mlp, cnn, tools, tmp_path, monkeypatch):
    pack(vitis, mlp, tmp_path / "p.tar.gz", part="xcku115-flvb2104-2-i", clock_ns=4)
    tools()
    ran = run_elsewhere(tmp_path / "p.tar.gz", tmp_path / "bare")
    assert ran.returncode == 2 and "vivado is not on PATH" in ran.stderr
    with pytest.raises(InvalidInput, match=r"not a readable archive"):
        collect(mlp, tmp_path / "bare" / "p" / RETURNED, tmp_path / "collected")
    tools(*PROGRAMS["vitis"])
    monkeypatch.setenv("STAND_IN", "licence failure")
    assert run_elsewhere(tmp_path / "p.tar.gz", tmp_path / "unlicensed").returncode == 1
    results = tmp_path / "unlicensed" / "p" / RETURNED
    outcome = collect(mlp, results, tmp_path / "collected")
    assert stages(outcome) == ["csynth", "cosim"] and outcome.folder == tmp_path / "collected.failed"
    assert [(r.part, r.clock_ns) for r in outcome.records] == 2 * [("xcku115-flvb2104-2-i", 4.0)]
    assert re.search(r"run\.sh failed with exit code 1: ERROR: .*license", outcome.failures[0])
    with pytest.raises(InvalidInput, match=r"made from the QNet"):
        collect(cnn, results, tmp_path / "collected")
    results.write_bytes(results.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match=r"not a readable archive of results"):
        collect(mlp, results, tmp_path / "collected")


def test_what_is_no_result(mlp, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"no hmq_fpga\.json"):
        collect(mlp, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "results.tar.gz").write_text("<html>not found</html>")
    with pytest.raises(InvalidInput, match=r"not a readable archive"):
        collect(mlp, tmp_path / "results.tar.gz", tmp_path / "out")
