import importlib.util
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vendor_texts import Figures, cosim_text, csynth_text, csynth_xml, timing_text, utilization_text

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.toolchain import ToolFailed
from hmq_fpga.deploy.vendor.reports import read_cosim, read_csynth, read_vivado
from hmq_fpga.ir.errors import InvalidInput
from tests import outside

TOP = "myproject"
CSYNTH = Resources(stage="csynth", tool="Vitis HLS", version="2024.1", part="xcvu13p-flga2577-2-e", clock_ns=5.0)

COUNTS = st.integers(0, 2_000_000)
CYCLES = st.one_of(st.just((None, None)), st.tuples(COUNTS, COUNTS).map(lambda c: (min(c), max(c))))
PERIODS = st.integers(100, 2000).map(lambda n: n / 100)


@st.composite
def figures(draw) -> Figures:
    names = ["DSP", "Expression", "FIFO", "Instance", "Memory", "Multiplexer", "Register"]
    return Figures(
        **draw(st.sampled_from([{"family": "Vivado", "version": "2019.2"}, {"version": "2022.2"}, {}])),
        top=draw(st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)),
        part=draw(st.sampled_from(["xc7z020-clg400-1", "xcvu13p-flga2577-2-e", "xcu250-figd2104-2L-e"])),
        clock_ns=draw(PERIODS),
        estimated_ns=draw(st.integers(1, 9999)) / 1000,
        latency=draw(CYCLES),
        interval=draw(CYCLES),
        components={name: draw(st.tuples(*[COUNTS] * 5)) for name in draw(st.sets(st.sampled_from(names), min_size=1))},
        available=draw(st.tuples(*[st.integers(1, 3_000_000)] * 4, COUNTS)),
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Callable[[], Path]:
    """An empty folder for each example."""
    folder = tmp_path_factory.mktemp("reports")

    def empty() -> Path:
        for path in folder.iterdir():
            path.unlink()
        return folder

    return empty


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def write_csynth(folder: Path, f: Figures, *, xml: str | None = None, text: str | None = None) -> Path:
    write(folder / f"{f.top}_csynth.xml", csynth_xml(f) if xml is None else xml)
    write(folder / f"{f.top}_csynth.rpt", csynth_text(f) if text is None else text)
    return folder


# --- What is planted is read


@given(f=figures())
def test_csynth_reads_what_the_tool_wrote(f, fresh):
    folder = write_csynth(fresh(), f)
    record = read_csynth(folder, f.top)
    bram, dsp, ff, lut, _ = f.total
    assert record == Resources(
        stage="csynth",
        tool=f"{f.family} HLS",
        version=f.version,
        part=f.part,
        clock_ns=f.clock_ns,
        achieved_clock_ns=f.estimated_ns,
        lut=lut,
        ff=ff,
        dsp=dsp,
        bram=bram,
        latency_cycles=f.latency[1],
        ii=f.interval[1],
        notes=record.notes,
    )
    assert (f"latency {f.latency[0]} to {f.latency[1]} cycles" in record.notes) == (f.latency[0] != f.latency[1])
    (folder / f"{f.top}_csynth.xml").unlink()
    assert read_csynth(folder, f.top) == record


@given(f=figures())
def test_csynth_xml_alone_is_enough_unless_the_design_exceeds_the_part(f, fresh):
    folder = fresh()
    write(folder / f"{f.top}_csynth.xml", csynth_xml(f))
    if any(used > total for used, total in zip(f.total[:4], f.available, strict=False)):
        with pytest.raises(InvalidInput, match="exceeds the part's"):
            read_csynth(folder, f.top)
    else:
        alone = read_csynth(folder, f.top)
        assert alone == read_csynth(write_csynth(folder, f), f.top)


@given(f=figures())
def test_cosim_reads_what_the_tool_wrote(f, fresh):
    path = write(fresh() / f"{f.top}_cosim.rpt", cosim_text(f))
    record = read_cosim(path, CSYNTH)
    assert (record.stage, record.latency_cycles, record.ii) == ("cosim", f.latency[1], f.interval[1])
    assert (record.tool, record.part, record.clock_ns) == (CSYNTH.tool, CSYNTH.part, CSYNTH.clock_ns)
    assert record.lut is record.ff is record.dsp is record.bram is record.achieved_clock_ns is None


