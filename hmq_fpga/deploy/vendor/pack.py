"""An hls4ml project as an archive that runs the vendor's tools on another machine, and what comes back from there."""

from __future__ import annotations

import shlex
import shutil
import tarfile
import tempfile
from pathlib import Path

from hmq_fpga.deploy.hls.project import RECORD, HlsProject
from hmq_fpga.deploy.toolchain import VITIS_HLS, VITIS_RUN, VIVADO, VIVADO_HLS
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
    project: HlsProject, net: QNet, archive: Path, *, part: str | None = None, clock_ns: float | None = None
) -> None:
    """Write a self-contained archive: the project, its test data, and a script that runs every step.

    The other machine needs the vendor's tools and a shell, no Python. The script leaves `results.tar.gz` beside
    itself, for `collect`.

    Args:
        project: what to pack.
        net: the network that the project was made from.
        archive: `.tar.gz` to write; an earlier one is replaced once the new one is complete.
        part: FPGA part instead of the project's.
        clock_ns: clock period in ns instead of the project's.

    Raises:
        InvalidInput: when project and network do not belong together, or the project has no test data.
    """
    check_belongs(project, net)
    read_inputs(project.folder, project)
    name = archive.name.split(".")[0]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=archive.parent) as scratch:
        folder = Path(scratch) / name
        copy_project(project, folder, part=part, clock_ns=clock_ns)
        write_options(folder, list(OUTPUTS))
        (folder / SCRIPT).write_text(_script(Target.of(folder)))
        (folder / SCRIPT).chmod(0o755)
        new = Path(scratch) / archive.name
        with tarfile.open(new, "w:gz") as tar:
            tar.add(folder, name)
        new.replace(archive)


def collect(net: QNet, source: Path, folder: Path) -> Outcome:
    """Read what the tools made on another machine.

    Args:
        net: the network that was packed.
        source: the `results.tar.gz` that the packed script left; or a project's folder as the tools left it, where,
            without the script's record, a step counts as run if its output exists.
        folder: what an archive is unpacked to; replaced if all passed, else `<folder>.failed` is. A folder is read
            where it is.

    Raises:
        InvalidInput: when `source` is no such archive or folder, or is of another network.
    """
    if source.is_dir():
        return _read(net, source)
    attempt = failed(folder)
    shutil.rmtree(attempt, ignore_errors=True)
    try:
        with tarfile.open(source) as tar:
            _unpack(tar, attempt)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InvalidInput(f"{source}: not a readable archive of results: {error}; copy it again") from error
    return settle(_read(net, attempt), folder)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write an archive's files into a folder and nothing outside it."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    # Python before 3.10.12 and 3.11.4, as in Debian 12: files only, no links, which could lead elsewhere.
    inside = [m for m in tar if m.isfile() and (folder / m.name).resolve().is_relative_to(folder.resolve())]
    tar.extractall(folder, members=inside)


def _read(net: QNet, folder: Path) -> Outcome:
    if not (folder / RECORD).exists():
        raise InvalidInput(f"{folder}: no {RECORD}: neither results of {SCRIPT} nor a project of this package")
    top, record = Target.of(folder).top, folder / _EXIT_CODE
    if not record.exists():
        ran = [step for step, output in OUTPUTS.items() if (folder / output.format(top=top)).exists()]
        return examine(folder, net, ran)
    code = record.read_text().strip()
    if not code.isdecimal():
        raise InvalidInput(f"{record}: {code!r} is no exit code: run {SCRIPT} again")
    failure = describe_failure(SCRIPT, int(code), folder / LOG) if int(code) else None
    return examine(folder, net, list(OUTPUTS), failure)


def _script(target: Target) -> str:
    """A shell script for all steps; everything in it is this package's own or the name of a C++ function."""
    tools = [VIVADO_HLS] if target.vendor == "vivado" else [VITIS_RUN, VITIS_HLS]
    branches = "".join(
        f"{'elif' if i else 'if'} command -v {tool.program} >/dev/null; then\n"
        f"    {shlex.join([tool.program, *arguments(tool.program, list(OUTPUTS))])} >{LOG} 2>&1\n"
        for i, tool in enumerate(tools)
    )
    return f"""#!/bin/sh
# Runs C simulation, C synthesis, cosimulation and Vivado synthesis of this project: hours for large networks.
# Leaves {RETURNED}; give it to "hmq-fpga collect".
cd "$(dirname "$0")" || exit 2
if ! command -v {VIVADO.program} >/dev/null; then
    echo "{VIVADO.program} is not on PATH: source the settings64.sh of your installation" >&2
    exit 2
fi
rm -rf {target.top}_prj vivado_synth.rpt tb_data/*.log {_EXIT_CODE} {LOG} {RETURNED}
echo "running; the log is $PWD/{LOG}"
{branches}else
    echo "{" or ".join(tool.program for tool in tools)} is not on PATH: source its settings64.sh" >&2
    exit 2
fi
code=$?
echo $code >{_EXIT_CODE}
find {RECORD} project.tcl {_EXIT_CODE} {LOG} tb_data {target.top}_prj/solution1/*/report *.rpt -type f 2>/dev/null |
    tar -czf {RETURNED} -T - || exit 1
echo "exit code $code; results are in $PWD/{RETURNED}"
exit $code
"""
