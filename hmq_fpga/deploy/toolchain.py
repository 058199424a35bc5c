"""External programs: find them, require them, run them, say what is missing and how to get it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hmq_fpga.ir.errors import InvalidInput

POLL_S = 0.05  # how often a running program and its log are looked at
GRACE_S = 5.0  # from the request to stop until the kill


class ToolMissing(InvalidInput):
    """A program is not installed; the message says what it is for, how to get it and what to set."""


class ToolFailed(RuntimeError):
    """A program or hls4ml failed, or was stopped; the message says at what. Its input may well be right."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """An external program.

    Attributes:
        program: its name on PATH.
        variable: environment variable that may hold its full path instead.
        purpose: what it enables, completing "needed to …".
        remedy: how to get it.
    """

    program: str
    variable: str
    purpose: str
    remedy: str

    def find(self) -> str | None:
        """Full path of the program, or None."""
        return shutil.which(os.environ.get(self.variable) or self.program)

    def require(self) -> str:
        """Full path of the program.

        Raises:
            ToolMissing: when it is not there.
        """
        if path := self.find():
            return path
        raise ToolMissing(
            f"{self.program} not found, needed to {self.purpose}: {self.remedy}, or set {self.variable} to its path"
        )


GXX = Tool(
    program="g++",
    variable="HMQ_FPGA_GXX",
    purpose="compile the C simulation",
    remedy="install your system's C++ compiler (Debian, Ubuntu: apt-get install g++)",
)
VITIS_RUN = Tool(
    program="vitis-run",
    variable="HMQ_FPGA_VITIS_RUN",
    purpose="run Vitis HLS 2023.1 or later",
    remedy="install AMD Vitis and source its settings64.sh",
)
VITIS_HLS = Tool(
    program="vitis_hls",
    variable="HMQ_FPGA_VITIS_HLS",
    purpose="run Vitis HLS 2022.2 to 2024.1",
    remedy="install Xilinx Vitis HLS and source its settings64.sh",
)
VIVADO_HLS = Tool(
    program="vivado_hls",
    variable="HMQ_FPGA_VIVADO_HLS",
    purpose="run Vivado HLS",
    remedy="install Xilinx Vivado 2018.2 to 2020.1 and source its settings64.sh",
)
VIVADO = Tool(
    program="vivado",
    variable="HMQ_FPGA_VIVADO",
    purpose="synthesize the generated Verilog",
    remedy="install AMD Vivado and source its settings64.sh",
)
TOOLS = (GXX, VITIS_RUN, VITIS_HLS, VIVADO_HLS, VIVADO)


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    time_limit_s: float | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> int:
    """Run a program to its end, without a shell, and leave nothing of it behind.

    The program has a session of its own. Whatever of that is alive when this function is left, by return, time
    limit, Ctrl-C or an exception of `on_line`, is asked to stop and killed after `GRACE_S` seconds.

    Args:
        command: the program and its arguments.
        cwd: folder to run in.
        log: file that gets standard output and error as they come; an earlier one is replaced.
        time_limit_s: wall-clock limit in seconds; None for none.
        env: the whole environment; None for this process's own.
        on_line: called with each line of the log, without its end.

    Returns:
        The exit code; negative for the signal that ended the program.

    Raises:
        ToolMissing: when the program cannot be started.
        ToolFailed: when it passes the time limit, naming the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, log.open(encoding="utf-8", errors="replace") as tail:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolMissing(f"{command[0]}: cannot be started in {cwd}: {error.strerror}") from error
        lines = _Lines(tail, on_line)
        deadline = time.monotonic() + time_limit_s if time_limit_s is not None else None
        try:
            while (code := process.poll()) is None:
                lines.forward()
                if deadline is not None and time.monotonic() > deadline:
                    raise ToolFailed(
                        f"{Path(command[0]).name}: stopped at the time limit of {time_limit_s:g} s; its log is {log}"
                    )
                time.sleep(POLL_S)
        finally:
            _stop(process)
        lines.forward(end=True)
    return code


@dataclass
class _Lines:
    """Hands the complete lines of a growing text to a function, each once."""

    text: TextIO
    on_line: Callable[[str], None] | None
    rest: str = ""

    def forward(self, *, end: bool = False) -> None:
        if self.on_line is None:
            return
        *lines, self.rest = (self.rest + self.text.read()).split("\n")
        if end and self.rest:
            lines.append(self.rest)
        for line in lines:
            self.on_line(line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group that `process` leads, and reap it."""
    group = process.pid
    try:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline:
                process.poll()  # a leader that has ended and is not reaped counts as a member
                os.killpg(group, 0)
                time.sleep(POLL_S)
    finally:  # also where a second Ctrl-C cuts the grace short
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        process.wait()