@given(f=figures(), state=st.sampled_from(["Synthesized", "Optimized", "Routed"]), slices=st.booleans())
def test_vivado_reads_what_the_tool_wrote(f, state, slices, fresh):
    path = write(fresh() / "u.rpt", utilization_text(f, state, slice_names=slices))
    record = read_vivado(path, f.top)
    bram, dsp, ff, lut, _ = f.total
    assert (record.lut, record.ff, record.dsp, record.bram) == (lut, ff, dsp, bram)
    assert (record.stage, record.part) == ("impl" if state == "Routed" else "vsynth", f.part)
    assert record.clock_ns is record.achieved_clock_ns is record.latency_cycles is None


@given(clock=PERIODS, slack=st.integers(-9999, 9999), state=st.sampled_from(["Routed", None]))
def test_achieved_clock_is_the_period_minus_the_slack(clock, slack, state, fresh):
    f, folder = Figures(clock_ns=clock), fresh()
    utilization = write(folder / "u.rpt", utilization_text(f, "Routed"))
    record = read_vivado(utilization, TOP, write(folder / "t.rpt", timing_text(f, slack / 1000, state)))
    assert record.clock_ns == clock and record.achieved_clock_ns == pytest.approx(clock - slack / 1000, abs=1e-9)
    assert ("timing not met" in record.notes) == (slack < 0)


# --- Damage is never read as a figure

REPORTS = {
    "csynth xml": (csynth_xml, lambda folder, text: _read_csynth_xml(folder, text)),
    "csynth text": (csynth_text, lambda folder, text: _read_csynth_text(folder, text)),
    "cosim": (cosim_text, lambda folder, text: read_cosim(write(folder / "c.rpt", text), CSYNTH)),
    "utilization": (utilization_text, lambda folder, text: read_vivado(write(folder / "u.rpt", text), TOP)),
    "timing": (lambda f: timing_text(f, 0.31), lambda folder, text: _read_timing(folder, text)),
}
FIXTURES = [
    Figures(),
    Figures(family="Vivado", version="2019.2", part="xc7z020-clg400-1", latency=(243, 2293), interval=(227, 2277)),
    Figures(available=(3, 20, 7000, 8000, 0)),  # larger than its part
    Figures(interval=(None, None)),
]


def _read_csynth_xml(folder: Path, text: str) -> Resources:
    write(folder / f"{TOP}_csynth.xml", text)
    return read_csynth(folder, TOP)


def _read_csynth_text(folder: Path, text: str) -> Resources:
    write(folder / f"{TOP}_csynth.rpt", text)
    return read_csynth(folder, TOP)


def _read_timing(folder: Path, text: str) -> Resources:
    utilization = write(folder / "u.rpt", utilization_text(Figures(), "Routed"))
    return read_vivado(utilization, TOP, write(folder / "t.rpt", text))


def survives(read, folder: Path, text: str, right: Resources | None) -> None:
    """The text gives the right figures or one clear line."""
    try:
        record = read(folder, text)
    except InvalidInput as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error)
    else:
        assert record == right


def right_figures(read, folder: Path, text: str) -> Resources | None:
    try:
        return read(folder, text)
    except InvalidInput:  # an XML alone, of a design that exceeds its part
        return None


@pytest.mark.parametrize("kind", REPORTS)
@given(data=st.data(), f=st.sampled_from(FIXTURES))
def test_truncated_deleted_or_swapped_lines_never_give_a_wrong_figure(kind, data, f, fresh):
    text_of, read = REPORTS[kind]
    folder = fresh()
    text = text_of(f if kind != "timing" else replace(f, part=Figures().part))
    right = right_figures(read, folder, text)
    lines = text.splitlines(keepends=True)
    i, j = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(["truncate", "delete", "swap"])):
        case "truncate":
            damaged = text[: data.draw(st.integers(0, len(text)))]
        case "delete":
            damaged = "".join(lines[: min(i, j)] + lines[max(i, j) + 1 :])
        case "swap":
            lines[i], lines[j] = lines[j], lines[i]
            damaged = "".join(lines)
    survives(read, folder, damaged, right)


