"""Reports as Vivado HLS, Vitis HLS and Vivado lay them out, with given figures: fixtures, and the stand-in's output."""

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["Vivado", "Vitis"]
KINDS = ("BRAM_18K", "DSP", "FF", "LUT", "URAM")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a report says; counts by resource in the order of `KINDS`."""

    family: Family = "Vitis"
    version: str = "2024.1"
    top: str = "myproject"
    part: str = "xcvu13p-flga2577-2-e"
    clock_ns: float = 5.0
    estimated_ns: float = 3.649
    latency: tuple[int | None, int | None] = (11, 11)
    interval: tuple[int | None, int | None] = (1, 1)
    components: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "Expression": (0, 0, 0, 32, 0),
            "FIFO": (2, 0, 103, 140, 0),
            "Instance": (4, 73, 7944, 8551, 0),
            "Register": (0, 0, 6, 0, 0),
        }
    )
    available: tuple[int, ...] = (5376, 12288, 3456000, 1728000, 1280)
    status: str = "Pass"

    @property
    def total(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*self.components.values(), strict=True)))


def csynth_xml(f: Figures) -> str:
    dsp = {"Vivado": "DSP48E", "Vitis": "DSP"}[f.family]
    kinds = ["BRAM_18K", dsp, "FF", "LUT", "URAM"]
    undef = ["undef" if v is None else v for v in (*f.latency, *f.interval)]

    def counts(values: tuple[int, ...]) -> str:
        return "\n".join(f"<{kind}>{value}</{kind}>" for kind, value in zip(kinds, values, strict=True))

    return f"""<profile>

<ReportVersion>
<Version>{f.version}</Version>
</ReportVersion>

<UserAssignments>
<unit>ns</unit>
<ProductFamily>virtexuplus</ProductFamily>
<Part>{f.part}</Part>
<TopModelName>{f.top}</TopModelName>
<TargetClockPeriod>{f.clock_ns:.2f}</TargetClockPeriod>
<ClockUncertainty>1.35</ClockUncertainty>
</UserAssignments>

<PerformanceEstimates>
<PipelineType>dataflow</PipelineType>
<SummaryOfTimingAnalysis>
<unit>ns</unit>
<EstimatedClockPeriod>{f.estimated_ns:.3f}</EstimatedClockPeriod>
</SummaryOfTimingAnalysis>
<SummaryOfOverallLatency>
<unit>clock cycles</unit>
<Best-caseLatency>{undef[0]}</Best-caseLatency>
<Worst-caseLatency>{undef[1]}</Worst-caseLatency>
<Interval-min>{undef[2]}</Interval-min>
<Interval-max>{undef[3]}</Interval-max>
</SummaryOfOverallLatency>
</PerformanceEstimates>

<AreaEstimates>
<Resources>
{counts(f.total)}
</Resources>
<AvailableResources>
{counts(f.available)}
</AvailableResources>
</AreaEstimates>

<InterfaceSummary>
<RtlPorts>
<name>ap_clk</name>
<Bits>1</Bits>
</RtlPorts>
</InterfaceSummary>

</profile>
"""


def csynth_text(f: Figures) -> str:
    vivado = f.family == "Vivado"
    ns = " ns " if vivado else " ns"
    low, high, interval_low, interval_high = ("?" if v is None else v for v in (*f.latency, *f.interval))

    def row(name: str, cells: tuple[int | str, ...], indent: str = "") -> str:
        return f"{indent}|{name:<17}|" + "|".join(f"{cell:>9}" for cell in cells) + "|"

    def line(cells: int) -> str:
        return "+-----------------+" + "+".join(["-" * 9] * cells) + "+"

    parts = [row(name, tuple(c or "-" for c in cells)) for name, cells in f.components.items()]
    shares = [100 * used / total if total else 0 for used, total in zip(f.total, f.available, strict=True)]
    percents = tuple("~0" if 0 < share < 1 else int(share) for share in shares)
    return f"""

================================================================
== {f.family} HLS Report for '{f.top}'
================================================================
* Date:           Wed May  6 12:33:09 2026

* Version:        {f.version} (Build 3854077 on May  4 2023)
* Project:        {f.top}_prj
* Solution:       solution1
* Product family: virtexuplus
* Target device:  {f.part}


================================================================
== Performance Estimates
================================================================
+ Timing:\x20
    * Summary:\x20
    +--------+---------+----------+------------+
    |  Clock |  Target | Estimated| Uncertainty|
    +--------+---------+----------+------------+
    |ap_clk  | {f.clock_ns:.2f}{ns}| {f.estimated_ns:.3f}{ns}|   1.35{ns}|
    +--------+---------+----------+------------+

