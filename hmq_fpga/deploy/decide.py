"""What is missing at the ends of sums, by branch and bound: inputs that reach it, or that there are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hmq_fpga.deploy.bounds import Relaxation
from hmq_fpga.deploy.branch import Search
from hmq_fpga.deploy.coverage import Tally, first_level
from hmq_fpga.deploy.reach import Reach
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.ops import Op, Quantize, Ranges

WORK = 1.5e11  # of all searches of a network, in products: a few seconds
HOPELESS = 2000  # nodes, of which none is refuted
ROUNDS = (200, 2000, 20_000)  # nodes of a search, from easy events to hard ones


def decide_ends(relaxation: Relaxation, tally: Tally, take: Callable[[Codes], None]) -> None:
    """Reach or exclude what is missing at the ends of sums: each with few nodes first, and what is left with more.

    Args:
        relaxation: of the network.
        tally: of what was reached; it learns what is excluded.
        take: counts inputs, codes of all in a row `(n, values)`, in the tally, and keeps those that are new.
    """
    decision, net = _Decision(relaxation, tally, take), relaxation.net
    for nodes in ROUNDS:
        for op in net.ops:
            for sign, events in ((1, ("high", "above")), (-1, ("low", "below"))):
                wanted = [event for event in events if (op.name, event) in tally.wanted]
                levels = {event: level for event in wanted if (level := first_level(net, op, event, sign))}
                for event in sorted(levels, key=levels.__getitem__):  # what excludes most first
                    if (op.name, event) in tally.wanted:
                        decision.decide(op, event, sign, levels[event], nodes)


class _Decision:
    def __init__(self, relaxation: Relaxation, tally: Tally, take: Callable[[Codes], None]) -> None:
        self.relaxation, self.tally, self.take = relaxation, tally, take
        self._work = 0
        self._most: dict[tuple[str, int], Codes] = {}
        self._reaches: dict[tuple[str, int, int, int], Reach] = {}
        self._excluded: set[bytes] = set()  # programs: those of the positions of a convolution are the same

    def decide(self, op: Op, event: str, sign: int, level: int, nodes: int) -> None:
        """Look for an input that drives a value to a level, the likeliest first; without one, narrow what is known."""
        source = op.source if isinstance(op, Quantize) else op.name
        if (found := self.relaxation.bounds(source)) is None:
            return
        most = self._most.setdefault((source, sign), (found[1] if sign > 0 else -found[0]).copy())
        for element in np.argsort(-most, kind="stable").tolist():
            if most[element] < level:
                break
            key = source, sign, level, element
            if key not in self._reaches:
                self._reaches[key] = Reach(self.relaxation, source, element, sign, level)
            if not self._excludes(self._reaches[key], nodes, (op.name, event)):
                return
            most[element] = level - 1
            del self._reaches[key]
        channels, net = self.tally.net.shapes[source][-1], self.tally.net
        ends = np.array([most[channel::channels].max() for channel in range(channels)])
        ranges = net.ranges[source]
        self.tally.narrow(source, Ranges(ranges.lo, ends) if sign > 0 else Ranges(-ends, ranges.hi))

    def _excludes(self, reach: Reach, nodes: int, wanted: tuple[str, str]) -> bool:
        """Whether a search excludes what it looks for, on its way trying the inputs that it comes to."""
        search = reach.search
        if search.key in self._excluded:
            return True
        hopeless = search.nodes >= HOPELESS and not search.refuted
        if hopeless or self._affordable(search) < (nodes - search.nodes) / 2:
            return False
        while search.nodes < nodes and not search.ended and (affordable := self._affordable(search)):
            before = search.work
            search.run(min(nodes - search.nodes, affordable))
            self._work += search.work - before
            if len(search.points):
                self.take(reach.inputs)
                if wanted not in self.tally.wanted:
                    return False
        if search.excluded:
            self._excluded.add(search.key)
        return search.excluded

    def _affordable(self, search: Search) -> int:
        """How many nodes the work that is left suffices for."""
        return max(int((WORK - self._work) / search.node_work), 0)
