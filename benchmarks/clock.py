"""The clock that a network reaches after routing, and its latency in ns, over the tracer's latency cutoff.

    python benchmarks/clock.py

Each network is made once, by `hmq-fpga run` in `build/clock`; its traced program is written with every cutoff, and each
of these is placed and routed by nextpnr. Rows are kept in `clock.json`; those already there are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from common import Row, fill

from hmq_fpga.deploy.rtl.cutoff import CUTOFFS
from hmq_fpga.deploy.rtl.devices import find_device
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir.network import QNet
from hmq_fpga.study.run.config import make_config
from hmq_fpga.study.run.pipeline import run

NETWORKS = {  # what `hmq-fpga run` is told
    "pendigits_shallow --luts 1700": {"task": "pendigits_shallow", "luts": 1700},
    "pendigits_shallow --luts 4000": {"task": "pendigits_shallow", "luts": 4000},
    "magic_mlp --luts 2500": {"task": "magic_mlp", "luts": 2500},
}
DEVICE = "ecp5-25k"
HERE = Path(__file__).parent


def main() -> None:
    """Fill the table, and write it and the figure beside the rows."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    wanted = ({"network": name, "device": DEVICE, "cutoff": cutoff} for name in NETWORKS for cutoff in CUTOFFS)
    rows = fill(HERE / "clock.json", wanted, partial(measure, runs=Path("build/clock")))
    (HERE / "clock.md").write_text(page(rows))
    _draw(rows, HERE / "clock.svg")


def measure(*, network: str, device: str, cutoff: float, runs: Path) -> Row:
    """One network placed and routed with one cutoff."""
    folder = runs / network.replace(" --", "-").replace(" ", "")
    if not (folder / "report.html").exists():
        run(make_config({**NETWORKS[network], "out": folder}))
    traced = RtlProject.load(QNet.load(folder / "qnet"), folder / "rtl")
    with tempfile.TemporaryDirectory() as scratch:
        project = traced.written_again(Path(scratch) / "rtl", latency_cutoff=cutoff)
        started = time.perf_counter()
        found = project.route(Path(scratch) / "route", find_device(device))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "traced_luts": project.lut,
        "cycles": found.latency_cycles,
        "lut": found.lut,
        "ff": found.ff,
        "carry": found.carry,
        "fmax_mhz": found.fmax_mhz,
        "latency_ns": found.latency_ns,
        "logic_ns": found.critical_path["logic_ns"] if found.critical_path else None,
        "routing_ns": found.critical_path["routing_ns"] if found.critical_path else None,
    }


def page(rows: list[Row]) -> str:
    """The best of each network, and all rows."""
    lines = [
        "# Clock and latency over the latency cutoff",
        "",
        "![Fmax and latency against the cutoff](clock.svg)",
        "",
        f"Placed on {DEVICE} (LFE5U-25F, speed grade 6) without pads for the data, one placement each. A cutoff is",
        "the most delay between two registers in the tracer's own model, 5 ns by default; LUT are those in use, two of",
        "each carry cell among them; s are seconds of synthesis, placement and routing on two cores with other work.",
        "Made by `python benchmarks/clock.py`; the numbers are also in `clock.json`. One seed of training.",
        "",
        "| network | alkaid LUT | cutoff 5: MHz, ns | least latency: cutoff, MHz, ns | highest clock: the same |",
        "|---|---|---|---|---|",
    ]
    for network, group in _by_network(rows):
        usual = next(row for row in group if row["cutoff"] == 5)
        least = min(group, key=lambda row: row["latency_ns"])
        fastest = max(group, key=lambda row: row["fmax_mhz"])
        told = [f"{row['cutoff']:g}, {row['fmax_mhz']:.0f}, {row['latency_ns']:.0f}" for row in (least, fastest)]
        lines.append(
            f"| {network} | {usual['traced_luts']:,} | {usual['fmax_mhz']:.0f}, {usual['latency_ns']:.0f} "
            f"| {told[0]} | {told[1]} |"
        )
    lines += [
        "",
        "## All placements",
        "",
        "| network | cutoff | cycles | LUT | carry | FF | MHz | latency, ns | worst path: logic, routing, ns | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']} | {row['cutoff']:g} | {row['cycles']} | {row['lut']:,} | {row['carry']:,} | {row['ff']:,} "
        f"| {row['fmax_mhz']:.1f} | {row['latency_ns']:.1f} | {row['logic_ns']:.1f}, {row['routing_ns']:.1f} "
        f"| {row['seconds']:.0f} |"
        for _, group in _by_network(rows)
        for row in group
    ]
    return "\n".join(lines) + "\n"


def _by_network(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    order = list(NETWORKS)
    ordered = sorted(rows, key=lambda row: (order.index(row["network"]), row["cutoff"]))
    return ((network, list(group)) for network, group in groupby(ordered, key=lambda row: row["network"]))


def _draw(rows: list[Row], path: Path) -> None:
    """Fmax and latency against the cutoff, a line a network."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "clock", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(6.8, 3.1), layout="constrained")
        for axes, (key, label) in zip(
            figure.subplots(1, 2), {"fmax_mhz": "Fmax, MHz", "latency_ns": "latency, ns"}.items(), strict=True
        ):
            for network, group in _by_network(rows):
                axes.plot([r["cutoff"] for r in group], [r[key] for r in group], "o-", ms=4, lw=1, label=network)
            axes.set(xscale="log", xlabel="latency cutoff, ns of the tracer's model", ylabel=label, ylim=(0, None))
            axes.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
            axes.minorticks_off()
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
