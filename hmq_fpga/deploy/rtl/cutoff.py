"""The latency cutoff with which a network is fastest on a device, found by placing and routing a handful.

A smaller cutoff puts registers closer together: the clock rises, and so do the cycles. Which is fastest in ns depends
on what the device does with carry chains and wires, of which the tracer's delay model knows nothing.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl.devices import Device
from hmq_fpga.deploy.rtl.nextpnr import DoesNotFit, require_tools
from hmq_fpga.deploy.rtl.project import RtlProject

Goal = Literal["latency", "fmax"]

CUTOFFS = (
    1.0,
    2.0,
    3.0,
    5.0,
    8.0,
    13.0,
)  # ns of the tracer's delay model; of more, Yosys may take a quarter of an hour
RTL = "rtl"
_WORDS = {"latency": "the least latency in ns", "fmax": "the highest clock"}


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One cutoff: what was found, or `refused`, the line that says why it does not fit."""

    cutoff: float
    found: Resources | None = None
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The cutoff and its figures."""
        keys = ("latency_cycles", "fmax_mhz", "latency_ns", "lut", "ff", "carry")
        figures = {key: getattr(self.found, key) for key in keys} if self.found else {"refused": self.refused}
        return {"latency_cutoff": self.cutoff, **figures}


def find_cutoff(
    project: RtlProject,
    folder: Path,
    device: Device,
    *,
    goal: Goal = "latency",
    tries: int = 1,
    time_limit_s: float = 3600,
    on_step: Callable[[str], None] | None = None,
) -> tuple[Resources, list[Placed]]:
    """Place and route one traced program with several latency cutoffs; what the best leaves stays in `folder`.

    Args:
        project: whose program it is; its own folder is only read.
        folder: gets the Verilog of the best, `rtl/`, and what `RtlProject.route` leaves of it.
        device: where to place it.
        goal: least `latency_ns`, or highest `fmax_mhz`.
        tries: placements of each cutoff.
        time_limit_s: wall-clock limit of each synthesis and placement, in seconds.
        on_step: hears in words what begins.

    Returns:
        The record of the best, and all that was tried, by rising cutoff.

    Raises:
        ToolMissing: without pyosys or nextpnr.
        ToolFailed: when one fails or passes the limit.
        DoesNotFit: when no cutoff fits the device.
    """
    require_tools(device)
    say = on_step or (lambda _: None)
    tried: dict[float, Placed] = {}
    seen: set[tuple[int, int]] = set()  # cycles and flip-flops: two cutoffs often cut at the same places
    scratch = folder / "tried"

    def attempt(cutoff: float) -> None:
        own = scratch / f"{cutoff:g}"
        written = project.written_again(own / RTL, latency_cutoff=cutoff)
        if (cut := (written.latency_cycles, written.register_bits)) in seen:
            shutil.rmtree(own)
            return
        seen.add(cut)
        hear = lambda step: say(f"cutoff {cutoff:g} ns, {written.latency_cycles} cycles: {step}")  # noqa: E731
        try:
            found = written.route(own, device, tries=tries, time_limit_s=time_limit_s, on_step=hear)
        except DoesNotFit as refused:
            tried[cutoff] = Placed(cutoff=cutoff, refused=str(refused))
            return
        tried[cutoff] = Placed(cutoff=cutoff, found=found)

    for cutoff in CUTOFFS:
        attempt(cutoff)
    placed = [one for one in tried.values() if one.found]
    if not placed:
        raise DoesNotFit(min(tried.values(), key=lambda one: -one.cutoff).refused or "")
    for cutoff in _between(_best(placed, goal).cutoff):
        attempt(cutoff)
    best = _best([one for one in tried.values() if one.found], goal)
    for path in (scratch / f"{best.cutoff:g}").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(scratch)
    ordered = [tried[cutoff] for cutoff in sorted(tried)]
    cutoffs = ", ".join(f"{one.cutoff:g}" for one in ordered)
    assert best.found
    note = f"at a latency cutoff of {best.cutoff:g} ns, of {cutoffs} ns that with {_WORDS[goal]}"
    return replace(best.found, notes=f"{note}; {best.found.notes}"), ordered


def _best(placed: Sequence[Placed], goal: Goal) -> Placed:
    def cost(one: Placed) -> float:
        assert one.found and one.found.latency_ns and one.found.fmax_mhz
        return one.found.latency_ns if goal == "latency" else -one.found.fmax_mhz

    return min(placed, key=cost)


def _between(cutoff: float) -> list[float]:
    """Half-way, as a ratio, to both neighbours."""
    at = CUTOFFS.index(cutoff)
    neighbours = CUTOFFS[max(at - 1, 0) : at] + CUTOFFS[at + 1 : at + 2]
    return [round(math.sqrt(cutoff * other), 1) for other in neighbours]
