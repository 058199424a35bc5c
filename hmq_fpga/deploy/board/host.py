"""Sends the samples beside this file to a board and compares its answers with the golden model's, code for code.

`python host.py /dev/ttyUSB0`; it needs numpy, and `board.json` and `samples.npz` beside it. Exit codes: 0 all equal,
1 some differ, 2 the board does not answer.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import struct
import sys
import termios
import time
import tty
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

REQUEST, ANSWER = b"\xa5", b"\x5a"  # what a frame begins with
HEAD = struct.Struct("<BH")  # sequence number, bytes of payload
CHECK = struct.Struct("<I")  # CRC-32
Codes = npt.NDArray[np.int64]


class NoAnswer(RuntimeError):
    """The board did not answer, however often it was asked."""


def pack(codes: Codes, port: Mapping[str, Any]) -> bytes:
    """The bytes of a port that holds codes side by side, the first in the lowest bits."""
    bits = (codes.reshape(-1, 1) >> np.arange(port["width"])) & 1
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack(data: bytes, port: Mapping[str, Any]) -> Codes:
    """The codes of a port, from its bytes."""
    elements, width = port["elements"], port["width"]
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=elements * width, bitorder="little")
    fields: Codes = bits.reshape(elements, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
    if port["signed"]:
        fields -= (fields >> (width - 1)) << width
    shifted: Codes = fields << port["shift"]
    return shifted


def request(sequence: int, payload: bytes) -> tuple[bytes, int]:
    """The frame of a payload, and its CRC."""
    body = HEAD.pack(sequence, len(payload)) + payload
    crc = zlib.crc32(body)
    return REQUEST + body + CHECK.pack(crc), crc


def find_answer(received: bytes, sequence: int, size: int, crc: int) -> bytes | None:
    """The payload of the answer to a request, from wherever it begins in what was received; None if it is not there.

    Args:
        received: bytes from the line.
        sequence: number of the request.
        size: bytes of an answer's payload.
        crc: of the request; the answer's goes on from it.
    """
    head = ANSWER + HEAD.pack(sequence, size)
    start = received.find(head)
    while start >= 0:
        end = start + len(head) + size
        body, check = received[start + 1 : end], received[end : end + CHECK.size]
        if check == CHECK.pack(zlib.crc32(body, crc)):
            return body[HEAD.size :]
        start = received.find(head, start + 1)
    return None


class Board:
    """A board at the end of a serial line.

    Attributes:
        resent: requests that had to be sent again, as their answer did not come or was broken.
    """

    def __init__(self, port: str, layout: Mapping[str, Any], *, timeout_s: float = 1.0, tries: int = 10) -> None:
        self.layout, self.tries = layout, tries
        self.size = -(-layout["outputs"]["elements"] * layout["outputs"]["width"] // 8)
        sent = -(-layout["inputs"]["elements"] * layout["inputs"]["width"] // 8)
        self.timeout_s = timeout_s + 10 * (sent + self.size + 16) / layout["baud"]
        self.resent = 0
        self._sequence = 0
        self._line = os.open(port, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._line)
        speed = getattr(termios, f"B{layout['baud']}", None)
        if speed is None:
            raise SystemExit(f"{port}: this system has no {layout['baud']} baud; make the bitstream with --baud 115200")
        attributes = termios.tcgetattr(self._line)
        attributes[4] = attributes[5] = speed
        termios.tcsetattr(self._line, termios.TCSANOW, attributes)
        termios.tcflush(self._line, termios.TCIOFLUSH)

    def close(self) -> None:
        """Give the line back."""
        os.close(self._line)

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        while data:
            data = data[os.write(self._line, data) :]

    def ask(self, codes: Codes) -> Codes:
        """The output codes for the input codes of one sample.

        Raises:
            NoAnswer: when no right answer comes, however often the sample is sent.
        """
        for attempt in range(self.tries):
            self.resent += attempt > 0
            self._sequence = (self._sequence + 1) % 256
            frame, crc = request(self._sequence, pack(codes, self.layout["inputs"]))
            self.write(frame)
            received = b""
            until = time.monotonic() + self.timeout_s
            while (left := until - time.monotonic()) > 0:
                if select.select([self._line], [], [], left)[0]:
                    received += os.read(self._line, 4096)
                    answer = find_answer(received, self._sequence, self.size, crc)
                    if answer is not None:
                        return unpack(answer, self.layout["outputs"])
        raise NoAnswer(f"no answer in {self.tries} tries of {self.timeout_s:.2f} s each")


def main() -> int:
    """Compare; the exit code."""
    parser = argparse.ArgumentParser(description="Compare a board with the golden model, code for code.")
    parser.add_argument("port", help="serial port of the board, such as /dev/ttyUSB0")
    parser.add_argument("--samples", type=int, help="how many [all]")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds to wait for an answer [1]")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    here = Path(__file__).resolve().parent
    layout = json.loads((here / "board.json").read_text())
    with np.load(here / "samples.npz") as samples:
        codes, expected = samples["codes"][: given.samples], samples["expected"][: given.samples]
    found = {"samples": len(codes), "values": int(expected.size), "mismatches": 0, "resent": 0, "seconds": 0.0}
    began = time.monotonic()
    try:
        board = Board(given.port, layout, timeout_s=given.timeout)
        for row, right in zip(codes, expected, strict=True):
            found["mismatches"] += int(np.count_nonzero(board.ask(row) != right))
    except (OSError, NoAnswer) as error:
        sys.stderr.write(f"{given.port}: {error}\n")
        return 2
    found.update(resent=board.resent, seconds=round(time.monotonic() - began, 3))
    line = "{samples} samples, {values} output codes, {mismatches} mismatches, {resent} sent again, {seconds} s"
    sys.stdout.write((json.dumps(found) if given.json else line.format(**found)) + "\n")
    return int(found["mismatches"] > 0)


if __name__ == "__main__":
    sys.exit(main())
