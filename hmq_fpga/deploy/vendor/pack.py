"""A network's projects as an archive that runs the vendor's tools on another machine, and what comes back from there.

The hls4ml project is at the archive's top; the Verilog, if the network has any, in `rtl`.
"""

from __future__ import annotations

import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hmq_fpga.deploy.hls.project import RECORD, HlsProject
from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.toolchain import VITIS_HLS, VITIS_RUN, VIVADO, VIVADO_HLS
from hmq_fpga.deploy.vendor import rtl as verilog
from hmq_fpga.deploy.vendor.run import (
    LOG,
    OUTPUTS,
    Outcome,
    Target,
    arguments,
    check_belongs,
    copy_project,
    describe_failure,
    examine,
    failed,
    read_inputs,
    settle,
    write_options,
)
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet

SCRIPT = "run.sh"
RETURNED = "results.tar.gz"
_EXIT_CODE = "exit_code"


def pack(
    project: HlsProject,
    net: QNet,
    archive: Path,
    *,
    rtl: Path | None = None,
    part: str | None = None,
    clock_ns: float | None = None,
) -> None:
    """Write a self-contained archive: the project, its test data, the Verilog, and a script that runs every step.

    The other machine needs the vendor's tools and a shell, no Python; with Vivado alone the script leaves HLS out. It
    leaves `results.tar.gz` beside itself, for `collect`.

    Args:
        project: what to pack.
        net: the network that the project was made from.
        archive: `.tar.gz` to write; an earlier one is replaced once the new one is complete.
        rtl: folder of the network's RTL project, to be placed and routed too; None where there is none.
        part: FPGA part instead of the projects'.
        clock_ns: clock period in ns instead of the projects'.

    Raises:
        InvalidInput: when projects and network do not belong together, or the hls4ml project has no test data.
    """
    check_belongs(project, net)
    read_inputs(project.folder, project)
    name = archive.name.split(".")[0]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=archive.parent) as scratch:
        folder = Path(scratch) / name
        copy_project(project, folder, part=part, clock_ns=clock_ns)
        write_options(folder, list(OUTPUTS))
        if rtl is not None:
            verilog.write_rtl(rtl, net, folder / verilog.FOLDER, part=part, clock_ns=clock_ns)
        (folder / SCRIPT).write_text(_script(Target.of(folder), routes=rtl is not None))
        (folder / SCRIPT).chmod(0o755)
        new = Path(scratch) / archive.name
        with tarfile.open(new, "w:gz") as tar:
            tar.add(folder, name)
        new.replace(archive)


def collect(net: QNet, source: Path, folder: Path, check: Callable[[Path], None] = lambda _: None) -> Outcome:
    """Read what the tools made on another machine.

    Args:
        net: the network that was packed.
        source: the `results.tar.gz` that the packed script left; or a project's folder as the tools left it, where,
            without the script's record, a step counts as run if its output exists.
        folder: what an archive is unpacked to; replaced if all passed, else `<folder>.failed` is. A folder is read
            where it is.
        check: raises where the project that came back, in the folder that it is given, is not the network's.

    Raises:
        InvalidInput: when `source` is no such archive or folder, or is of another network.
    """
    if source.is_dir():
        return _read(net, source, check)
    attempt = failed(folder)
    shutil.rmtree(attempt, ignore_errors=True)
    try:
        with tarfile.open(source) as tar:
            _unpack(tar, attempt)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InvalidInput(f"{source}: not a readable archive of results: {error}; copy it again") from error
    return settle(_read(net, attempt, check), folder)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write an archive's files into a folder and nothing outside it."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    # Python before 3.10.12 and 3.11.4, as in Debian 12: files only, no links, which could lead elsewhere.
    inside = [m for m in tar if m.isfile() and (folder / m.name).resolve().is_relative_to(folder.resolve())]
    tar.extractall(folder, members=inside)


