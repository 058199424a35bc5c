"""The command line: one function per verb.

Exit codes: 0 success, 1 the result falls short, 2 bad input or a missing tool (one line: what, where, the remedy),
3 a tool failed (one line: at what, and where its log is).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from hmq_fpga.deploy.parity import ParityError
from hmq_fpga.deploy.settings import Estimate, Hardware, HlsBackend, IoType, Strategy
from hmq_fpga.deploy.toolchain import ToolFailed
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study import interrupt

if TYPE_CHECKING:
    from hmq_fpga.deploy.vendor.run import Outcome


Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hmq-fpga")
def app() -> None:
    """From a PyTorch model to a bit-exact hls4ml project."""


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
folder = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
backend = click.option("--backend", type=click.Choice(get_args(HlsBackend)), help="hls4ml backend [Vitis].")
device = click.option("--device", metavar="cpu|cuda|cuda:N", help="Where to train and search [cpu].")
normalize = click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Inputs of mean 0 and deviation 1, per feature or channel [no].",
)
parity_samples = click.option("--parity-samples", type=int, help="Test samples that back ends are compared on [all].")
estimate = click.option(
    "--estimate", type=click.Choice(get_args(Estimate)), help="Resources without vendor tools [trace]."
)
route_device = click.option(
    "--route-device", metavar="ecp5-85k|…", help="FPGA that --estimate route places on [ecp5-85k]."
)
drop_dead = click.option(
    "--drop-dead/--no-drop-dead",
    default=None,
    help="Take out channels that no training or validation sample activates [no].",
)
tries = click.option(
    "--tries", type=int, help="Searches, of seeds from --seed on; the best on validation data is kept [1]."
)


def _weights(_context: click.Context, _option: click.Parameter, given: str | None) -> object:
    return given if given is None or given == "balanced" else given.split(",")


_TRAINING = (
    click.option(
        "--label-smoothing", type=float, help="Share of a class's probability spread over all [0.1, of pruned ones 0]."
    ),
    click.option("--input-noise", type=float, help="Of training inputs, in deviations of each [of most tasks 0]."),
    click.option(
        "--class-weights",
        metavar="balanced|W,W,…",
        callback=_weights,
        help="How much the samples of each class count [all the same].",
    ),
    click.option("--loss", metavar="FUNCTION", help="Loss of your own, in FILE.py."),
    click.option("--metric", metavar="FUNCTION", help="Metric of your own, in FILE.py; larger is better."),
    click.option("--optimizer", metavar="FUNCTION", help="Makes the optimizer, of parameters and rate, in FILE.py."),
    click.option("--scheduler", metavar="FUNCTION", help="Makes its schedule, of it and the steps, in FILE.py."),
    click.option(
        "--keep", type=click.Choice(["last", "best"]), help="State that is kept: best on validation data [last]."
    ),
)
_DATA = (
    click.option(
        "--data", type=click.Path(path_type=Path), help="An .npz or .csv file, or a folder of .npz or .npy files."
    ),
    click.option("--target", metavar="COLUMN", help="Column of a .csv that is to be learnt [the last]."),
    click.option(
        "--target-kind", type=click.Choice(["classes", "labels", "values"]), help="What targets are [as they look]."
    ),
    click.option("--workers", type=int, help="Processes that load a torch Dataset [0]."),
)


def training(command: Command) -> Command:
    """Options of how networks are trained."""
    return _with(_TRAINING, command)


def own_data(command: Command) -> Command:
    """Options of what they are trained on."""
    return _with(_DATA, command)


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


io_type = click.option("--io-type", type=click.Choice(get_args(IoType)), help="Style of the project.")


@app.command(epilog="Example: hmq-fpga run digits_mlp --rw 8")
@click.argument("what", metavar="TASK|CONFIG.yaml|FILE.py:FUNCTION")
@click.option("--rw", type=float, help="Target weight compression rate R_w [8].")
@click.option("--weight-bits", type=float, help="Most bits of all weights, beside R_w or in its place.")
@click.option("--bops", type=float, help="Most bit operations for one sample, likewise.")
@click.option("--luts", type=float, help="Most LUTs of the unrolled network by the tracer's figure, likewise.")
@click.option("--ebops", type=float, help="Most effective bit operations for one sample, likewise.")
@click.option("--ra", type=float, help="Target activation memory rate R_a [4].")
@click.option("--max-act-bits", type=int, help="Upper bound on the bit-width of activations [8].")
@click.option("--method", help="Search method: hmq, uniform, hawq, zeroq, msqe, pot_gradient or hgq [hmq].")
@click.option("--zeros", type=float, help="Share of zero weights to aim for, for less logic [off].")
@click.option("--distill/--no-distill", default=None, help="Learn from the float model while fine-tuning too [no].")
@drop_dead
@training
@tries
@click.option("--seed", type=int, help="Seed of everything random [0].")
@device
@own_data
@normalize
@click.option("--keep-final", is_flag=True, default=None, help="A regression's final tanh or sigmoid in hardware, too.")
@click.option("--weights", type=click.Path(path_type=Path), help="State dict of a trained model; no float training.")
@backend
@io_type
@click.option("--part", help="FPGA part of the project.")
@click.option("--clock", "clock_ns", type=float, help="Clock period in ns [5].")
@click.option("--latency-cutoff", type=float, help="Most delay between registers of the Verilog, in ns; 0: none [5].")
@click.option("--reuse-factor", type=int, help="Multiplications per multiplier, in all layers [1].")
@click.option(
    "--strategy",
    type=click.Choice(get_args(Strategy)),
    help="hls4ml's, in all layers [Latency].",
)
@estimate
@route_device
@parity_samples
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.")
@as_json
def run(what: str, as_json: bool, **given: Any) -> int:
    """Do everything: float baseline, search, fine-tuning, QNet, QKeras, hls4ml project, parity, report.

    An interrupted run goes on where it stopped; what is done and unchanged is not repeated. Started by torchrun, as in
    `torchrun --nproc-per-node 2 -m hmq_fpga run TASK --device cuda`, all processes train and the first does the rest.
    """
    from hmq_fpga.study.monitor import Bars, summary
    from hmq_fpga.study.run.config import load_config, make_config, missed
    from hmq_fpga.study.run.pipeline import run as run_all

    settings = {key: value for key, value in given.items() if value is not None}
    is_file = what.endswith((".yaml", ".yml"))
    config = load_config(Path(what), settings) if is_file else make_config({"task": what, **settings})
    with Bars(config.folder / "tensorboard", quiet=not _speaks()) as bars:
        record = run_all(config, bars)
    if not _speaks():
        return 0
    _print(record, as_json, lambda: summary(config.folder, record))
    return 0 if record["metrics"]["parity_passed"] and not missed(record["metrics"]) else 1


@app.command(epilog="Example: hmq-fpga convert hls_projects/digits_mlp/hmq-rw8-seed0 --out my_project")
@click.argument("source", metavar="QNET|RUN|MODEL.keras", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write: new or empty.")
@backend
@io_type
@as_json
def convert(source: Path, out: Path, as_json: bool, **given: Any) -> int:
    """Write the QKeras and QONNX models and the hls4ml project of a QNet, or of a QKeras model; needs no torch."""
    from rich.text import Text

    from hmq_fpga.deploy.convert import convert_folder
    from hmq_fpga.deploy.hls.limits import limits
    from hmq_fpga.deploy.hls.project import HlsProject

    chosen = {key: value for key, value in given.items() if value is not None}
    hardware = Hardware(**chosen, estimate="none")
    net, left_out = convert_folder(source, out, hardware)
    told = limits(net, hardware, HlsProject.load(out / "hls").reuse_factors)
    result = {"out": str(out), "qnet_digest": net.digest, "left_out": left_out, "hls_limits": told}
    wrote = " and ".join(str(path) for path in sorted(out.iterdir()))
    _print(result, as_json, lambda: Text("\n".join([f"wrote {wrote}", *left_out.values(), *told])))
    return 0


@app.command(epilog="Example: hmq-fpga csim hls_projects/digits_mlp/hmq-rw8-seed0 --data mine.npz")
@folder
@click.option("--data", type=click.Path(path_type=Path), help="Compare on x_test of this .npz, not on the run's data.")
@as_json
def csim(folder: Path, data: Path | None, as_json: bool) -> int:
    """Compile a run's project again and compare it with the golden model, value for value."""
    from hmq_fpga.study.monitor import verdict
    from hmq_fpga.study.run.pipeline import compare_again

    parity = compare_again(folder, data)
    _print(parity.to_json(), as_json, lambda: verdict(parity.to_json()))
    return 0 if parity.passed else 1


