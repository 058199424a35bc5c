"""Resources: one record for every estimate, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# What a device holds, by the start of its part's name: LUT, FF, DSP, BRAM of 18 kbit
_DEVICES: Mapping[str, tuple[int, int, int, int]] = {
    "7a35t": (20_800, 41_600, 90, 100),
    "7a100t": (63_400, 126_800, 240, 270),
    "7k325t": (203_800, 407_600, 840, 890),
    "7vx690t": (433_200, 866_400, 3_600, 2_940),
    "7z010": (17_600, 35_200, 80, 120),
    "7z020": (53_200, 106_400, 220, 280),
    "7z045": (218_600, 437_200, 900, 1_090),
    "ku040": (242_400, 484_800, 1_920, 1_200),
    "ku115": (663_360, 1_326_720, 5_520, 4_320),
    "vu9p": (1_182_240, 2_364_480, 6_840, 4_320),
    "vu13p": (1_728_000, 3_456_000, 12_288, 5_376),
    "zu3eg": (70_560, 141_120, 360, 432),
    "zu7ev": (230_400, 460_800, 1_728, 624),
    "zu9eg": (274_080, 548_160, 2_520, 1_824),
    "zu28dr": (425_280, 850_560, 4_272, 2_160),
    "zu48dr": (425_280, 850_560, 4_272, 2_160),
    "zu49dr": (425_280, 850_560, 4_272, 2_160),
    "k26": (117_120, 234_240, 1_248, 288),
    "u50": (871_680, 1_743_360, 5_952, 2_688),
    "u55c": (1_303_680, 2_607_360, 9_024, 4_032),
    "u200": (1_182_240, 2_364_480, 6_840, 4_320),
    "u250": (1_728_000, 3_456_000, 12_288, 5_376),
    "u280": (1_303_680, 2_607_360, 9_024, 4_032),
    "lfe5u25f": (24_288, 24_288, 28, 56),
    "lfe5u45f": (43_848, 43_848, 72, 108),
    "lfe5u85f": (83_640, 83_640, 156, 208),
    "lifcl40": (32_256, 32_256, 56, 84),
    "ice40up5k": (5_280, 5_280, 8, 6),
    "gw2arlv18": (20_736, 15_552, 48, 46),
    "ice40hx8k": (7_680, 7_680, 0, 7),
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One estimate or measurement; `None` is unknown, never zero.

    Attributes:
        stage: what produced the figures, such as `csynth`, `cosim`, `vsynth`, `impl`, `trace`, `yosys`, `route`,
            `rtl_impl`. Figures of different stages do not compare.
        tool, version: the program.
        part: FPGA part or family.
        clock_ns: clock period that was asked for, in ns.
        achieved_clock_ns: shortest clock period by the stage's own timing, in ns: a guess in `csynth`, the period
            minus the worst negative slack in `impl`.
        lut, ff, dsp, bram, carry: counts; `bram` in 18-kbit units.
        latency_cycles, ii: clock cycles from input to output, and between two inputs; the largest where they vary.
        fmax_mhz: highest clock after routing, in MHz.
        latency_ns: the cycles at that clock, in ns.
        device: what it was placed on, by this package's name for it.
        critical_path: the slowest path after routing: its parts `logic_ns` and `routing_ns`, the registers at its ends,
            `source` and `sink`, `file`, the Verilog that it runs through, and `layers`, what of the network that file
            works on.
        notes: what a reader has to know, such as "a Yosys estimate".
    """

    stage: str
    tool: str
    version: str | None = None
    part: str | None = None
    clock_ns: float | None = None
    achieved_clock_ns: float | None = None
    lut: int | None = None
    ff: int | None = None
    dsp: int | None = None
    bram: int | None = None
    carry: int | None = None
    latency_cycles: int | None = None
    ii: int | None = None
    fmax_mhz: float | None = None
    latency_ns: float | None = None
    device: str | None = None
    critical_path: Mapping[str, Any] | None = None
    notes: str = ""

    @property
    def percent(self) -> dict[str, float] | None:
        """Percent of the part's LUT, FF, DSP and BRAM that are used; None for a part that is not known here."""
        device = next((d for d in _DEVICES if self.part and canonical_part(self.part).startswith(d)), None)
        if device is None:
            return None
        used = {"lut": self.lut, "ff": self.ff, "dsp": self.dsp, "bram": self.bram}
        totals = zip(used.items(), _DEVICES[device], strict=True)
        return {kind: 100 * count / total for (kind, count), total in totals if count is not None and total}

    def to_json(self) -> dict[str, Any]:
        """The record as `resources.json` holds it."""
        return asdict(self) | {"percent": self.percent}


def merge(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The content of `resources.json` with new entries, each in place of the same tool's for the same stage."""
    renewed = {(entry["stage"], entry["tool"]) for entry in new}
    kept = [entry for entry in old if (entry["stage"], entry["tool"]) not in renewed]
    return [dict(entry) for entry in (*kept, *new)]


def canonical_part(part: str) -> str:
    """A part's name without what tools spell differently: `xc7z020-clg400-1` and `7z020clg400-1` are one."""
    return part.lower().removeprefix("xc").replace("-", "")