def _read(net: QNet, folder: Path, check: Callable[[Path], None]) -> Outcome:
    if not (folder / RECORD).exists():
        raise InvalidInput(f"{folder}: no {RECORD}: neither results of {SCRIPT} nor a project of this package")
    check(folder)
    routed, failures = _read_rtl(net, folder / verilog.FOLDER)
    outputs = {step: folder / output.format(top=Target.of(folder).top) for step, output in OUTPUTS.items()}
    ran = [step for step, output in outputs.items() if output.exists()]
    record = folder / _EXIT_CODE
    if not record.exists() and not ran and (routed or failures):  # Vivado alone
        return Outcome(folder=folder, records=tuple(routed), parity=None, failures=tuple(failures))
    hls = examine(folder, net, list(OUTPUTS) if record.exists() else ran, _failure(record, folder / LOG))
    return replace(hls, records=(*hls.records, *routed), failures=(*hls.failures, *failures))


def _read_rtl(net: QNet, folder: Path) -> tuple[list[Resources], list[str]]:
    """What routing the Verilog gave, and what went wrong; nothing of both where it did not run."""
    record = folder / verilog.EXIT_CODE
    if not record.exists() and not (folder / verilog.UTILIZATION).exists():
        return [], []
    if failure := _failure(record, folder / verilog.LOG):
        return [], [failure]
    try:
        return [verilog.read_rtl(folder, net)], []
    except InvalidInput as error:
        return [], [str(error)]


def _failure(record: Path, log: Path) -> str | None:
    """One line on why a part of the script failed, by its record; None where it did not, or left no record."""
    if not record.exists():
        return None
    code = record.read_text().strip()
    if not code.isdecimal():
        raise InvalidInput(f"{record}: {code!r} is no exit code: run {SCRIPT} again")
    return describe_failure(SCRIPT, int(code), log) if int(code) else None


def _script(target: Target, *, routes: bool) -> str:
    """A shell script for all steps; everything in it is this package's own or the name of a C++ function."""
    tools = [VIVADO_HLS] if target.vendor == "vivado" else [VITIS_RUN, VITIS_HLS]
    branches = "".join(
        f"{'elif' if i else 'if'} command -v {tool.program} >/dev/null; then\n"
        f'    echo "running HLS; the log is $PWD/{LOG}"\n'
        f"    {shlex.join([tool.program, *arguments(tool.program, list(OUTPUTS))])} >{LOG} 2>&1\n"
        f"    code=$?\n"
        f"    echo $code >{_EXIT_CODE}\n"
        for i, tool in enumerate(tools)
    )
    wanted = f"{' or '.join(tool.program for tool in tools)} is not on PATH: source its settings64.sh"
    without = f'    echo "HLS is left out: {wanted}" >&2\n' if routes else f'    echo "{wanted}" >&2\n    exit 2\n'
    command = shlex.join([VIVADO.program, "-mode", "batch", "-source", verilog.SCRIPT])
    route = f"""
echo "placing and routing the Verilog; the log is $PWD/{verilog.FOLDER}/{verilog.LOG}"
(cd {verilog.FOLDER} && {command} >{verilog.LOG} 2>&1)
routed=$?
echo $routed >{verilog.FOLDER}/{verilog.EXIT_CODE}
if [ $code -eq 0 ]; then code=$routed; fi
"""
    place, log, record = verilog.FOLDER, verilog.LOG, verilog.EXIT_CODE
    hls = [
        RECORD,
        "firmware",
        "project.tcl",
        _EXIT_CODE,
        LOG,
        "tb_data",
        f"{target.top}_prj/solution1/*/report",
        "*.rpt",
    ]
    results = " ".join([*hls, *(f"{place}/{name}" for name in ("rtl.json", record, log, "*.rpt"))])
    return f"""#!/bin/sh
# Runs C simulation, C synthesis, cosimulation and Vivado synthesis of this project: hours for large networks.
{"# Then places and routes the Verilog; without HLS that alone." if routes else "# It holds no Verilog to route."}
# Leaves {RETURNED}; give it to "hmq-fpga collect".
cd "$(dirname "$0")" || exit 2
if ! command -v {VIVADO.program} >/dev/null; then
    echo "{VIVADO.program} is not on PATH: source the settings64.sh of your installation" >&2
    exit 2
fi
rm -rf {target.top}_prj vivado_synth.rpt tb_data/*.log {_EXIT_CODE} {LOG} {RETURNED}
rm -f {place}/*.rpt {place}/{record} {place}/{log}
code=0
{branches}else
{without}fi
{route if routes else ""}find {results} -type f 2>/dev/null |
    tar -czf {RETURNED} -T - || exit 1
echo "exit code $code; results are in $PWD/{RETURNED}"
exit $code
"""
