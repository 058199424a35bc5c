"""The top level of a board in Verilator, at the end of a pseudo-terminal that stands for its serial line."""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
import threading
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hmq_fpga.deploy.rtl.verilator import compile_library
from hmq_fpga.deploy.toolchain import ToolFailed, run

CLOCKS_PER_BIT = 4  # in simulation, where a bit on the line is as short as the receiver can do
_QUIET_S = 0.02  # without a byte from the host, after which the board finds its line idle


@dataclass(frozen=True, kw_only=True)
class Talked:
    """What the host's script found.

    Attributes:
        samples: that were sent.
        values: output codes that came back.
        mismatches: how many of them are not the golden model's.
        resent: requests that were sent again.
        seconds: that it took.
    """

    samples: int
    values: int
    mismatches: int
    resent: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.samples} samples, {self.values} output codes, {self.mismatches} mismatches"

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)


class SimulatedBoard:
    """A top level with the ports `clock`, `rx` and `tx`, from power-up on.

    Args:
        library: what `compile_board` made.
        idle_bits: bits of pause after which the board drops a part of a frame.
        answer_bits: most bits of pause between a request and its answer.
        flips: probability that noise inverts a bit on the line, in each direction.
    """

    def __init__(self, library: Path, *, idle_bits: int, answer_bits: int, flips: float = 0.0) -> None:
        self.idle_bits, self.answer_bits, self.flips = idle_bits, answer_bits, flips
        self._functions = ctypes.CDLL(str(library))
        self._functions.power_up.restype = ctypes.c_void_p
        self._functions.talk.restype = ctypes.c_size_t
        self._board = ctypes.c_void_p(self._functions.power_up())

    def __enter__(self) -> SimulatedBoard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._functions.power_down(self._board)

    def talk(self, sent: bytes, *, pause_bits: int = 0) -> bytes:
        """What the board answers to bytes, with pauses of some bits between them."""
        return self._talk(sent, self.answer_bits, pause_bits)

    def rest(self) -> bytes:
        """What it answers to a line that is idle for as long as drops a part of a frame."""
        return self._talk(b"", self.idle_bits + 16, 0)

    def _talk(self, sent: bytes, quiet: int, pause_bits: int) -> bytes:
        room = 1 << 20
        received = ctypes.create_string_buffer(room)
        arguments = (ctypes.c_size_t(value) for value in (room, quiet, pause_bits))
        size = self._functions.talk(
            self._board, sent, ctypes.c_size_t(len(sent)), received, *arguments, ctypes.c_double(self.flips)
        )
        return received.raw[:size]


def compile_board(
    folder: Path, sources: Sequence[Path], top: str, *, clocks_per_bit: int | None = None, time_limit_s: float
) -> Path:
    """The library of a `SimulatedBoard`, in a folder; see `compile_library`.

    Args:
        folder: for it, and its logs.
        sources: the Verilog files.
        top: name of the top level.
        clocks_per_bit: of a top level where it is settled; None: as few as can be.
        time_limit_s: wall-clock limit of each of the two steps, in seconds.
    """
    return compile_library(
        folder,
        sources,
        top,
        (Path(__file__).parent / "line.cc").read_text(),
        {"CLOCKS_PER_BIT": clocks_per_bit or CLOCKS_PER_BIT},
        {} if clocks_per_bit else {"CLOCKS_PER_BIT": CLOCKS_PER_BIT},
        time_limit_s=time_limit_s,
    )


@contextmanager
def on_a_pty(board: SimulatedBoard) -> Iterator[str]:
    """The path of a pseudo-terminal at which a board listens while the block runs."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    stopped, stop = os.pipe()
    thread = threading.Thread(target=_serve, args=(board, ours, stopped))
    thread.start()
    try:
        yield os.ttyname(theirs)
    finally:
        os.write(stop, b".")
        thread.join()
        for descriptor in (ours, theirs, stopped, stop):
            os.close(descriptor)


def _serve(board: SimulatedBoard, line: int, stopped: int) -> None:
    rested = True
    while True:
        ready, _, _ = select.select([line, stopped], [], [], None if rested else _QUIET_S)
        if stopped in ready:
            return
        rested = not ready
        answer = board.talk(os.read(line, 1 << 16)) if ready else board.rest()
        while answer:
            answer = answer[os.write(line, answer) :]


def run_host(
    script: Path, board: SimulatedBoard, log: Path, *, samples: int | None, timeout_s: float, time_limit_s: float
) -> Talked:
    """Run a board's host script against its simulation.

    Args:
        script: the script.
        board: the simulation.
        log: of the script.
        samples: how many to send; None for all.
        timeout_s: seconds that the script waits for an answer.
        time_limit_s: wall-clock limit in seconds.

    Raises:
        ToolFailed: when the board does not answer, or at the time limit; the message names the log.
    """
    count = [] if samples is None else ["--samples", str(samples)]
    with on_a_pty(board) as port:
        command = [sys.executable, str(script), port, "--json", "--timeout", str(timeout_s), *count]
        code = run(command, cwd=script.parent, log=log, time_limit_s=time_limit_s)
    if code not in (0, 1):
        raise ToolFailed(f"{script.name} failed with exit code {code}; its log is {log}")
    return Talked(**json.loads(log.read_text()))
