"""Codes for each layer by itself, whether or not an input of the network leads to them.

What a fault does may be seen only where no sample gets, and nobody may be able to tell whether any input does. A layer
that is given codes of its own cannot hide: its sums reach all that interval arithmetic leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.bounds import affine_parts
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Gather,
    Op,
    Pad,
    Quantize,
    Scale,
    Subtract,
    Upsample,
)

EVEN, SPARSE, ENDS, TURNS, TIES = 16, 32, 16, 16, 16  # samples of each kind
LARGEST = 1 << 24  # entries of the matrices that layers multiply by
_AFFINE = Dense | Conv | DepthwiseConv | Scale | AvgPool | Add | Subtract
Given = dict[str, Codes]


def layer_codes(net: QNet) -> Given | None:
    """Codes `(samples, *shape)` by op, of inputs and of all that is computed; None where a network is too large.

    They are drawn from what interval arithmetic leaves each channel: evenly, small ones among zeros, at both ends, one
    after the other, and half-way between two codes of a quantizer. Further samples drive sums to their ends.
    """
    if sum(_entries(net, op) for op in net.ops) > LARGEST:
        return None
    rng = np.random.default_rng(3)
    drawn = {op.name: _drawn(net, op, rng) for op in net.ops if not moves(op)}
    driven = [codes for op in net.ops if isinstance(op, _AFFINE) for codes in _driven(net, op)]
    for name, codes in drawn.items():
        others = codes[rng.integers(EVEN, size=len(driven))]
        for other, drive in zip(others, driven, strict=True):
            other[...] = drive.get(name, other)
        drawn[name] = np.concatenate([codes, others])
    return drawn


def moves(op: Op) -> bool:
    """Whether it computes nothing."""
    return isinstance(op, Pad | Upsample | Flatten | Gather | Concat)


def _ends(net: QNet, name: str) -> tuple[Codes, Codes]:
    """Least and greatest code of each value of a tensor, by interval arithmetic; of an input by its format."""
    shape = net.shapes[name]
    ranges = net.ranges[name]
    lo, hi = (np.resize(side, math.prod(shape)).reshape(shape) for side in (ranges.lo, ranges.hi))
    return lo, hi


def _drawn(net: QNet, op: Op, rng: np.random.Generator) -> Codes:
    lo, hi = _ends(net, op.name)

    def even(count: int) -> Codes:
        return rng.integers(lo, hi, (count, *lo.shape), np.int64, endpoint=True)

    def share(count: int) -> npt.NDArray[np.bool_]:
        """Some places of each sample, in few samples most."""
        shares = rng.random((count, *(1 for _ in lo.shape)))
        return rng.random((count, *lo.shape)) < shares

    small = even(SPARSE) >> rng.integers(0, 6, (SPARSE, *(1 for _ in lo.shape)))
    sparse = np.clip(np.where(share(SPARSE), small, 0), lo, hi)
    ends = np.where(share(ENDS), hi, lo)
    turns = np.arange(TURNS * lo.size).reshape(TURNS, *lo.shape)
    return np.concatenate([even(EVEN), sparse, ends, lo + turns % (hi - lo + 1), _ties(net, op, even(TIES), lo, hi)])


def _ties(net: QNet, op: Op, codes: Codes, lo: Codes, hi: Codes) -> Codes:
    """The nearest codes that are half-way between two of a quantizer that reads them, where there is one."""
    for reader in net.ops:
        if isinstance(reader, Quantize) and reader.source == op.name:
            shift = net.formats[op.name].frac - reader.format.frac
            if 0 < shift < net.formats[op.name].width:
                return np.clip((codes >> shift << shift) + (1 << shift - 1), lo, hi)
    return codes


def _entries(net: QNet, op: Op) -> int:
    read = sum(math.prod(net.shapes[name]) for name in _read(net, op))
    return read * math.prod(net.shapes[op.name]) if isinstance(op, _AFFINE) else 0


def _read(net: QNet, op: Op) -> list[str]:
    """The computed tensors whose values an op reads, moved or not."""
    names = [inner for name in op.reads for inner in (_read(net, net[name]) if moves(net[name]) else [name])]
    return list(dict.fromkeys(names))


def _made(net: QNet, op: Op, given: Given) -> Codes:
    """What an op makes of given codes of all that it reads, moved or not."""
    sources = [given[name] if name in given else _made(net, net[name], given) for name in op.reads]
    return op.run(net.sources(op), sources)


def _driven(net: QNet, op: Op) -> Iterator[Given]:
    """Codes of what an affine op reads that drive one of its sums to the largest, and one to the least, there is."""
    names = _read(net, op)
    constant, matrices = affine_parts(
        lambda codes: _made(net, op, dict(zip(names, codes, strict=True))), [net.shapes[name] for name in names]
    )
    ends, weights = {name: _ends(net, name) for name in names}, dict(zip(names, matrices, strict=True))
    for sign in (1, -1):
        most = sign * constant
        for name, (lo, hi) in ends.items():
            signed = sign * weights[name]
            most = most + np.maximum(signed, 0).T @ hi.ravel() + np.minimum(signed, 0).T @ lo.ravel()
        which = int(most.argmax())
        yield {
            name: np.where(sign * weights[name][:, which].reshape(lo.shape) > 0, hi, lo)
            for name, (lo, hi) in ends.items()
        }
