"""Resources: one record for every estimate, whoever made it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One estimate or measurement; `None` is unknown, never zero.

    Attributes:
        stage: what produced the figures, such as `csynth`, `vsynth`, `impl`, `trace`, `yosys`. Figures of
            different stages do not compare.
        tool, version: the program.
        part: FPGA part or family.
        clock_ns: clock period that was asked for, in ns.
        lut, ff, dsp, bram, carry: counts; `bram` in 18-kbit units.
        latency_cycles, ii: clock cycles from input to output, and between two inputs.
        notes: what a reader has to know, such as "a Yosys estimate".
    """

    stage: str
    tool: str
    version: str | None = None
    part: str | None = None
    clock_ns: float | None = None
    lut: int | None = None
    ff: int | None = None
    dsp: int | None = None
    bram: int | None = None
    carry: int | None = None
    latency_cycles: int | None = None
    ii: int | None = None
    notes: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record as `resources.json` holds it."""
        return asdict(self)