@pytest.mark.parametrize("kind", REPORTS)
def test_every_single_line_that_is_lost_is_noticed_or_harmless(kind, tmp_path):
    text_of, read = REPORTS[kind]
    text = text_of(Figures())
    right = read(tmp_path, text)
    lines = text.splitlines(keepends=True)
    for i in range(len(lines)):
        survives(read, tmp_path, "".join(lines[:i] + lines[i + 1 :]), right)


@pytest.mark.parametrize("kind", ["csynth xml", "cosim"])
def test_every_truncation_is_noticed_or_harmless(kind, tmp_path):
    text_of, read = REPORTS[kind]
    text = text_of(Figures(family="Vivado", version="2019.2", latency=(9, 1234), interval=(1, 1234)))
    right = read(tmp_path, text)
    for length in range(len(text)):
        survives(read, tmp_path, text[:length], right)


@pytest.mark.parametrize(
    ("kind", "old", "new", "field"),
    [
        ("csynth text", "|Total            |        6|", "|Total            |        7|", "Total of BRAM_18K"),
        ("csynth text", "|  3456000|", "|    34560|", "of FF, which does not fit Total and Available"),
        ("csynth text", "|       11|       11|", "|       12|       11|", "the largest latency"),
        ("csynth xml", "<Interval-max>1<", "<Interval-max>0<", "the largest interval"),
        ("utilization", "|   8723 |", "|   9723 |", "Util% of CLB LUTs"),
        ("utilization", "|      3 |     0 |      2688", "|      4 |     0 |      2688", "Util% of Block RAM Tile"),
        ("timing", "      0.310", "      0.410", "the design, which is not the clock's"),
        ("timing", "      5.000", "      5.100", "does not fit Frequency"),
        ("timing", "  0.310", " -0.310", "does not fit TNS Failing Endpoints"),
    ],
)
def test_figures_that_the_rest_of_the_report_contradicts(kind, old, new, field, tmp_path):
    text_of, read = REPORTS[kind]
    text = text_of(Figures())
    assert old in text
    damaged = text.replace(old, new) if "Endpoints" in field else text.replace(old, new, 1)
    with pytest.raises(InvalidInput, match=field):
        read(tmp_path, damaged)


@given(data=st.data(), f=st.sampled_from(FIXTURES))
def test_the_two_forms_of_a_csynth_report_must_agree(data, f, fresh):
    folder = fresh()
    right = read_csynth(write_csynth(folder, f), TOP)
    other = replace(f, components={**f.components, "Register": (0, 0, data.draw(st.integers(7, 10**6)), 0, 0)})
    with pytest.raises(InvalidInput, match=r"_csynth\.xml and myproject_csynth\.rpt differ in used"):
        read_csynth(write_csynth(folder, f, text=csynth_text(other)), TOP)
    lines = csynth_xml(f).splitlines(keepends=True)
    i, j = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
    lines[i], lines[j] = lines[j], lines[i]
    survives(lambda folder, xml: read_csynth(write_csynth(folder, f, xml=xml), TOP), folder, "".join(lines), right)


@pytest.mark.parametrize("kind", REPORTS)
@pytest.mark.parametrize("text", ["", "\n \n", "<html><body>404</body></html>", "\x00\xff binary", "{}"])
def test_empty_and_foreign_files(kind, text, tmp_path):
    with pytest.raises(InvalidInput, match=r"myproject_csynth|[cut]\.rpt"):
        REPORTS[kind][1](tmp_path, text)


@pytest.mark.parametrize("kind", [kind for kind in REPORTS if kind != "cosim"])  # which does not name its project
def test_report_of_another_project(kind, tmp_path):
    text_of, read = REPORTS[kind]
    with pytest.raises(InvalidInput, match=r"'theirs', expected 'myproject'"):
        read(tmp_path, text_of(Figures(top="theirs")))