@app.command(epilog="Example: hmq-fpga audit hls_projects/digits_mlp/hmq-rw8-seed0 --mutants 40 --prove")
@folder
@click.option("--mutants", type=int, default=40, help="Faults to plant, one at a time [40].")
@click.option("--prove", "proofs", is_flag=True, help="Prove the traced program and the Verilog for all inputs, too.")
@click.option("--seed", type=int, default=0, help="Of the choice of faults [0].")
@as_json
def audit(folder: Path, as_json: bool, **given: Any) -> int:
    """Say how many planted faults a run's parity catches, and prove what can be proved.

    Faults are planted in copies of the QKeras model, the firmware and the traced program. One that parity does not
    catch makes no difference for any input, or is a hole.
    """
    from hmq_fpga.study.monitor import audit_table
    from hmq_fpga.study.run.audit import audit_run

    def said(step: str) -> None:
        if sys.stderr.isatty():
            click.echo(step, err=True)

    found = audit_run(folder, said=said, **given)
    _print(found.to_json(), as_json, lambda: audit_table(found.to_json()))
    return 0 if found.passed else 1


class _Lists(click.Command):
    """A command whose repeatable options also take several values at once: `--rw 4 6 8`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat such an option before each of its values."""
        lists = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        spread: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = word if word in lists else None
                spread += [] if option else [word]
            else:
                spread += [option, word] if option else [word]
        return super().parse_args(ctx, spread)


