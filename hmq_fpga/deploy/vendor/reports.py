"""Reports of Vivado HLS, Vitis HLS and Vivado, read into `Resources`.

hls4ml has a parser of the same files (`hls4ml.report.parse_vivado_report`). It takes what it finds: it checks neither
whose report it is nor that the report is whole, hands a failed cosimulation on like one that passed, and calls
Vivado's tiles of 36 kbit `BRAM_18K`. Here a figure counts only where the report confirms it: by a sum, a percentage, a
second table or a second file. So a report that is damaged, of another project or of an unknown layout ends in an
error that names the file and the field.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hmq_fpga.deploy.report import Resources, canonical_part
from hmq_fpga.deploy.toolchain import ToolFailed
from hmq_fpga.ir.errors import InvalidInput

Cells = list[str]
Range = tuple[int | None, int | None]  # smallest and largest, None where the tool does not know

_UNKNOWN = ("?", "-", "undef", "NA")
_STAGES = {"Synthesized": "vsynth", "Optimized": "vsynth", "Routed": "impl"}  # by Vivado's design state


def read_csynth(folder: Path, top: str) -> Resources:
    """HLS's estimate: `<top>_csynth.xml` and `<top>_csynth.rpt`, which must agree where both are there.

    Args:
        folder: `<project>_prj/solution1/syn/report`.
        top: name of the top function.

    Raises:
        InvalidInput: when there is no report or it cannot be trusted, naming file and field.
    """
    xml, text = folder / f"{top}_csynth.xml", folder / f"{top}_csynth.rpt"
    reports = [read(path, top) for path, read in ((xml, _csynth_xml), (text, _csynth_text)) if path.exists()]
    if not reports:
        raise InvalidInput(f"{folder}: no {xml.name}: HLS did not synthesize {top!r} here")
    estimate, *others = reports
    for other in others:
        for field in fields(estimate):
            values = getattr(estimate, field.name), getattr(other, field.name)
            if field.name != "tool" and values[0] != values[1]:
                raise InvalidInput(f"{xml} and {text.name} differ in {field.name}: {values[0]} and {values[1]}")
        estimate = other  # the text alone names the tool
    if estimate.tool is None:  # the XML alone
        if over := [kind for kind, count in estimate.used.items() if count > estimate.available[kind]]:
            raise InvalidInput(
                f"{xml}: {over[0]} exceeds the part's, which {text.name} beside it would have to confirm"
            )
        vivado = tuple(map(int, estimate.version.split("."))) < (2020, 2)
        estimate = replace(estimate, tool="Vivado HLS" if vivado else "Vitis HLS")
    assert estimate.tool is not None
    return Resources(
        stage="csynth",
        tool=estimate.tool,
        version=estimate.version,
        part=estimate.part,
        clock_ns=estimate.clock_ns,
        achieved_clock_ns=estimate.estimated_clock_ns,
        lut=estimate.used["LUT"],
        ff=estimate.used["FF"],
        dsp=estimate.used["DSP"],
        bram=estimate.used["BRAM_18K"],
        latency_cycles=estimate.latency[1],
        ii=estimate.interval[1],
        notes=_join("estimate of HLS", _spread("latency", estimate.latency), _spread("interval", estimate.interval)),
    )


def read_cosim(path: Path, csynth: Resources) -> Resources:
    """Latency and interval that were measured in the simulation of the generated Verilog or VHDL.

    Args:
        path: `<project>_prj/solution1/sim/report/<top>_cosim.rpt`, which names no tool, part or clock itself.
        csynth: the record of the synthesis that was simulated.

    Raises:
        ToolFailed: when the simulation did not pass.
        InvalidInput: when there is no report or it cannot be trusted, naming file and field.
    """
    report = _Text.read(path)
    tables = [table for table in report.tables() if any(row[:2] == ["RTL", "Status"] for row in table)]
    if len(tables) != 1 or len(tables[0]) < 4:
        raise report.bad("table of RTL and Status")
    quantities, kinds, columns, *rows = tables[0]
    names = [re.sub(r" *\(Clock Cycles\)$", "", name) for name in quantities]  # older versions name no unit
    last = [""] if names[4:] == ["Total Execution Time"] else []  # a column that newer versions have
    if names[:4] != ["", "", "Latency", "Interval"] or len(names) != 4 + len(last):
        raise report.bad("columns Latency and Interval")
    if kinds[:4] != ["RTL", "Status", "", ""] or columns != ["", "", *["min", "avg", "max"] * 2, *last]:
        raise report.bad("columns min, avg, max")
    passed: list[Cells] = []
    for row in rows:
        if len(row) != len(columns) or row[0] not in ("Verilog", "VHDL"):
            raise report.bad("row of the RTL")
        if row[1] == "Pass":
            passed.append(row)
        elif row[1] != "NA":
            raise ToolFailed(f"{path}: cosimulation of the {row[0]} ended with {row[1]!r}: see the tool's log")
    if len(passed) != 1:
        raise report.bad("one RTL whose Status is Pass")
    cells = [report.integer("Latency or Interval", cell) for cell in passed[0][2:8]]
    latency = report.ordered("latency", cells[0], cells[2])
    interval = report.ordered("interval", cells[3], cells[5])
    return Resources(
        stage="cosim",
        tool=csynth.tool,
        version=csynth.version,
        part=csynth.part,
        clock_ns=csynth.clock_ns,
        latency_cycles=latency[1],
        ii=interval[1],
        notes=_join(f"simulated {passed[0][0]}", _spread("latency", latency), _spread("interval", interval)),
    )


def read_vivado(utilization: Path, top: str, timing: Path | None = None) -> Resources:
    """Vivado's utilization, and its clock if a timing summary of the same design state comes with it.

    The stage is the design state that the report names: `vsynth` after synthesis, `impl` after routing.

    Args:
        utilization: what `report_utilization` wrote.
        top: name of the top module.
        timing: what `report_timing_summary` wrote.

    Raises:
        InvalidInput: when there is no report or it cannot be trusted, naming file and field.
    """
    report = _Text.read(utilization)
    head = _Header.of(report, "report_utilization", top)
    state = report.one("Design State", r"\| Design State *: (.+)")
    used = {kind: _used(report, labels) for kind, labels in _SITES.items()}
    record = Resources(
        stage=_stage(report, state),
        tool="Vivado",
        version=head.version,
        part=head.part,
        lut=_whole(report, "LUT", used["LUT"]),
        ff=_whole(report, "FF", used["FF"]),
        dsp=_whole(report, "DSP", used["DSP"]),
        bram=_whole(report, "BRAM", 2 * used["BRAM"]),  # a tile holds 36 kbit
        notes=f"design state {state}",
    )
    return record if timing is None else _with_timing(record, timing, top)


def check_target(report: Path, record: Resources, part: str, clock_ns: float) -> None:
    """Raise `InvalidInput` for a report that names another part or another clock period, in ns, than a project's."""
    if record.part is not None and canonical_part(record.part) != canonical_part(part):
        raise InvalidInput(f"{report}: for part {record.part}, but the project is for {part}: not its report")
    if record.clock_ns is not None and not math.isclose(record.clock_ns, clock_ns, abs_tol=0.005):
        raise InvalidInput(f"{report}: for {record.clock_ns} ns, but the project is for {clock_ns:g} ns")