@pytest.mark.parametrize(
    ("kind", "old", "new", "field"),
    [
        ("csynth xml", "<LUT>", "<LUTS>", "AreaEstimates"),
        ("csynth xml", "Best-caseLatency", "LatencyMin", "Best-caseLatency"),
        ("csynth xml", "<EstimatedClockPeriod>3.649", "<EstimatedClockPeriod>n/a", "EstimatedClockPeriod"),
        ("csynth xml", "<unit>ns</unit>", "<unit>ps</unit>", "unit"),
        ("csynth text", "BRAM_18K|", "BRAM_36K|", "utilization estimates"),
        ("csynth text", "| Estimated|", "| Predicted|", "Timing"),
        ("csynth text", "|Total  ", "|Sum    ", "row Total"),
        ("cosim", "Status", "Result", "RTL and Status"),
        ("cosim", "      min      ", "      max      ", "min, avg, max"),
        ("utilization", "CLB LUTs", "CLB ALMs", "CLB LUTs or Slice LUTs"),
        ("utilization", "| Fixed | Available |", "| Available | Fixed |", "CLB LUTs"),
        ("utilization", "Design State : Optimized", "Design State : Fully Placed", "Design State 'Fully Placed'"),
        ("timing", "WNS(ns)", "WS(ns)", "Design Timing Summary"),
        ("timing", "Period(ns)", "Period(ps)", "Clock Summary"),
    ],
)
def test_moved_fields_are_named(kind, old, new, field, tmp_path):
    text_of, read = REPORTS[kind]
    text = text_of(Figures())
    assert old in text
    damaged = text.replace(old, new).replace(old.replace("<", "</"), new.replace("<", "</"))
    with pytest.raises(InvalidInput, match=field.replace("(", r"\(")):
        read(tmp_path, damaged)


@pytest.mark.parametrize("status", ["Fail", "fail", "PASS?", "Timeout"])
def test_a_failed_cosimulation_never_reads_as_success(status, tmp_path):
    path = write(tmp_path / "c.rpt", cosim_text(Figures(status=status)))
    with pytest.raises(ToolFailed, match=status.replace("?", r"\?")):
        read_cosim(path, CSYNTH)


def test_a_failure_is_not_hidden_by_the_other_language(tmp_path):
    text = cosim_text(Figures()).replace("|      VHDL|        NA|", "|      VHDL|      Fail|")
    with pytest.raises(ToolFailed, match="VHDL"):
        read_cosim(write(tmp_path / "c.rpt", text), CSYNTH)


def test_stages_are_never_mixed(tmp_path):
    f = Figures()
    synthesized = write(tmp_path / "u.rpt", utilization_text(f, "Synthesized"))
    for timing in (timing_text(f, 0.1, "Routed"), timing_text(f, 0.1, None, nets="routed")):
        with pytest.raises(InvalidInput, match="timing of stage impl, but the utilization is of stage vsynth"):
            read_vivado(synthesized, TOP, write(tmp_path / "t.rpt", timing))
    unplaced = write(tmp_path / "t.rpt", timing_text(f, 0.1, None, nets="unplaced"))
    assert read_vivado(synthesized, TOP, unplaced).achieved_clock_ns == 4.9
    with pytest.raises(InvalidInput, match="Design State"):
        read_vivado(synthesized, TOP, write(tmp_path / "t.rpt", timing_text(f, 0.1, None, nets="estimated")))


def test_timing_of_another_part(tmp_path):
    utilization = write(tmp_path / "u.rpt", utilization_text(Figures(), "Routed"))
    timing = write(tmp_path / "t.rpt", timing_text(Figures(part="xcku115-flvb2104-2-i"), 0.1))
    with pytest.raises(InvalidInput, match="of a xcku115"):
        read_vivado(utilization, TOP, timing)


def test_a_design_without_a_clock_has_no_timing(tmp_path):
    text = timing_text(Figures(), 0.1).replace(
        "All user specified timing constraints are met.", "There are no user specified timing constraints."
    )
    with pytest.raises(InvalidInput, match="create_clock"):
        _read_timing(tmp_path, text)


# --- Reports of real runs


@pytest.fixture(scope="module")
def real() -> Path:
    return outside.reports(".")