@app.command(cls=_Lists, epilog="Example: hmq-fpga sweep digits_mlp --rw 4 8 12 15.5 --seeds 0 1 2 --jobs 2")
@click.argument("what", metavar="TASK|CONFIG.yaml|FILE.py:FUNCTION")
@click.option("--rw", type=float, multiple=True, help="Targets R_w [4 6 8 10 12 14 15.5].")
@click.option("--weight-bits", type=float, multiple=True, help="Most bits of all weights, beside R_w or in its place.")
@click.option("--bops", type=float, multiple=True, help="Most bit operations for one sample, likewise.")
@click.option("--luts", type=float, multiple=True, help="Most LUTs of the unrolled network, likewise.")
@click.option("--ebops", type=float, multiple=True, help="Most effective bit operations for one sample, likewise.")
@click.option("--ra", type=float, multiple=True, help="Targets R_a [4].")
@click.option("--methods", multiple=True, help="Search methods [hmq].")
@click.option("--seeds", type=int, multiple=True, help="Seeds [0].")
@click.option("--max-act-bits", type=int, help="Upper bound on the bit-width of activations [8].")
@click.option("--zeros", type=float, help="Share of zero weights to aim for, for less logic [off].")
@click.option("--distill/--no-distill", default=None, help="Learn from the float model while fine-tuning too [no].")
@drop_dead
@training
@tries
@device
@own_data
@normalize
@backend
@io_type
@estimate
@route_device
@click.option("--jobs", type=int, default=1, help="Processes of this machine, which share its cores [1].")
@click.option("--cluster", "address", metavar="tcp://…", help="Scheduler of a Dask cluster in their place.")
@parity_samples
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the sweep.")
@as_json
def sweep(what: str, jobs: int, address: str | None, as_json: bool, **given: Any) -> int:
    """Compare across R_w: a grid of runs, one table, the Pareto front, figures and a page.

    The float baseline of a seed is trained once. An interrupted sweep goes on where it stopped, and a run that fails
    does not stop the others.
    """
    from hmq_fpga.study.run.config import missed
    from hmq_fpga.study.sweep.grid import load_sweep, make_sweep
    from hmq_fpga.study.sweep.grid import sweep as sweep_all
    from hmq_fpga.study.sweep.view import SweepView, sweep_summary

    if _processes() > 1:
        raise InvalidInput("sweep: torchrun is for the processes of one run; give --jobs for several runs at a time")
    settings = {key: value for key, value in given.items() if value not in (None, ())}
    is_file = what.endswith((".yaml", ".yml"))
    config = load_sweep(Path(what), settings) if is_file else make_sweep({"task": what, **settings})
    with SweepView() as view:
        rows = sweep_all(config, jobs=jobs, address=address, monitor=view)
    _print(rows, as_json, lambda: sweep_summary(config.folder, rows))
    return 0 if all(row["parity_passed"] and not missed(row) for row in rows) else 1