# --- HLS estimates


@dataclass(frozen=True, kw_only=True)
class _Estimate:
    """What both forms of a csynth report say; `tool` is None where the form does not."""

    tool: str | None
    version: str
    part: str
    clock_ns: float
    estimated_clock_ns: float
    latency: Range
    interval: Range
    used: dict[str, int]
    available: dict[str, int]


def _csynth_xml(path: Path, top: str) -> _Estimate:
    report = _Text.read(path)
    try:
        root = ET.fromstring(report.text)
    except ET.ParseError as error:
        raise InvalidInput(f"{path}: truncated or damaged: {error}; run the tool again") from error

    def field(name: str) -> str:
        found = root.findall(name)
        if len(found) != 1 or not (found[0].text or "").strip():
            raise report.bad(name)
        return (found[0].text or "").strip()

    def cycles(name: str) -> int | None:
        return report.integer(name, field(f"PerformanceEstimates/SummaryOfOverallLatency/{name}"))

    def count(section: str, kind: str) -> int:
        parent = f"AreaEstimates/{section}"
        if kind == "DSP" and root.find(f"{parent}/DSP48E") is not None:  # Vivado HLS's name
            kind = "DSP48E"
        return report.count(f"{parent}/{kind}", field(f"{parent}/{kind}"))

    report.same("TopModelName", field("UserAssignments/TopModelName"), top)
    for unit, name in (
        ("ns", "UserAssignments/unit"),
        ("ns", "PerformanceEstimates/SummaryOfTimingAnalysis/unit"),
        ("clock cycles", "PerformanceEstimates/SummaryOfOverallLatency/unit"),
    ):
        report.same(name, field(name), unit)
    kinds = ("BRAM_18K", "DSP", "FF", "LUT")
    return _Estimate(
        tool=None,
        version=report.version("ReportVersion/Version", field("ReportVersion/Version")),
        part=field("UserAssignments/Part"),
        clock_ns=report.real("TargetClockPeriod", field("UserAssignments/TargetClockPeriod")),
        estimated_clock_ns=report.real(
            "EstimatedClockPeriod", field("PerformanceEstimates/SummaryOfTimingAnalysis/EstimatedClockPeriod")
        ),
        latency=report.ordered("latency", cycles("Best-caseLatency"), cycles("Worst-caseLatency")),
        interval=report.ordered("interval", cycles("Interval-min"), cycles("Interval-max")),
        used={kind: count("Resources", kind) for kind in kinds},
        available={kind: count("AvailableResources", kind) for kind in kinds},
    )