PROJECT = "myproject_prj/solution1"
RUNS = ("vivado_hls_cosim_pass", "vitis_cosim_fail", "vitis_stream_vsynth")


def test_real_vivado_hls_2020_1(real):
    assert read_csynth(real / "vivado_hls", TOP) == Resources(
        stage="csynth",
        tool="Vivado HLS",
        version="2020.1",
        part="xc7z020-clg400-1",
        clock_ns=5.0,
        achieved_clock_ns=4.049,
        lut=2532,
        ff=7969,
        dsp=73,
        bram=0,
        latency_cycles=10,
        ii=8,
        notes="estimate of HLS",
    )
    assert read_vivado(real / "vivado_hls" / "vivado_synth.rpt", TOP) == Resources(
        stage="vsynth",
        tool="Vivado",
        version="2020.1",
        part="xc7z020clg400-1",
        lut=1526,
        ff=2428,
        dsp=66,
        bram=0,
        notes="design state Synthesized",
    )


def test_real_vivado_hls_2019_2_with_a_cosimulation_that_passed(real):
    folder = real / "vivado_hls_cosim_pass" / PROJECT
    csynth = read_csynth(folder / "syn" / "report", TOP)
    assert csynth == Resources(
        stage="csynth",
        tool="Vivado HLS",
        version="2019.2",
        part="xczu9eg-ffvb1156-2-e",
        clock_ns=5.0,
        achieved_clock_ns=3.77,
        lut=8722,
        ff=4187,
        dsp=8,
        bram=4,
        latency_cycles=2293,
        ii=2277,
        notes="estimate of HLS; latency 243 to 2293 cycles; interval 227 to 2277 cycles",
    )
    assert read_cosim(folder / "sim" / "report" / "myproject_cosim.rpt", csynth) == Resources(
        stage="cosim",
        tool="Vivado HLS",
        version="2019.2",
        part="xczu9eg-ffvb1156-2-e",
        clock_ns=5.0,
        latency_cycles=965,
        ii=None,
        notes="simulated Verilog",
    )


def test_real_vitis_hls_2024_1_synthesized_and_routed(real):
    folder = real / "vitis_stream_vsynth"
    assert read_csynth(folder / PROJECT / "syn" / "report", TOP) == Resources(
        stage="csynth",
        tool="Vitis HLS",
        version="2024.1",
        part="xcu250-figd2104-2L-e",
        clock_ns=5.0,
        achieved_clock_ns=3.53,
        lut=17966,
        ff=7123,
        dsp=467,
        bram=29,
        latency_cycles=395,
        ii=390,
        notes="estimate of HLS",
    )
    synthesized = Resources(
        stage="vsynth",
        tool="Vivado",
        version="2024.1",
        part="xcu250-figd2104-2L-e",
        lut=8565,
        ff=4864,
        dsp=467,
        bram=24,  # 12 tiles of 36 kbit
        notes="design state Optimized",
    )
    assert read_vivado(folder / "vivado_synth.rpt", TOP) == synthesized
    routed = replace(synthesized, stage="impl", lut=7722, notes="design state Routed")
    assert read_vivado(folder / "vivado_utilization.rpt", TOP) == routed
    percent = routed.percent
    assert percent is not None
    assert [f"{percent[kind]:.2f}" for kind in ("lut", "ff", "dsp", "bram")] == ["0.45", "0.14", "3.80", "0.45"]


def test_real_vitis_hls_2023_1_with_a_cosimulation_that_failed(real):
    folder = real / "vitis_cosim_fail" / PROJECT
    csynth = read_csynth(folder / "syn" / "report", TOP)
    assert csynth == Resources(
        stage="csynth",
        tool="Vitis HLS",
        version="2023.1",
        part="xczu49dr-ffvf1760-2-e",
        clock_ns=5.0,
        achieved_clock_ns=3.649,
        lut=339116,
        ff=65881,
        dsp=29,
        bram=332,
        latency_cycles=695,
        ii=578,
        notes="estimate of HLS",
    )
    with pytest.raises(ToolFailed, match="cosimulation of the Verilog ended with 'Fail'"):
        read_cosim(folder / "sim" / "report" / "myproject_cosim.rpt", csynth)