+ Latency:\x20
    * Summary:\x20
    +---------+---------+----------+----------+-----+-----+----------+
    |  Latency (cycles) |  Latency (absolute) |  Interval | Pipeline |
    |   min   |   max   |    min   |    max   | min | max |   Type   |
    +---------+---------+----------+----------+-----+-----+----------+
    |{low:>9}|{high:>9}|  3.475 us|  3.475 us|{interval_low:>5}|{interval_high:>5}|  dataflow|
    +---------+---------+----------+----------+-----+-----+----------+

    + Detail:\x20
        * Instance:\x20
        +--------+--------+---------+---------+----------+----------+-----+-----+---------+
        |        |        |  Latency (cycles) |  Latency (absolute) |  Interval | Pipeline|
        |Instance| Module |   min   |   max   |    min   |    max   | min | max |   Type  |
        +--------+--------+---------+---------+----------+----------+-----+-----+---------+
        |dense_U0|dense_s |        7|        7| 35.000 ns| 35.000 ns|    7|    7|       no|
        |relu_U0 |relu_s  |        2|        2| 10.000 ns| 10.000 ns|    1|    1|       no|
        +--------+--------+---------+---------+----------+----------+-----+-----+---------+

        * Loop:\x20
        N/A



================================================================
== Utilization Estimates
================================================================
* Summary:\x20
{line(5)}
{row("       Name", ("BRAM_18K", "DSP48E" if vivado else "DSP", "FF", "LUT", "URAM"))}
{line(5)}
{chr(10).join(parts)}
{line(5)}
{row("Total", f.total)}
{line(5)}
{row("Available", f.available)}
{line(5)}
{row("Utilization (%)", percents)}
{line(5)}

+ Detail:\x20
    * Instance:\x20
    {line(6)}
{row("Instance", ("Module", "BRAM_18K", "DSP", "FF", "LUT", "URAM"), "    ")}
    {line(6)}
{row("dense_U0", ("dense_s", 4, 73, 7860, 2134, 0), "    ")}
    {line(6)}
{row("Total", ("", 4, 73, 7860, 2134, 0), "    ")}
    {line(6)}

    * Register:\x20
    {line(4)}
{row("Name", ("FF", "LUT", "Bits", "Const Bits"), "    ")}
    {line(4)}
{row("ap_done_reg", (1, 0, 1, 0), "    ")}
    {line(4)}
{row("Total", (6, 0, 6, 0), "    ")}
    {line(4)}
