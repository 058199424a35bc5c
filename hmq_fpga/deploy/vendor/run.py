"""Vivado HLS, Vitis HLS and Vivado on an hls4ml project, by the scripts that hls4ml wrote into it.

The tools run in a copy of the project, so the project stays as it was generated and the copy of the last run that
passed stays until another one passes. hls4ml's test bench accepts any output and its scripts may end with exit code 0
after a failed cosimulation: what counts here are the reports, and outputs that equal the golden model's.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.parity import Parity, ParityError, check
from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.toolchain import VITIS_HLS, VITIS_RUN, VIVADO, VIVADO_HLS, Tool, ToolFailed, ToolMissing, run
from hmq_fpga.deploy.vendor.reports import check_target, read_cosim, read_csynth, read_vivado
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet

Vendor = Literal["vitis", "vivado"]
Step = Literal["csim", "csynth", "cosim", "vsynth"]
Version = tuple[int, int]

LOG = "build.log"
OUTPUTS: Mapping[Step, str] = {  # what tells that a step ran
    "csim": "tb_data/csim_results.log",
    "csynth": "{top}_prj/solution1/syn/report/{top}_csynth.xml",
    "cosim": "{top}_prj/solution1/sim/report/{top}_cosim.rpt",
    "vsynth": "vivado_synth.rpt",
}
_SIMULATED: Mapping[Step, str] = {"csim": "tb_data/csim_results.log", "cosim": "tb_data/rtl_cosim_results.log"}
_VERSIONS: dict[str, tuple[Version, Version | None]] = {  # that hls4ml's scripts work with: first and last
    VITIS_RUN.program: ((2023, 1), None),
    VITIS_HLS.program: ((2022, 2), None),
    VIVADO_HLS.program: ((2018, 2), (2020, 1)),
}
_ERROR = re.compile(r"\s*(ERROR|FATAL|@E)\b|.*\berror:")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What `project.tcl` says.

    Attributes:
        vendor: whose C++ the project holds.
        top: name of the top function.
        part: FPGA part.
        clock_ns: clock period in ns.
    """

    vendor: Vendor
    top: str
    part: str
    clock_ns: float

    @classmethod
    def of(cls, folder: Path) -> Target:
        """The target of the project in `folder`.

        Raises:
            InvalidInput: when there is no project, or not one for these tools.
        """
        path = folder / "project.tcl"
        try:
            settings = dict(re.findall(r'^set (\w+) "?([^"\n]*)"?$', path.read_text(), re.MULTILINE))
            vendor, clock_ns = settings["backend"], float(settings["clock_period"])
            if vendor not in get_args(Vendor):
                raise InvalidInput(f"{path}: backend {vendor!r} is none of {', '.join(get_args(Vendor))}")
            if not re.fullmatch(r"[A-Za-z_]\w*", settings["project_name"]):
                raise InvalidInput(f"{path}: project_name {settings['project_name']!r} names no function")
            return cls(vendor=vendor, top=settings["project_name"], part=settings["part"], clock_ns=clock_ns)
        except InvalidInput:
            raise
        except (OSError, KeyError, ValueError) as error:
            raise InvalidInput(f"{path}: not the settings of an hls4ml project: {error!r}") from error


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the tools made of a project.

    Attributes:
        folder: with reports, outputs and log.
        records: of the steps that succeeded, one each.
        parity: outputs of the tools' simulations against the golden model; None where none ran.
        failures: what went wrong, most telling first, one line each.
    """

    folder: Path
    records: tuple[Resources, ...]
    parity: Parity | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every step succeeded and no output differs."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON."""
        return {
            "passed": self.passed,
            "folder": str(self.folder),
            "resources": [record.to_json() for record in self.records],
            "parity": None if self.parity is None else self.parity.to_json(),
            "failures": list(self.failures),
        }