def _csynth_text(path: Path, top: str) -> _Estimate:
    report = _Text.read(path)
    title = report.match("title", r"== (Vivado|Vitis) HLS Report for '(\w+)'")
    report.same("top function", title[2], top)
    clock = report.row("Timing", [["Clock", "Target", "Estimated", "Uncertainty"]])
    performance = report.row(
        "Latency",
        [
            ["Latency (cycles)", "Latency (absolute)", "Interval", "Pipeline"],
            ["min", "max"] * 3 + ["Type"],
        ],
    )
    cycles = [report.integer("Latency or Interval", performance[i]) for i in (0, 1, 4, 5)]
    used, available = _area(report)
    return _Estimate(
        tool=f"{title[1]} HLS",
        version=report.version("Version", report.one("Version", r"\* Version: +(\S+) .*")),
        part=report.one("Target device", r"\* Target device: +(\S+)"),
        clock_ns=report.nanoseconds("Target", clock[1]),
        estimated_clock_ns=report.nanoseconds("Estimated", clock[2]),
        latency=report.ordered("latency", cycles[0], cycles[1]),
        interval=report.ordered("interval", cycles[2], cycles[3]),
        used=used,
        available=available,
    )


def _area(report: _Text) -> tuple[dict[str, int], dict[str, int]]:
    """Total and available resources, confirmed by the sum of the components and by the percentages."""
    tables = [block for block in report.tables() if block[0][:2] == ["Name", "BRAM_18K"] and len(block[0]) in (5, 6)]
    tables = [block for block in tables if any(row[0] == "Utilization (%)" for row in block)]
    if len(tables) != 1:
        raise report.bad("table of the utilization estimates")
    names, *body = tables[0]
    kinds = ["DSP" if name == "DSP48E" else name for name in names[1:]]
    if kinds[:4] != ["BRAM_18K", "DSP", "FF", "LUT"]:
        raise report.bad("columns BRAM_18K, DSP, FF, LUT")
    rows = {row[0]: row[1:] for row in body}
    if len(rows) != len(body) or any(len(row) != len(names) for row in body):
        raise report.bad("rows of the utilization estimates")
    counts: dict[str, dict[str, int]] = {}
    for name, cells in rows.items():
        if not name.startswith("Utilization"):
            zeros = ["0" if cell == "-" else cell for cell in cells]
            counts[name] = {k: report.count(f"{name}, {k}", c) for k, c in zip(kinds, zeros, strict=True)}
    for name in ("Total", "Available"):
        if name not in counts:
            raise report.bad(f"row {name}")
    total, available = counts.pop("Total"), counts.pop("Available")
    counts.pop("Available SLR", None)
    for kind, percent in zip(kinds, rows["Utilization (%)"], strict=True):
        if total[kind] != sum(component[kind] for component in counts.values()):
            raise report.bad(f"Total of {kind}, which is not the sum of its rows")
        share = 100 * total[kind] / available[kind] if available[kind] else 0.0
        if not (0 < share < 1 if percent == "~0" else abs(share - report.count("Utilization (%)", percent)) < 1):
            raise report.bad(f"Utilization (%) of {kind}, which does not fit Total and Available")
    known = ("BRAM_18K", "DSP", "FF", "LUT")
    return {k: total[k] for k in known}, {k: available[k] for k in known}


# --- Vivado

