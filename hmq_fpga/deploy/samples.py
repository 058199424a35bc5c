"""Inputs made for what a test split does not reach: see `coverage` for what that is.

All of it is deterministic, and bounded by what it computes, not by a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.bounds import Relaxation
from hmq_fpga.deploy.coverage import Tally
from hmq_fpga.deploy.decide import decide_ends
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Input, Quantize

RANDOM = 256  # codes over the whole range of the input, and as many values beyond and between them
WORK = 2e9  # of all searches together, in products: a few seconds
_VALUE = 50  # products for which the time of one value of a tensor stands
DRAWN = 64  # random inputs, of which a search
STARTS = 4  # sets out from the best
ROUNDS = 12  # of one search
WHOLE_SEARCH = 2000  # evaluations below which none is begun
Samples = npt.NDArray[np.float32]
_FLOAT32_BITS = 24


def made_samples(net: QNet, tally: Tally, *, decide: bool = True) -> Samples:
    """Inputs `(n, *input_shape)` for what the samples that were counted have not reached; they are counted, too.

    Random codes over the whole format of each input, values beyond it and half-way between two codes; the codes that
    drive the sums of each layer to their ends, exact for sums of the inputs themselves; and what a search over input
    codes finds for each event that is still missing; at last branch and bound, which excludes what no input has.

    Args:
        net: the network.
        tally: what was reached before.
        decide: whether to do the last, which takes seconds.
    """
    values = sum(map(math.prod, net.shapes.values()))
    cost = sum(op.macs(net.tensors[op.name]) for op in net.ops) + _VALUE * values
    affordable = max(int(WORK / cost), 1)
    search = _Search(net, tally, affordable)
    search.take_all(_real(net, min(RANDOM, max(affordable // 8, 4))))
    search.take_all(search.decode(search.random(min(RANDOM, max(affordable // 8, 4)))))
    if all(op.format.width <= _FLOAT32_BITS for op in net.inputs) and affordable >= WHOLE_SEARCH:
        search.drive_sums()
        relaxation = Relaxation(net)
        _narrow(relaxation, tally)
        search.find_missing()
        if decide:
            decide_ends(relaxation, tally, search.try_near)
    return np.concatenate(search.kept)


def _narrow(relaxation: Relaxation, tally: Tally) -> None:
    """Exclude events by sharper bounds."""
    net = relaxation.net
    for op in net.ops:
        wanted = {tensor for tensor, _ in tally.wanted}
        if (op.name in wanted or any(op.name in net[name].reads for name in wanted)) and not isinstance(op, Input):
            if (ranges := relaxation.ranges(op.name)) is None:
                return
            tally.narrow(op.name, ranges)


def _real(net: QNet, count: int) -> Samples:
    """Values anywhere, up to eight times too large, and half-way between two codes."""
    rng = np.random.default_rng(1)
    parts = []
    for op in net.inputs:
        size, format = math.prod(op.shape), op.format
        halves = rng.integers(2 * format.lo - 3, 2 * format.hi + 4, (count // 2, size)) * (format.step / 2)
        beyond = rng.normal(scale=2.0 ** (format.threshold_log2 + 1), size=(count - count // 2, size))
        parts.append(np.concatenate([halves, beyond * rng.choice([1, 4], (len(beyond), 1))]))
    joined: Samples = np.concatenate(parts, axis=1).astype(np.float32)
    return joined.reshape(count, *net.input_shape)


class _Search:
    """Over the codes of the inputs, all in a row."""

    def __init__(self, net: QNet, tally: Tally, affordable: int) -> None:
        self.net, self.tally, self.left = net, tally, affordable
        sizes = [math.prod(op.shape) for op in net.inputs]
        self.lo = np.repeat([op.format.lo for op in net.inputs], sizes)
        self.hi = np.repeat([op.format.hi for op in net.inputs], sizes)
        self.step = np.repeat([op.format.step for op in net.inputs], sizes)
        self.rng = np.random.default_rng(0)
        self.kept: list[Samples] = []

    def decode(self, codes: Codes) -> Samples:
        """Real inputs `(n, *input_shape)` of codes `(n, values)`."""
        values: Samples = (codes * self.step).astype(np.float32)
        return values.reshape(len(codes), *self.net.input_shape)

    def random(self, count: int) -> Codes:
        """Codes over the whole range: evenly, at both ends, and mostly at one end."""
        shape = (count, len(self.lo))
        codes = self.rng.integers(self.lo, self.hi, shape, endpoint=True)
        ends = np.where(self.rng.random(shape) < self.rng.random((count, 1)), self.lo, self.hi)
        return np.where((np.arange(count) % 2 == 0)[:, None], codes, ends)

    def take_all(self, x: Samples) -> None:
        """Keep samples, whether or not they reach anything."""
        self.tally.add(x, "made")
        self.kept.append(x)

    def take_new(self, codes: Codes) -> None:
        """Keep those samples that reach something new."""
        x = self.decode(codes)
        self.kept.append(x[self.tally.add(x, "made")])

    def try_near(self, codes: Codes) -> None:
        """Keep what reaches something new, and likewise of the first with some values at random."""
        self.take_new(np.concatenate([codes, self._mixed(codes[0], codes[0])]))

    def drive_sums(self) -> None:
        """To the largest and the smallest sum of each linear op, as far as a few rounds come."""
        for op in self.net.linears:
            ranges = self.net.ranges[op.name]
            for sign, channel in ((1, int(ranges.hi.argmax())), (-1, int(ranges.lo.argmin()))):
                ends = [codes[:1] for codes in self.climb(op.name, channel, sign, rounds=2)]
                values = [int((self._values(end, op.name, channel) * sign).max()) for end in ends]
                self.take_all(self.decode(ends[int(np.argmax(values))]))

    def find_missing(self) -> None:
        """Search for each missing event, the likeliest channels first, until all is found or the work is done."""
        order = {op.name: number for number, op in enumerate(self.net.ops)}
        for turn in range(max(shape[-1] for shape in self.net.shapes.values())):
            searched = False
            for tensor, event in sorted(self.tally.wanted, key=lambda missing: (order[missing[0]], missing[1])):
                if (tensor, event) not in self.tally.wanted or self.left <= 0:
                    continue
                op = self.net[tensor]
                source = op.source if isinstance(op, Quantize) else tensor
                if isinstance(op, Input) or turn >= self.net.shapes[source][-1]:
                    continue
                searched = True
                for codes in self.climb(source, *self._aim(source, event, turn), rounds=ROUNDS):
                    self.take_new(codes)
                    if (tensor, event) not in self.tally.wanted:
                        break
            if not searched:
                return

    def _aim(self, source: str, event: str, turn: int) -> tuple[int, int]:
        """The channel to drive, and up or down."""
        ranges = self.net.ranges[source]
        if event in ("high", "above"):
            return int(np.argsort(-ranges.hi, kind="stable")[turn]), 1
        if event in ("low", "below"):
            return int(np.argsort(ranges.lo, kind="stable")[turn]), -1
        return turn, 1 if turn % 2 else -1

    def climb(self, tensor: str, channel: int, sign: int, *, rounds: int) -> Iterator[Codes]:
        """Drive a channel of a tensor up or down; each round's codes, the best first.

        A round tries either end for each input by itself, and then sets every input to the end that serves: for sums
        of the inputs that is the largest there is. It sets out from the best of random inputs, for the position where
        each is best and, lest that is at a border with zeros, for the one in the middle.
        """
        starts, positions = self.random(DRAWN), self.net.shapes[tensor][:-1]
        values = self._values(starts, tensor, channel) * sign
        best = np.argsort(-values.max(axis=1), kind="stable")[:STARTS]
        places = values[best].argmax(axis=1)
        places[::2] = np.ravel_multi_index([n // 2 for n in positions], positions) if positions else 0
        for start, place in zip(starts[best], places, strict=True):
            current, reached = start, None
            for _ in range(rounds):
                if self.left <= 0:
                    break
                tried = self._neighbours(current)
                gains = self._values(tried, tensor, channel)[:, place] * sign
                reached = gains[0] if reached is None else reached
                down, up = np.split(gains[1 : 1 + 2 * len(current)], 2)
                moved = np.where(up > down, self.hi, np.where(down > up, self.lo, current))
                together = np.concatenate([self._mixed(current, moved), moved[None]])
                tried = np.concatenate([together, tried])
                gains = np.concatenate([self._values(together, tensor, channel)[:, place] * sign, gains])
                order = np.argsort(-gains, kind="stable")
                yield tried[order]
                if gains[order[0]] <= reached:
                    break
                current, reached = tried[order[0]], gains[order[0]]
        yield starts[best]

    def _neighbours(self, current: Codes) -> Codes:
        """Itself, each value at its lower end, and each at its upper."""
        n = len(current)
        tried = np.tile(current, (1 + 2 * n, 1))
        tried[1 + np.arange(n), np.arange(n)] = self.lo
        tried[1 + n + np.arange(n), np.arange(n)] = self.hi
        return tried

    def _mixed(self, current: Codes, moved: Codes) -> Codes:
        """Some values of the one and some of the other, and some at random."""
        shape = (32, len(current))
        mixed = np.where(self.rng.random(shape) < self.rng.random((32, 1)), moved, current)
        anywhere = self.rng.integers(self.lo, self.hi, shape, endpoint=True)
        return np.where(self.rng.random(shape) < 2 / len(current), anywhere, mixed)

    def _values(self, codes: Codes, tensor: str, channel: int) -> Codes:
        """A channel's codes at all its positions, `(n, positions)`."""
        self.left -= len(codes)
        found = reference.trace(self.net, self.decode(codes))[tensor][..., channel]
        return found.reshape(len(codes), -1)
