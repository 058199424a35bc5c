"""Tools on a finished run, and the one list of all that is known about its resources. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.report import Resources, merge
from hmq_fpga.deploy.vendor.pack import collect as collect_results
from hmq_fpga.deploy.vendor.pack import pack as pack_project
from hmq_fpga.deploy.vendor.run import Outcome, Vendor, synthesize
from hmq_fpga.ir.network import QNet
from hmq_fpga.study.pages.run_page import write_page
from hmq_fpga.study.run.stages import read_record, write_json

SYNTHESIS = "synth"  # folder of what tools made later, one sub-folder per tool
Said = Callable[[str], None]


def synthesize_by_vendor(
    folder: Path,
    vendor: Vendor,
    *,
    csim: bool,
    cosim: bool,
    vsynth: bool,
    part: str | None,
    clock_ns: float | None,
    time_limit_s: float | None,
    said: Said,
) -> Outcome:
    """Run Vitis or Vivado HLS on a run's project, and keep the figures if all passed."""
    net, project = _parts(folder)
    outcome = synthesize(
        project,
        net,
        folder / SYNTHESIS / vendor,
        vendor=vendor,
        csim=csim,
        cosim=cosim,
        vsynth=vsynth,
        part=part,
        clock_ns=clock_ns,
        time_limit_s=time_limit_s,
        on_step=said,
    )
    return _kept(folder, net, outcome)


def synthesize_by_yosys(folder: Path, *, time_limit_s: float | None) -> list[Resources]:
    """Synthesize a run's Verilog, made first if there is none, and keep the figures."""
    from hmq_fpga.deploy.rtl.project import RtlProject

    read_record(folder)
    net = QNet.load(folder / "qnet")
    rtl = folder / "rtl"
    project = RtlProject.load(net, rtl) if rtl.is_dir() else RtlProject.create(net, rtl)
    records = [project.trace_resources(), project.synthesize(time_limit_s=time_limit_s or 3600)]
    _keep(folder, net, "yosys", records)
    return records


def pack(folder: Path, archive: Path | None, *, part: str | None, clock_ns: float | None) -> Path:
    """Write an archive to run the vendor's tools on another machine; returns its path."""
    net, project = _parts(folder)
    archive = archive or folder / f"{folder.name}.tar.gz"
    pack_project(project, net, archive, part=part, clock_ns=clock_ns)
    return archive


def collect(folder: Path, source: Path | None) -> Outcome:
    """Read what came back from another machine, and keep the figures if all passed."""
    net, _ = _parts(folder)
    outcome = collect_results(net, source or folder / "results.tar.gz", folder / SYNTHESIS / "collected")
    return _kept(folder, net, outcome)


def assemble(folder: Path) -> list[dict[str, Any]]:
    """Write `resources.json`: the run's estimates, and what tools found out about the same network."""
    stages = read_record(folder)["stages"].values()
    records = [resources for stage in stages for resources in stage.get("metrics", {}).get("resources", [])]
    digest = QNet.load(folder / "qnet").digest
    for path in sorted((folder / SYNTHESIS).glob("*.json")):
        found = json.loads(path.read_text())
        if found["qnet"] == digest:
            records = merge(records, found["resources"])
    write_json(folder / "resources.json", records)
    return records


def _parts(folder: Path) -> tuple[QNet, HlsProject]:
    read_record(folder)
    return QNet.load(folder / "qnet"), HlsProject.load(folder / "hls")


def _kept(folder: Path, net: QNet, outcome: Outcome) -> Outcome:
    if outcome.passed:
        _keep(folder, net, outcome.folder.name, list(outcome.records))
    return outcome


def _keep(folder: Path, net: QNet, name: str, records: list[Resources]) -> None:
    (folder / SYNTHESIS).mkdir(exist_ok=True)
    found = {"qnet": net.digest, "resources": [record.to_json() for record in records]}
    write_json(folder / SYNTHESIS / f"{name}.json", found)
    assemble(folder)
    write_page(folder)
