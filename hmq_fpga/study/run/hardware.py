"""Tools on a finished run, and the one list of all that is known about its resources. Needs no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmq_fpga.deploy.backends import HLS, RTL, require_none, require_unchanged
from hmq_fpga.deploy.hls.limits import limits
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.parity import Parity, check
from hmq_fpga.deploy.report import Resources, merge
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.deploy.vendor.pack import collect as collect_results
from hmq_fpga.deploy.vendor.pack import pack as pack_project
from hmq_fpga.deploy.vendor.run import Outcome, Vendor, synthesize
from hmq_fpga.ir.network import QNet
from hmq_fpga.study.pages.run_page import write_page
from hmq_fpga.study.run.config import make_config
from hmq_fpga.study.run.stages import read_record, write_json

if TYPE_CHECKING:
    from hmq_fpga.deploy.board.build import Built
    from hmq_fpga.deploy.board.simulate import Talked
    from hmq_fpga.deploy.rtl.cutoff import Goal
    from hmq_fpga.deploy.rtl.project import RtlProject

NEXTPNR = "nextpnr"
BOARD = "board"  # folder of bitstreams, one sub-folder per board
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
    require_unchanged(net, folder, _settings(folder), [HLS])
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
    net, project = _verilog(folder)
    records = [project.trace_resources(), project.synthesize(time_limit_s=time_limit_s or 3600)]
    _keep(folder, net, "yosys", records)
    return records


def synthesize_by_nextpnr(
    folder: Path,
    device: str | None,
    *,
    clock_ns: float | None,
    tries: int,
    time_limit_s: float | None,
    said: Said,
) -> list[Resources]:
    """Place and route a run's Verilog, made first if there is none, and keep the figures and the routed netlist."""
    from hmq_fpga.deploy.rtl.devices import find_device

    chosen = find_device(device)
    net, project = _verilog(folder)
    routed = project.route(
        _cleared(folder / SYNTHESIS / NEXTPNR),
        chosen,
        clock_ns=clock_ns,
        tries=tries,
        time_limit_s=time_limit_s or 3600,
        on_step=said,
    )
    records = [project.trace_resources(), routed]
    _keep(folder, net, NEXTPNR, records)
    return records


def compare_gates(folder: Path, *, time_limit_s: float | None, said: Said) -> Parity:
    """Compare the netlist that nextpnr left of a run with the golden model, on the test split and on made samples.

    The comparison is kept as `parity.json` beside the netlist.
    """
    from hmq_fpga.deploy.rtl.nextpnr import ROUTED
    from hmq_fpga.deploy.rtl.project import RtlProject
    from hmq_fpga.study.run.pipeline import samples_of

    net, project = _verilog(folder)
    made = folder / SYNTHESIS / NEXTPNR
    if (made / "rtl").is_dir():  # of the best latency cutoff
        project = RtlProject.load(net, made / "rtl")
    said("compiling the routed netlist, and comparing it")
    gates = project.gates(made / ROUTED, made / "gates", time_limit_s=time_limit_s or 3600)
    found = check(net, [gates], samples_of(folder), made=True)
    write_json(made / "parity.json", found.to_json())
    return found


def build_for_board(
    folder: Path,
    board: str,
    *,
    data: Path | None,
    baud: int,
    mhz: float | None,
    gates: int,
    time_limit_s: float | None,
    said: Said,
) -> tuple[Built, Talked | None]:
    """Make the bitstream of a run on a board, and a script that compares the board with the golden model.

    Returns:
        The bitstream, and what the script finds in the placed and routed netlist of it for the first `gates` samples.
    """
    from hmq_fpga.deploy.board.boards import find_board
    from hmq_fpga.deploy.board.build import ROUTED, build
    from hmq_fpga.study.run.pipeline import samples_of

    chosen = find_board(board)
    _, project = _verilog(folder)
    made, built = build(
        project,
        chosen,
        folder / BOARD / board,
        samples_of(folder, data),
        baud=baud,
        mhz=mhz,
        time_limit_s=time_limit_s or 3600,
        on_step=said,
    )
    if not gates:
        return built, None
    said("compiling the routed netlist, and talking to it")
    with made.gates(made.folder / ROUTED, time_limit_s=time_limit_s or 3600) as simulated:
        return built, made.talk(simulated, samples=gates, time_limit_s=time_limit_s or 3600)