"""


def cosim_text(f: Figures) -> str:
    unit = "" if f.family == "Vivado" else "(Clock Cycles)"
    total = f.version >= "2023.1"

    def row(name: str, status: str, cells: list[object]) -> str:
        return f"|{name:>10}|{status:>10}|" + "|".join(f"{cell:>15}" for cell in cells) + "|"

    measured: list[object] = ["NA"] * 6
    if f.status == "Pass":
        measured = [
            "NA" if v is None else v
            for low, high in (f.latency, f.interval)
            for v in (low, None if low is None or high is None else (low + high) // 2, high)
        ]
    head = [
        f"|          |          |{'Latency' + unit:^47}|{'Interval' + unit:^47}|" + " Total Execution Time |" * total,
        "+   RTL    +  Status  +" + ("-" * 47 + "+") * 2 + "    (Clock Cycles)    +" * total,
        f"|          |          |{'|'.join(f'{c:^15}' for c in ['min', 'avg', 'max'] * 2)}|" + f"{'':22}|" * total,
    ]
    rule = "+----------+----------+" + ("-" * 47 + "+") * 2 + ("-" * 22 + "+") * total
    return "\n".join(
        [
            "",
            "Report time       : Wed May  6 12:33:41 PM EDT 2026.",
            "Solution          : solution1.",
            "",
            rule,
            *head,
            rule,
            row("VHDL", "NA", ["NA"] * (6 + total)),
            row("Verilog", f.status, [*measured, *["NA" if f.status != "Pass" else 1024] * total]),
            rule,
            "",
        ]
    )


def _box(command: str, f: Figures, state: str | None) -> str:
    rule = "-" * 100
    return "\n".join(
        [
            "Copyright 1986-2022 Xilinx, Inc. All Rights Reserved.",
            rule,
            f"| Tool Version : Vivado v.{f.version} (lin64) Build 5076996 Wed May 22 18:36:09 MDT 2024",
            "| Date         : Wed Mar 18 13:59:15 2026",
            "| Host         : host running 64-bit Ubuntu 22.04.5 LTS",
            f"| Command      : {command} -file {command}.rpt",
            f"| Design       : {f.top}",
            f"| Device       : {f.part}",
            *([] if state is None else [f"| Design State : {state}"]),
            rule,
            "",
        ]
    )


def utilization_text(f: Figures, state: str = "Optimized", *, slice_names: bool = False) -> str:
    """`report_utilization`; BRAM in tiles of two."""
    bram, dsp, ff, lut, _ = f.total
    bram_total, dsp_total, ff_total, lut_total, _ = f.available
    kind = "Slice" if slice_names else "CLB"
    rule = "+-------------------------+--------+-------+-----------+--------+"

    def row(name: str, used: float, total: int) -> str:
        share = 100 * used / total if total else 0
        percent = "<0.01" if 0 < share < 0.01 else f"{share:.2f}"
        return f"| {name:<23} | {used:>6} |     0 | {total:>9} | {percent:>6} |"

    def table(number: int, title: str, rows: list[str]) -> str:
        head = "|        Site Type        |  Used  | Fixed | Available |  Util% |"
        return "\n".join([f"{number}. {title}", "-" * 20, "", rule, head, rule, *rows, rule, "", ""])

    return "\n".join(
        [
            _box("report_utilization", f, state),
            "Utilization Design Information",
            "",
            "Table of Contents",
            "-----------------",
            f"1. {kind} Logic",
            "2. BLOCKRAM",
            "3. ARITHMETIC",
            "4. Primitives",
            "",
            table(
                1,
                f"{kind} Logic",
                [
                    row(f"{kind} LUTs*", lut, lut_total),
                    row("  LUT as Logic", lut, lut_total),
                    row("  LUT as Memory", 0, lut_total // 2),
                    row(f"{kind} Registers", ff, ff_total),
                    row("  Register as Flip Flop", ff, ff_total),
                    row("F7 Muxes", 3, lut_total // 2),
                ],
            ),
            table(
                2,
                "BLOCKRAM",
                [
                    row("Block RAM Tile", bram // 2 if bram % 2 == 0 else bram / 2, bram_total // 2),
                    row("  RAMB18", bram, bram_total),
                ],
            ),
            table(3, "ARITHMETIC", [row("DSPs", dsp, dsp_total), row("  DSP48E2 only", dsp, dsp_total)]),
            "4. Primitives",
            "-------------",
            "",
            "+----------+------+---------------------+",
            "| Ref Name | Used | Functional Category |",
            "+----------+------+---------------------+",
            f"| FDRE     | {ff} |            Register |",
            f"| LUT3     | {lut} |                 CLB |",
            "+----------+------+---------------------+",
            "",
        ]
    )


def timing_text(f: Figures, wns_ns: float, state: str | None = "Routed", nets: str = "routed") -> str:
    """`report_timing_summary` of a design with one clock."""
    names = ["WNS(ns)", "TNS(ns)", "TNS Failing Endpoints", "TNS Total Endpoints", "WHS(ns)", "THS(ns)"]
    failing = 4 if wns_ns < 0 else 0
    values = [f"{wns_ns:.3f}", f"{min(wns_ns, 0) * failing:.3f}", f"{failing}", "7391", "0.041", "0.000"]
    rule = "-" * 96

    def section(title: str) -> list[str]:
        return [rule, f"| {title}", f"| {'-' * len(title)}", rule, ""]

    def table(indent: str, names: list[str], rows: list[list[str]]) -> list[str]:
        widths = [len(name) for name in names]
        lines = [names, ["-" * width for width in widths], *rows]
        aligned = ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in lines]
        return [*(indent + line for line in aligned), "", ""]

    half = f"{{0.000 {f.clock_ns / 2:.3f}}}"
    verdict = "Timing constraints are not met." if failing else "All user specified timing constraints are met."
    clock = ["Clock ", "Waveform(ns) ", "Period(ns)", "Frequency(MHz)"]
    return "\n".join(
        [
            _box("report_timing_summary", f, state),
            "Timing Summary Report",
            "",
            *section("Design Timing Summary"),
            *table("    ", names, [values]),
            verdict,
            "",
            "",
            *section("Clock Summary"),
            *table("", clock, [["ap_clk", half, f"{f.clock_ns:.3f}", f"{1000 / f.clock_ns:.3f}"]]),
            *section("Intra Clock Table"),
            *table("", ["Clock ", *names], [["ap_clk", *values]]),
            *section("Inter Clock Table"),
            *table("", ["From Clock", "To Clock", *names], []),
            *section("Timing Details"),
            "From Clock:  ap_clk",
            "  To Clock:  ap_clk",
            "",
            f"                         net (fo=70, {nets})        0.254     0.347    layer2/sum",
            f"                         net (fo=1, {nets})         0.025     0.550    layer2/carry",
            "",
        ]
    )