@dataclass(frozen=True, kw_only=True)
class SimulationLog:
    """Outputs that a simulation by hls4ml's test bench wrote, as a simulator.

    Attributes:
        name: its key in a `Parity`.
        path: for every sample a line per port, values separated by spaces.
        project: whose simulation it was.
    """

    name: str
    path: Path
    project: HlsProject

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output shape)`; `x` only says for how many samples.

        Raises:
            InvalidInput: when the file is not that of so many samples.
            ParityError: when a value is not on the tensor's grid.
        """
        shapes = [port.shape for port in self.project.ports]
        values = read_rows(self.path, *map(math.prod, shapes))
        if len(values[0]) != len(x):
            raise InvalidInput(
                f"{self.path}: outputs of {len(values[0])} samples, expected {len(x)}: the run broke off"
            )
        try:
            return self.project.output_codes([v.reshape(len(x), *s) for v, s in zip(values, shapes, strict=True)])
        except ParityError as error:
            raise ParityError(f"{self.path}: {error}") from error


def synthesize(
    project: HlsProject,
    net: QNet,
    folder: Path,
    *,
    vendor: Vendor,
    csim: bool = False,
    cosim: bool = False,
    vsynth: bool = False,
    part: str | None = None,
    clock_ns: float | None = None,
    time_limit_s: float | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Outcome:
    """Run C synthesis, and what else is asked for, on a copy of a project.

    Args:
        project: what to build.
        net: the network that the project was made from.
        folder: the copy, with everything that the tools wrote; replaced if all passed. The copy of a run that did not
            pass is left beside it, as `<folder>.failed`.
        vendor: whose tools; the project must be for them.
        csim: simulate the C++ before and compare with the golden model.
        cosim: simulate the generated Verilog and compare with the golden model.
        vsynth: synthesize the generated Verilog by Vivado.
        part: FPGA part instead of the project's.
        clock_ns: clock period in ns instead of the project's.
        time_limit_s: for all of it, in seconds; steps that were finished before count.
        on_step: called with the name of each step as it starts.

    Raises:
        ToolMissing: when a program that is needed is not there, before anything is written.
        InvalidInput: when project, network, options or the program's version do not fit.
    """
    check_belongs(project, net)
    target = Target.of(project.folder)
    if target.vendor != vendor:
        raise InvalidInput(
            f"{project.folder}: for {target.vendor}, not {vendor}: convert the network with --backend {vendor.title()}"
        )
    tool, program = _find(vendor)
    vivado = VIVADO.require() if vsynth else None
    wanted: dict[Step, bool] = {"csim": csim, "csynth": True, "cosim": cosim, "vsynth": vsynth}
    steps = [step for step, on in wanted.items() if on]
    if csim or cosim:
        read_inputs(project.folder, project)
    attempt = failed(folder)
    copy_project(project, attempt, part=part, clock_ns=clock_ns)
    _check_version(tool, program, attempt / "version.log")
    command = [program, *arguments(tool.program, steps)]
    write_options(attempt, steps)
    environment = dict(os.environ)
    if vivado:  # hls4ml's script calls it by name
        environment["PATH"] = f"{Path(vivado).parent}{os.pathsep}{environment.get('PATH', '')}"

    def on_line(line: str) -> None:
        if on_step and (step := re.fullmatch(r"\*{5} ([A-Z/ ]+) \*{5}", line.strip())):
            on_step(step[1])

    failure = None
    try:
        code = run(command, cwd=attempt, log=attempt / LOG, time_limit_s=time_limit_s, env=environment, on_line=on_line)
        if code:
            failure = describe_failure(tool.program, code, attempt / LOG)
    except ToolFailed as error:  # the time limit; what was finished before counts
        failure = str(error)
    return settle(examine(attempt, net, steps, failure), folder)


def settle(outcome: Outcome, folder: Path) -> Outcome:
    """Move what passed to `folder`, in place of what passed before; leave what failed where it is."""
    if not outcome.passed:
        return outcome
    shutil.rmtree(folder, ignore_errors=True)
    outcome.folder.rename(folder)
    return replace(outcome, folder=folder)


def failed(folder: Path) -> Path:
    """Where the copy of a project stays that is not to replace `folder` until it has passed."""
    return folder.with_name(f"{folder.name}.failed")


def examine(folder: Path, net: QNet, steps: Sequence[Step], failure: str | None = None) -> Outcome:
    """Read what the tools left in a project, and compare their simulations with the golden model.

    Args:
        folder: the project.
        net: the network that it was made from.
        steps: that ran; a report that one of them should have written and did not is a failure.
        failure: what is known to have gone wrong already; later steps' reports may then be missing.

    Raises:
        InvalidInput: when the project was made from another network.
    """
    project = HlsProject.load(folder)
    check_belongs(project, net)
    target = Target.of(folder)
    records: list[Resources] = []
    failures = [] if failure is None else [failure]

    def read(report: Path, reader: Callable[[], Resources]) -> None:
        if failure and not report.exists():
            return
        try:
            record = reader()
            check_target(report, record, target.part, target.clock_ns)
            records.append(record)
        except (InvalidInput, ToolFailed) as error:
            failures.append(str(error))

    csynth, cosim, vsynth = (folder / OUTPUTS[step].format(top=target.top) for step in ("csynth", "cosim", "vsynth"))
    read(csynth, lambda: read_csynth(csynth.parent, target.top))
    if "cosim" in steps and records:
        read(cosim, lambda: read_cosim(cosim, records[0]))
    if "vsynth" in steps:
        read(vsynth, lambda: read_vivado(vsynth, target.top))
    if (routed := folder / "vivado_utilization.rpt").exists():  # the user's: no script of hls4ml's routes
        timing = folder / "vivado_timing.rpt"
        read(routed, lambda: read_vivado(routed, target.top, timing if timing.exists() else None))
    simulators = [
        SimulationLog(name=f"{target.vendor}_{step}", path=folder / name, project=project)
        for step, name in _SIMULATED.items()
        if step in steps and not (failure and not (folder / name).exists())
    ]
    parity = None
    if simulators:
        try:
            parity = check(net, simulators, read_inputs(folder, project))
            parity.raise_for_mismatch()
        except (InvalidInput, ToolFailed, ParityError) as error:
            failures.append(str(error))
    return Outcome(folder=folder, records=tuple(records), parity=parity, failures=tuple(failures))


def describe_failure(program: str, code: int, path: Path) -> str:
    """One line on why a tool failed: the first error of its log."""
    lines = path.read_text(errors="replace").splitlines()
    reason = next((line.strip()[:300] for line in lines if _ERROR.match(line)), "no error in its log")
    return f"{program} failed with exit code {code}: {reason}; its log is {path}"


def copy_project(project: HlsProject, folder: Path, *, part: str | None = None, clock_ns: float | None = None) -> None:
    """Copy a project for the tools, without what was compiled, for another part or clock if these are given.

    Raises:
        InvalidInput: for a part or a clock that cannot be one.
    """
    settings: dict[str, str] = {}
    if part is not None:
        if not re.fullmatch(r"[A-Za-z0-9-]+", part):
            raise InvalidInput(f"part {part!r}: give a name such as xcvu13p-flga2577-2-e")
        settings["part"] = f'"{part}"'
    if clock_ns is not None:
        if not (math.isfinite(clock_ns) and clock_ns > 0):
            raise InvalidInput(f"clock of {clock_ns} ns: give a positive period in ns")
        settings["clock_period"] = f"{clock_ns:g}"
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "*.o", "*.keras", "*_prj", "*.log", "*.rpt")
    shutil.copytree(project.folder, folder, ignore=ignored)
    path = folder / "project.tcl"
    text = path.read_text()
    for name, value in settings.items():
        text, count = re.subn(rf"^set {name} .*$", f"set {name} {value}", text, flags=re.MULTILINE)
        assert count == 1, f"{path}: no {name}"
    path.write_text(text)


def write_options(folder: Path, steps: Sequence[Step]) -> None:
    """Say which steps to run where `build_prj.tcl` looks for it: hls4ml's Vitis scripts read a file."""
    if (path := folder / "build_opt.tcl").exists():
        lines = "".join(f"    {name:<10} {int(value)}\n" for name, value in _options(steps).items())
        path.write_text(f"array set opt {{\n{lines}}}\n")


def arguments(program: str, steps: Sequence[Step]) -> list[str]:
    """The arguments that make `program` run hls4ml's script; Vivado's scripts are told the steps there."""
    if program == VITIS_RUN.program:
        return ["--tcl", "build_prj.tcl", "--mode", "hls"]
    if program == VITIS_HLS.program:
        return ["-f", "build_prj.tcl"]
    return ["-f", "build_prj.tcl", " ".join(f"{name}={int(value)}" for name, value in _options(steps).items())]


def _options(steps: Sequence[Step]) -> dict[str, bool]:
    """hls4ml's switches; `validation` compares two simulations by their text, which is done here by value."""
    return {
        "reset": True,
        "csim": "csim" in steps,
        "synth": "csynth" in steps,
        "cosim": "cosim" in steps,
        "validation": False,
        "export": False,
        "vsynth": "vsynth" in steps,
        "fifo_opt": False,
    }


def read_rows(path: Path, *columns: int) -> list[npt.NDArray[np.float64]]:
    """Numbers of a test bench's file with a line of so many for each port, over and over: `(samples, columns)` each.

    Lines after the last complete sample are left out.

    Raises:
        InvalidInput: when it is not such a file, naming the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not readable: {error}") from error
    rows: list[list[float]] = []
    for number, line in enumerate(lines):
        try:
            rows.append([float(value) for value in line.split()])
        except ValueError as error:
            raise InvalidInput(f"{path}: line {number + 1}: {error}") from error
        if len(rows[-1]) != (expected := columns[number % len(columns)]):
            raise InvalidInput(f"{path}: line {number + 1} holds {len(rows[-1])} values, expected {expected}")
    samples = len(rows) // len(columns)
    return [
        np.array(rows[i : samples * len(columns) : len(columns)]).reshape(samples, n) for i, n in enumerate(columns)
    ]


def read_inputs(folder: Path, project: HlsProject) -> npt.NDArray[np.float32]:
    """The inputs of the project's test bench, `(samples, *input_shape)`.

    Raises:
        InvalidInput: when there are none.
    """
    path, shape = folder / "tb_data" / "tb_input_features.dat", project.input_shape
    (values,) = read_rows(path, math.prod(shape)) if path.exists() else [np.empty(0)]
    if not len(values):
        raise InvalidInput(f"{path}: no samples to simulate: the project was converted without data")
    return values.reshape(len(values), *shape).astype(np.float32)


def check_belongs(project: HlsProject, net: QNet) -> None:
    """Do nothing if the project was made from the network.

    Raises:
        InvalidInput: when it was not.
    """
    if project.digest != net.digest:
        raise InvalidInput(
            f"{project.folder}: made from the QNet {project.digest[:12]}, not from {net.digest[:12]}: "
            "pack or convert this run again"
        )


def _find(vendor: Vendor) -> tuple[Tool, str]:
    """The program that runs the project's script, and its path."""
    if vendor == "vivado":
        return VIVADO_HLS, VIVADO_HLS.require()
    for tool in (VITIS_RUN, VITIS_HLS):
        if path := tool.find():
            return tool, path
    raise ToolMissing(
        f"neither {VITIS_RUN.program} nor {VITIS_HLS.program} found: {VITIS_RUN.remedy}, set {VITIS_RUN.variable} or "
        f"{VITIS_HLS.variable} to its path, or run the project elsewhere: hmq-fpga pack"
    )


def _check_version(tool: Tool, program: str, record: Path) -> None:
    """Refuse a version that hls4ml's scripts do not work with; one that cannot be told is let pass."""
    option = "--version" if tool is VITIS_RUN else "-version"
    run([program, option], cwd=record.parent, log=record, time_limit_s=300)
    found = re.search(r"\bv(\d{4})\.(\d)", record.read_text(errors="replace"))
    if not found:
        log.warning("%s does not tell its version, see %s", program, record)
        return
    version = int(found[1]), int(found[2])
    first, last = _VERSIONS[tool.program]
    if version < first or (last and version > last):
        span = f"{_dotted(first)} to {_dotted(last)}" if last else f"{_dotted(first)} or later"
        raise InvalidInput(f"{program}: version {_dotted(version)}; hls4ml's scripts need {span}")


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