_SITES = {  # rows of a utilization report; the first two families' names differ
    "LUT": ("CLB LUTs", "Slice LUTs"),
    "FF": ("CLB Registers", "Slice Registers"),
    "DSP": ("DSPs",),
    "BRAM": ("Block RAM Tile",),
}


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The box that opens each report of Vivado."""

    version: str
    part: str

    @classmethod
    def of(cls, report: _Text, command: str, top: str) -> _Header:
        written_by = report.one("Command", r"\| Command *: (\S+).*")
        if written_by != command:
            raise InvalidInput(f"{report.path}: written by {written_by}, not by {command}")
        report.same("Design", report.one("Design", r"\| Design *: (\S+)"), top)
        device = report.one("Device", r"\| Device *: (\S+)")
        return cls(
            version=report.version("Tool Version", report.one("Tool Version", r"\| Tool Version *: Vivado v\.(\S+).*")),
            part=device if device.startswith("xc") else f"xc{device}",
        )


def _stage(report: _Text, state: str) -> str:
    if state not in _STAGES:
        raise InvalidInput(f"{report.path}: Design State {state!r} is neither after synthesis nor after routing")
    return _STAGES[state]


def _used(report: _Text, labels: tuple[str, ...]) -> float:
    """The count of a row; each of its occurrences must give the same and fit its percentage."""
    found: list[float] = []
    for block in report.tables():
        names = block[0]
        if names[:2] != ["Site Type", "Used"] or names[-2:] != ["Available", "Util%"]:
            continue
        for row in block[1:]:
            if row[0].rstrip("*") in labels:
                if len(row) != len(names):
                    raise report.bad(row[0])
                used, available = report.real(row[0], row[1]), report.count(row[0], row[-2])
                share = 100 * used / available if available else 0.0
                percent = row[-1].removeprefix("<")
                fits = 0 < share < 0.01 if percent != row[-1] else abs(share - report.real(row[0], percent)) < 0.00501
                if not fits:
                    raise report.bad(f"Util% of {row[0]}, which does not fit Used and Available")
                found.append(used)
    if not found or len(set(found)) > 1:
        raise report.bad(" or ".join(labels))
    return found[0]


def _with_timing(record: Resources, path: Path, top: str) -> Resources:
    """`record` with the clock that was asked for and the one that timing allows: the period minus the slack."""
    report = _Text.read(path)
    head = _Header.of(report, "report_timing_summary", top)
    if not canonical_part(record.part or "").startswith(canonical_part(head.part)):
        raise InvalidInput(f"{path}: of a {head.part}, but the utilization is of a {record.part}")
    if (stage := _timing_stage(report)) != record.stage:
        raise InvalidInput(f"{path}: timing of stage {stage}, but the utilization is of stage {record.stage}")
    if "There are no user specified timing constraints." in report.text:
        raise InvalidInput(f"{path}: no clock: constrain it by create_clock before Vivado times the design")
    clocks = report.columns("Clock Summary", ["Clock", "Waveform(ns)", "Period(ns)", "Frequency(MHz)"])
    if len(clocks) != 1 or len(clocks[0]) != 4:
        raise report.bad("Clock Summary with one clock")
    name, _, period_ns, megahertz = clocks[0]
    period = report.real("Period(ns)", period_ns)
    if not math.isclose(period * report.real("Frequency(MHz)", megahertz), 1000, rel_tol=1e-3):
        raise report.bad("Period(ns), which does not fit Frequency(MHz)")
    slacks = ["WNS(ns)", "TNS(ns)", "TNS Failing Endpoints", "TNS Total Endpoints"]
    design = report.columns("Design Timing Summary", slacks)
    clock = report.columns("Intra Clock Table", ["Clock", *slacks])
    if len(design) != 1 or len(clock) != 1 or clock[0][0] != name or design[0] != clock[0][1:]:
        raise report.bad("WNS(ns) of the design, which is not the clock's")
    wns, failing = report.real("WNS(ns)", design[0][0]), report.count(slacks[2], design[0][2])
    if (wns < 0) != (failing > 0):
        raise report.bad("WNS(ns), which does not fit TNS Failing Endpoints")
    note = "timing met" if wns >= 0 else "timing not met"
    return replace(record, clock_ns=period, achieved_clock_ns=round(period - wns, 3), notes=_join(record.notes, note))


def _timing_stage(report: _Text) -> str:
    """Stage of a timing summary: its design state, or in versions that do not tell, how its paths are routed."""
    if "| Design State" in report.text:
        return _stage(report, report.one("Design State", r"\| Design State *: (.+)"))
    nets = set(re.findall(r"net \(fo=\d+, (\w+)\)", report.text))
    if "unplaced" in nets:
        return "vsynth"
    if "routed" in nets and "estimated" not in nets:
        return "impl"
    raise report.bad("Design State")


# --- Texts


@dataclass(frozen=True)
class _Text:
    """A report, and the errors that name its file and field."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> _Text:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InvalidInput(f"{path}: no such report: {error.strerror}") from error
        if not text.strip():
            raise InvalidInput(f"{path}: empty: run the tool again")
        return cls(path, text)

    def bad(self, field: str) -> InvalidInput:
        return InvalidInput(
            f"{self.path}: {field} is missing, damaged or not where this version of the parser knows it: "
            "run the tool again, or report its version"
        )

    def same(self, field: str, value: str, expected: str) -> None:
        if value != expected:
            raise InvalidInput(f"{self.path}: {field} is {value!r}, expected {expected!r}: of another project or tool")

    def match(self, field: str, pattern: str) -> re.Match[str]:
        """The only line that matches as a whole, but for spaces around it."""
        found = [m for line in self.text.splitlines() if (m := re.fullmatch(pattern, line.strip()))]
        if len(found) != 1:
            raise self.bad(field)
        return found[0]

    def one(self, field: str, pattern: str) -> str:
        return self.match(field, pattern)[1]

    def version(self, field: str, value: str) -> str:
        if not re.fullmatch(r"\d{4}\.\d(\.\d)?", value):
            raise self.bad(field)
        return value

    def count(self, field: str, value: str) -> int:
        if not re.fullmatch(r"\d+", value):
            raise self.bad(field)
        return int(value)

    def integer(self, field: str, value: str) -> int | None:
        return None if value in _UNKNOWN else self.count(field, value)

    def real(self, field: str, value: str) -> float:
        if not re.fullmatch(r"-?\d+(\.\d+)?", value):
            raise self.bad(field)
        return float(value)

    def nanoseconds(self, field: str, value: str) -> float:
        return self.real(field, value.removesuffix(" ns"))

    def ordered(self, field: str, low: int | None, high: int | None) -> Range:
        if (low is None) != (high is None) or (low or 0) > (high or 0):
            raise self.bad(f"order of the smallest and the largest {field}")
        return low, high

    def tables(self) -> Iterator[list[Cells]]:
        """Blocks of consecutive rows between bars, without the lines that separate them."""
        block: list[Cells] = []
        for line in [*self.text.splitlines(), ""]:
            stripped = line.strip()
            bar = stripped[:1]
            if bar and bar in "|+":
                if stripped.endswith(bar) and set(stripped) - {"+", "-"}:  # else it is cut off or separates rows
                    cells = [cell.strip() for cell in stripped[1:-1].split(bar)]
                    block.append(["" if re.fullmatch("-{2,}", cell) else cell for cell in cells])
            elif block:
                yield block
                block = []

    def row(self, field: str, head: Sequence[Cells]) -> Cells:
        """The only row of the only table with these header rows."""
        tables = [block for block in self.tables() if block[: len(head)] == list(head)]
        if len(tables) != 1 or len(tables[0]) != len(head) + 1 or len(tables[0][-1]) != len(head[-1]):
            raise self.bad(field)
        return tables[0][-1]

    def columns(self, section: str, names: Cells) -> list[Cells]:
        """Rows of a table without bars that follows `section`, as many cells of each as there are names."""
        lines = iter(self.text.splitlines())
        if not any(line.strip() == f"| {section}" for line in lines):
            raise self.bad(section)
        head = next((line for line in lines if line.strip() and not line.startswith(("|", "-"))), "")
        if re.split(r" {2,}", head.strip())[: len(names)] != names or set(next(lines, "x")) - set("- "):
            raise self.bad(f"columns of {section}")
        rows: list[Cells] = []
        for line in lines:
            if not line.strip():
                return rows
            rows.append(re.split(r" {2,}", line.strip())[: len(names)])
        raise self.bad(f"end of {section}")


def _whole(report: _Text, field: str, value: float) -> int:
    if value != int(value):
        raise report.bad(field)
    return int(value)


def _spread(quantity: str, values: Range) -> str:
    low, high = values
    return "" if low == high else f"{quantity} {low} to {high} cycles"


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