@app.command(
    epilog="Example: hmq-fpga diff hls_projects/digits_mlp/hmq-rw8-seed0 hls_projects/digits_mlp/hmq-rw12-seed0"
)
@click.argument("a", metavar="RUN_A", type=click.Path(path_type=Path))
@click.argument("b", metavar="RUN_B", type=click.Path(path_type=Path))
@as_json
def diff(a: Path, b: Path, as_json: bool) -> int:
    """Say what changed from one run to another: settings, accuracy, formats, resources, layer by layer."""
    from hmq_fpga.study.run.diff import diff as compare_runs
    from hmq_fpga.study.run.diff import diff_tables

    found = compare_runs(a, b)
    _print(found, as_json, lambda: diff_tables(found))
    return 0


part = click.option("--part", help="FPGA part instead of the project's.")
clock = click.option("--clock", "clock_ns", type=float, help="Clock period in ns instead of the project's.")
AUTO = "auto"


def _clock(_context: click.Context, _option: click.Parameter, given: str | None) -> float | str | None:
    try:
        return given if given is None or given == AUTO else float(given)
    except ValueError as error:
        raise InvalidInput(f"--clock {given}: give a period in ns, or {AUTO}") from error


VENDORS, OPEN = ("vitis", "vivado"), ("yosys", "nextpnr")
_FOR_TOOLS = {  # options of `synth`, and the tools that take them
    "csim": VENDORS,
    "cosim": VENDORS,
    "vsynth": VENDORS,
    "part": VENDORS,
    "clock_ns": (*VENDORS, "nextpnr"),
    "device": ("nextpnr",),
    "tries": ("nextpnr",),
    "goal": ("nextpnr",),
    "gates": ("nextpnr",),
}


@app.command(epilog="Example: hmq-fpga synth hls_projects/digits_mlp/hmq-rw8-seed0 --tool vitis --csim --cosim")
@folder
@click.option("--tool", type=click.Choice([*VENDORS, *OPEN]), required=True, help="Whose synthesis.")
@click.option("--csim", is_flag=True, help="Simulate the C++ first and compare.")
@click.option("--cosim", is_flag=True, help="Simulate the generated Verilog and compare.")
@click.option("--vsynth", is_flag=True, help="Synthesize the generated Verilog by Vivado.")
@part
@click.option(
    "--clock",
    "clock_ns",
    metavar="NS|auto",
    callback=_clock,
    help="Clock period instead of the project's; auto: by nextpnr, the latency cutoff that is best for --goal.",
)
@click.option("--goal", type=click.Choice(["latency", "fmax"]), help="What --clock auto looks for [latency].")
@click.option("--device", metavar="ecp5-85k|…", help="What nextpnr places on; a wrong one is told all [ecp5-85k].")
@click.option("--tries", type=int, help="Placements by nextpnr, of which the fastest is kept [1].")
@click.option("--gates", is_flag=True, help="Simulate nextpnr's routed netlist and compare, cell by cell.")
@click.option("--time-limit", "time_limit_s", type=float, help="Seconds after which to stop a tool.")
@as_json
def synth(folder: Path, tool: str, as_json: bool, **given: Any) -> int:
    """Run a synthesis tool on a run, and read its reports into `resources.json`."""
    from rich.console import Group

    from hmq_fpga.study.monitor import synthesized, verdict
    from hmq_fpga.study.run import hardware

    for name, tools in _FOR_TOOLS.items():
        if given[name] and tool not in tools:
            option = name.removesuffix("_ns")
            raise InvalidInput(f"--{option}: is for --tool {' or '.join(tools)}, not for {tool}")

    def said(step: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"{tool}: {step}", err=True)

    device, tries, goal, gates = (given.pop(name) for name in ("device", "tries", "goal", "gates"))
    tries = 1 if tries is None else tries
    clock_ns, limit = given["clock_ns"], given["time_limit_s"]
    if goal and clock_ns != AUTO:
        raise InvalidInput("--goal: is for --clock auto")
    if clock_ns == AUTO and tool != "nextpnr":
        raise InvalidInput("--clock auto: is for --tool nextpnr")
    if tool in VENDORS:
        for line in hardware.hls_limits(folder):
            click.echo(line, err=True)
        return _report(hardware.synthesize_by_vendor(folder, tool, said=said, **given), as_json)  # type: ignore[arg-type]
    curve: list[dict[str, Any]] = []
    if tool == "yosys":
        records = hardware.synthesize_by_yosys(folder, time_limit_s=limit)
    elif clock_ns == AUTO:
        records, curve = hardware.synthesize_by_nextpnr_at_its_best(
            folder, device, goal=goal or "latency", tries=tries, time_limit_s=limit, said=said
        )
    else:
        records = hardware.synthesize_by_nextpnr(
            folder, device, clock_ns=clock_ns, tries=tries, time_limit_s=limit, said=said
        )
    found = [record.to_json() for record in records]
    if not gates:
        _print(found, as_json, lambda: synthesized(found, curve))
        return 0
    parity = hardware.compare_gates(folder, time_limit_s=limit, said=said)
    both = {"resources": found, "parity": parity.to_json()}
    _print(both, as_json, lambda: Group(synthesized(found, curve), verdict(parity.to_json())))
    return 0 if parity.passed else 1