def simulate_board(
    folder: Path, board: str, *, data: Path | None, samples: int | None, time_limit_s: float | None, said: Said
) -> Talked:
    """Simulate the whole of a run on a board, and let the script talk to it."""
    from hmq_fpga.deploy.board.boards import find_board
    from hmq_fpga.deploy.board.project import BoardProject
    from hmq_fpga.study.run.pipeline import samples_of

    chosen = find_board(board)
    _, project = _verilog(folder)
    made = BoardProject.create(project, chosen, folder / BOARD / f"{board}-simulated", samples_of(folder, data))
    said("compiling the simulation, and talking to it")
    return made.simulate(samples=samples, time_limit_s=time_limit_s or 3600)


def synthesize_by_nextpnr_at_its_best(
    folder: Path,
    device: str | None,
    *,
    goal: Goal,
    tries: int,
    time_limit_s: float | None,
    said: Said,
) -> tuple[list[Resources], list[dict[str, Any]]]:
    """The same with the latency cutoff that is best for a goal; the run's own Verilog stays as it is.

    Returns:
        The records, and the figures of every cutoff that was tried, which are kept as `cutoffs.json`.
    """
    from hmq_fpga.deploy.rtl.cutoff import find_cutoff
    from hmq_fpga.deploy.rtl.devices import find_device

    chosen = find_device(device)
    net, project = _verilog(folder)
    made = _cleared(folder / SYNTHESIS / NEXTPNR)
    routed, tried = find_cutoff(
        project, made, chosen, goal=goal, tries=tries, time_limit_s=time_limit_s or 3600, on_step=said
    )
    curve = [one.to_json() for one in tried]
    write_json(made / "cutoffs.json", curve)
    records = [project.trace_resources(), routed]
    _keep(folder, net, NEXTPNR, records)
    return records, curve


def pack(folder: Path, archive: Path | None, *, part: str | None, clock_ns: float | None) -> Path:
    """Write an archive to run the vendor's tools on another machine; returns its path."""
    net, project = _parts(folder)
    require_unchanged(net, folder, _settings(folder), [HLS, RTL])
    archive = archive or folder / f"{folder.name}.tar.gz"
    rtl = folder / "rtl"
    pack_project(project, net, archive, rtl=rtl if rtl.is_dir() else None, part=part, clock_ns=clock_ns)
    return archive


def collect(folder: Path, source: Path | None) -> Outcome:
    """Read what came back from another machine, and keep the figures if all passed.

    Raises:
        ParityError: where the run's projects, or the firmware that came back, are not the network's.
    """
    from hmq_fpga.deploy.hls.readback import project_differences

    net, _ = _parts(folder)
    settings = _settings(folder)
    require_unchanged(net, folder, settings, [HLS, RTL])

    def unchanged(returned: Path) -> None:
        if (returned / "firmware").is_dir():  # which scripts of earlier versions kept
            found = project_differences(net, returned, settings, firmware_alone=True)
            require_none(found, returned, "pack the run again, and run its script anew")

    made = folder / SYNTHESIS / "collected"
    return _kept(folder, net, collect_results(net, source or folder / "results.tar.gz", made, unchanged))


def hls_limits(folder: Path) -> list[str]:
    """One line for each thing in a run's hls4ml project that is known to stop HLS."""
    net, project = _parts(folder)
    return limits(net, _settings(folder), project.reuse_factors)


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


def _verilog(folder: Path) -> tuple[QNet, RtlProject]:
    """A run's network and its Verilog, which is checked, or made where there is none."""
    from hmq_fpga.deploy.rtl.project import RtlProject

    read_record(folder)
    net = QNet.load(folder / "qnet")
    rtl, settings = folder / "rtl", _settings(folder)
    require_unchanged(net, folder, settings, [RTL])
    if rtl.is_dir():
        return net, RtlProject.load(net, rtl)
    return net, RtlProject.create(net, rtl, latency_cutoff=settings.latency_cutoff or None)


def _cleared(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _settings(folder: Path) -> Hardware:
    """What a run's back ends were made with."""
    record = read_record(folder)
    return make_config(record["config"]).hardware(record["resolved"]["io_type"])


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