@pytest.mark.parametrize("name", ["vivado_hls", *(f"{n}/{PROJECT}/syn/report" for n in RUNS)])
def test_percent_is_of_what_the_real_report_calls_available(name, real):
    record = read_csynth(real / name, TOP)
    available = ET.parse(real / name / f"{TOP}_csynth.xml").find("AreaEstimates/AvailableResources")
    assert available is not None
    total = {child.tag.replace("48E", ""): int(child.text or "") for child in available}
    used = {"LUT": record.lut, "FF": record.ff, "DSP": record.dsp, "BRAM_18K": record.bram}
    assert list((record.percent or {}).values()) == [100 * count / total[kind] for kind, count in used.items()]


REAL = {
    "vivado_hls/myproject_csynth.xml": read_csynth,
    "vivado_hls/myproject_csynth.rpt": read_csynth,
    "vivado_hls/vivado_synth.rpt": read_vivado,
    f"vivado_hls_cosim_pass/{PROJECT}/syn/report/myproject_csynth.xml": read_csynth,
    f"vivado_hls_cosim_pass/{PROJECT}/syn/report/myproject_csynth.rpt": read_csynth,
    f"vivado_hls_cosim_pass/{PROJECT}/sim/report/myproject_cosim.rpt": read_cosim,
    f"vitis_stream_vsynth/{PROJECT}/syn/report/myproject_csynth.xml": read_csynth,
    f"vitis_stream_vsynth/{PROJECT}/syn/report/myproject_csynth.rpt": read_csynth,
    "vitis_stream_vsynth/vivado_synth.rpt": read_vivado,
    "vitis_stream_vsynth/vivado_utilization.rpt": read_vivado,
    f"vitis_cosim_fail/{PROJECT}/syn/report/myproject_csynth.xml": read_csynth,
    f"vitis_cosim_fail/{PROJECT}/syn/report/myproject_csynth.rpt": read_csynth,
}


@pytest.mark.parametrize("name", REAL)
@given(data=st.data())
def test_real_reports_with_damage_never_give_a_wrong_figure(name, data, real, fresh):
    path, function = real / name, REAL[name]
    folder = fresh()

    def read(folder: Path, text: str) -> Resources:
        copy = write(folder / path.name, text)
        if function is read_csynth:
            return read_csynth(folder, TOP)
        return read_cosim(copy, CSYNTH) if function is read_cosim else read_vivado(copy, TOP)

    text = path.read_text()
    right = read(folder, text)
    lines = text.splitlines(keepends=True)
    i, j = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        lines[i], lines[j] = lines[j], lines[i]
    else:
        del lines[min(i, j) : max(i, j)]
    survives(read, folder, "".join(lines), right)
    survives(read, folder, text[: data.draw(st.integers(0, len(text)))], right)


@pytest.mark.parametrize("name", RUNS)
def test_hls4ml_reads_the_same_figures_where_its_parser_is_complete(name, real, tmp_path, capsys):
    package = importlib.util.find_spec("hls4ml")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("theirs", Path(package.origin).parent / "report/vivado_report.py")
    assert spec is not None and spec.loader is not None
    hls4ml_parser = importlib.util.module_from_spec(spec)  # without the rest of hls4ml
    spec.loader.exec_module(hls4ml_parser)
    shutil.copytree(real / name, tmp_path / name)
    write(tmp_path / name / "project.tcl", f'set project_name "{TOP}"\nset backend "vitis"\n')
    report = hls4ml_parser.parse_vivado_report(str(tmp_path / name))
    theirs = {key: report["CSynthesisReport"][key] for key in ("LUT", "FF", "DSP", "BRAM_18K", "WorstLatency")}
    csynth = read_csynth(real / name / PROJECT / "syn" / "report", TOP)
    ours = (csynth.lut, csynth.ff, csynth.dsp, csynth.bram, csynth.latency_cycles)
    assert [int(value) for value in theirs.values()] == list(ours)
    capsys.readouterr()  # it prints
