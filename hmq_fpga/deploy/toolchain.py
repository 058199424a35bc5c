"""External programs: find them, require them, say what is missing and how to get it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from hmq_fpga.ir.errors import InvalidInput


class ToolMissing(InvalidInput):
    """A program is not installed; the message says what it is for, how to get it and what to set."""


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