@app.command(epilog="Example: hmq-fpga board hls_projects/digits_mlp/hmq-rw8-seed0 --board ulx3s-85f")
@folder
@click.option("--board", metavar="ulx3s-85f|…", required=True, help="Which; a wrong one is told all.")
@click.option("--simulate", is_flag=True, help="Simulate the board with its host script, and make no bitstream.")
@click.option("--samples", type=click.IntRange(min=1), help="Test samples of the simulation [all].")
@click.option("--data", type=click.Path(path_type=Path), help="Send x_test of this .npz, not the run's data.")
@click.option("--baud", type=click.IntRange(min=1), help="Of the serial line [115200].")
@click.option("--mhz", type=float, help="Highest clock of the network, by a PLL [the oscillator's].")
@click.option(
    "--gates", metavar="N", type=click.IntRange(min=1), help="Simulate the routed netlist with N samples, too [0]."
)
@click.option("--time-limit", "time_limit_s", type=float, help="Seconds after which to stop a tool.")
@as_json
def board(folder: Path, board: str, simulate: bool, as_json: bool, **given: Any) -> int:
    """Put a run on a board: a bitstream with a serial line, and a script that compares it with the golden model."""
    from rich.markup import escape

    from hmq_fpga.study.run import hardware

    def said(step: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"{board}: {step}", err=True)

    samples, baud, mhz, gates = (given.pop(key) for key in ("samples", "baud", "mhz", "gates"))
    if simulate:
        if baud or mhz or gates:
            raise InvalidInput("--baud, --mhz and --gates are for bitstreams, not for --simulate")
        talked = hardware.simulate_board(folder, board, samples=samples, said=said, **given)
        _print(talked.to_json(), as_json, lambda: str(talked))
        return 0 if talked.mismatches == 0 else 1
    if samples is not None:
        raise InvalidInput("--samples is for --simulate; the script beside the bitstream has an option of its own")
    built, routed = hardware.build_for_board(
        folder, board, baud=baud or 115_200, mhz=mhz, gates=gates or 0, said=said, **given
    )
    used = ", ".join(f"{n:,} of {there:,} {kind}" for kind, (n, there) in built.used.items())
    lines = [
        f"{built.clock_mhz:g} MHz (up to {built.fmax_mhz:g} after routing), {built.latency_cycles} cycles; {used}",
        f"load it: {built.load}",
        f"compare: python {Path(built.bitstream).parent / 'host.py'} PORT, at {built.line}",
        *([f"the routed netlist: {routed}"] if routed else []),
    ]
    found = built.to_json() | ({"gates": routed.to_json()} if routed else {})
    _print(found, as_json, lambda: escape("\n".join(lines)))
    return 0 if routed is None or routed.mismatches == 0 else 1


@app.command(epilog="Example: hmq-fpga pack hls_projects/digits_mlp/hmq-rw8-seed0")
@folder
@click.option("--out", type=click.Path(path_type=Path), help="Archive to write [RUN/<name>.tar.gz].")
@part
@clock
def pack(folder: Path, out: Path | None, part: str | None, clock_ns: float | None) -> int:
    """Write a self-contained archive to run the vendor's tools on another machine: HLS, and Vivado on the Verilog."""
    from hmq_fpga.study.run import hardware

    archive = hardware.pack(folder, out, part=part, clock_ns=clock_ns)
    wrote = f"wrote {archive}: unpack it there, run its script, and collect what it leaves"
    _print(None, False, lambda: "\n".join([wrote, *hardware.hls_limits(folder)]))
    return 0


@app.command(epilog="Example: hmq-fpga collect hls_projects/digits_mlp/hmq-rw8-seed0 --from results.tar.gz")
@folder
@click.option("--from", "source", type=click.Path(path_type=Path), help="Archive or folder [RUN/results.tar.gz].")
@as_json
def collect(folder: Path, source: Path | None, as_json: bool) -> int:
    """Read reports that the vendor's tools made elsewhere; they must be of this run's network."""
    from hmq_fpga.study.run import hardware

    return _report(hardware.collect(folder, source), as_json)


def _report(outcome: Outcome, as_json: bool) -> int:
    """Print what vendor tools made of a project; the exit code."""
    from hmq_fpga.study.monitor import resources_table

    _print(outcome.to_json(), as_json, lambda: resources_table([r.to_json() for r in outcome.records]))
    for failure in outcome.failures:
        _fail(failure, 1)
    return 0 if outcome.passed else 1


@app.command(epilog="Example: hmq-fpga report hls_projects/digits_mlp/hmq-rw8-seed0")
@click.argument("folder", metavar="RUN|SWEEP", type=click.Path(path_type=Path))
def report(folder: Path) -> int:
    """Rebuild the report page of a run, or table, figures and page of a sweep, from the stored JSON."""
    from hmq_fpga.study.sweep import table

    if table.is_sweep(folder):
        from hmq_fpga.study.pages.sweep_page import write_sweep_page

        table.write_table(folder)
        write_sweep_page(folder)
    else:
        from hmq_fpga.study.pages.run_page import write_page
        from hmq_fpga.study.run.stages import read_record

        read_record(folder)
        write_page(folder)
    _print(None, False, lambda: f"wrote {folder / 'report.html'}")
    return 0


@app.command(epilog="Example: hmq-fpga tasks --json")
@as_json
def tasks(as_json: bool) -> int:
    """List what can be run."""
    from hmq_fpga.study.monitor import table
    from hmq_fpga.study.tasks import TASKS

    listing = {name: task.summary for name, task in TASKS.items()}
    _print(listing, as_json, lambda: table(("task", "what it is"), listing.items()))
    return 0


@app.command(epilog="Example: hmq-fpga layers")
@as_json
def layers(as_json: bool) -> int:
    """List what becomes of PyTorch's operations, by the names that torch.export has for them."""
    from hmq_fpga.search.reading import supported
    from hmq_fpga.study.monitor import table

    listing = supported()
    _print(listing, as_json, lambda: table(("operation", "becomes"), listing.items()))
    return 0


@app.command(epilog="Example: hmq-fpga doctor")
@as_json
def doctor(as_json: bool) -> int:
    """Say what is installed, what each missing tool would enable and how to get it."""
    from rich.markup import escape

    from hmq_fpga.deploy.doctor import examine
    from hmq_fpga.study.monitor import table

    findings = examine()
    rows = [(f.name, f.found or "missing", f.purpose, "" if f.found else escape(f.remedy)) for f in findings]
    header = ("tool", "found", "needed to", "how to get it")
    _print([f.to_json() for f in findings], as_json, lambda: table(header, rows))
    return 0


def _print(result: Mapping[str, Any] | list[Any] | None, as_json: bool, text: Callable[[], Any]) -> None:
    """The result on standard output: JSON, or what `text` makes for people."""
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
    if console.is_terminal:
        console.print(text())
        return
    with console.capture() as printed:  # a file's lines are neither wrapped nor filled up with spaces
        console.print(text())
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def main() -> None:
    """Run the command line and exit."""
    sys.unraisablehook = interrupt.lost
    signal.signal(signal.SIGTERM, interrupt.stop)  # a tool that was started ends with us
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, interrupt.stop)
    try:
        code = app(standalone_mode=False)
    except InvalidInput as error:
        code = _fail(str(error), 2)
    except FloatingPointError as error:
        code = _fail(str(error), 2)
    except ParityError as error:
        code = _fail(str(error), 1)
    except ToolFailed as error:
        code = _fail(str(error), 3)
    except click.ClickException as error:
        code = _fail(f"{error.format_message()} (see --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted; the same command goes on where it stopped", 130)
    sys.exit(code or 0)


def _processes() -> int:
    """How many of us `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _speaks() -> bool:
    """Whether this is the one of them that reports."""
    return _processes() == 1 or os.environ["RANK"] == "0"


def _fail(message: str, code: int) -> int:
    if _speaks():
        click.echo(f"hmq-fpga: {' '.join(message.split())}", err=True)
    return code
