"""A planted fault, and whether it makes a difference for any input at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.bounds import Relaxation
from hmq_fpga.deploy.parity import Simulator
from hmq_fpga.deploy.proof.forms import Forms, Value
from hmq_fpga.deploy.proof.network import Cast, network_forms, output_forms
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Op

SEARCHED = 20_000  # inputs that are tried at random, and as many near parity's, for a fault that it did not catch
AT_ONCE = 4_000
KEPT = 100  # inputs from which a round of the search goes on
ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """The network that a fault makes of a network.

    Attributes:
        net: with other constants or formats.
        casts: types that are none of a network's, by op.
    """

    net: QNet
    casts: Mapping[str, Cast] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A planted fault.

    Attributes:
        backend: in whose copy.
        kind: what sort of fault.
        where: file and tensor.
        change: what was there and what is.
        simulator: enters a simulator with the fault.
        meaning: what it makes of the network, where that is known.
        judge: says of a fault that is not caught why it makes no difference, or shows an input; where there is no
            meaning.
    """

    backend: str
    kind: str
    where: str
    change: str
    simulator: Callable[[], AbstractContextManager[Simulator]]
    meaning: Meaning | None = None
    judge: Callable[[Codes], tuple[str | None, list[int] | None]] | None = None

    def judged(self, net: QNet, x: npt.NDArray[np.float32]) -> tuple[str | None, list[int] | None]:
        """Why it makes no difference for any input, None if that is not so; and an input for which it does.

        Args:
            net: the network.
            x: real inputs `(batch, *input_shape)` near which one is looked for.
        """
        near = net.encode(x).reshape(len(x), -1)
        if self.judge:
            return self.judge(near)
        if self.meaning is None:
            return None, None
        if _same(net, self.meaning):
            return "equal for all inputs: every output has the network's own form", None
        meaning = self.meaning
        return None, witness(net, near, lambda codes: _compared(net, meaning, codes))


def with_op(net: QNet, op: Op, **changes: Any) -> QNet:
    """A network with other fields of an op."""
    return QNet(tuple(replace(o, **changes) if o.name == op.name else o for o in net.ops), net.outputs)


def _same(net: QNet, meaning: Meaning) -> bool:
    """Whether all outputs are the same functions of the inputs: by interval arithmetic, or else by sharper bounds."""
    return any(
        _keys(net, Meaning(net=net), forms, sharp) == _keys(net, meaning, forms, sharp)
        for forms, sharp in ((Forms(), False), (Forms(), True))
    )


def _keys(net: QNet, meaning: Meaning, forms: Forms, sharp: bool) -> list[Any]:
    """Of the real values of all outputs."""
    made, relaxation = meaning.net, Relaxation(meaning.net) if sharp else None
    tensors = network_forms(made, forms, meaning.casts, relaxation=relaxation)
    shift = net.output_format.frac - made.output_format.frac
    return [forms.shifted(value, shift).key for value in output_forms(made, forms, tensors)]


Compared = tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]


def witness(net: QNet, near: Codes, compare: Callable[[Codes], Compared]) -> list[int] | None:
    """Codes of an input for which two things differ: among random ones and ones near others, then by a guided search.

    The search goes on from those inputs for which a difference comes furthest towards the outputs.

    Args:
        net: the network.
        near: codes of inputs `(n, values)`, near which is looked.
        compare: for each of some inputs whether an output differs, and how far a difference comes.
    """
    sizes = [math.prod(op.shape) for op in net.inputs]
    lo, hi = (np.repeat([getattr(op.format, side) for op in net.inputs], sizes) for side in ("lo", "hi"))
    rng = np.random.default_rng(2)
    best, furthest = np.empty((0, len(lo)), np.int64), np.empty(0)
    batches = 2 * SEARCHED // AT_ONCE
    for number in range(batches + ROUNDS):
        if number >= batches:
            codes = _mutated(best, lo, hi, rng)
        elif number % 2:
            codes = _mutated(near, lo, hi, rng)
        else:
            codes = rng.integers(lo, hi, (AT_ONCE, len(lo)), dtype=np.int64, endpoint=True)
        differs, reached = compare(codes)
        if differs.any():
            shown: list[int] = codes[differs.argmax()].tolist()
            return shown
        best, furthest = np.concatenate([best, codes]), np.concatenate([furthest, reached])
        order = np.argsort(-furthest, kind="stable")[:KEPT]
        best, furthest = best[order], furthest[order]
    return None


def _mutated(codes: Codes, lo: Codes, hi: Codes, rng: np.random.Generator) -> Codes:
    """Inputs with some values anywhere or at an end."""
    chosen = codes[rng.integers(len(codes), size=AT_ONCE)]
    anywhere = rng.integers(lo, hi, chosen.shape, endpoint=True)
    ends = np.where(rng.random(chosen.shape) < 0.5, lo, hi)
    changed = rng.random(chosen.shape) < rng.choice([1.5 / len(lo), 0.1, 0.4], (len(chosen), 1))
    mutated: Codes = np.where(changed, np.where(rng.random(chosen.shape) < 0.5, anywhere, ends), chosen)
    return mutated


def _compared(net: QNet, meaning: Meaning, codes: Codes) -> Compared:
    """For each input whether an output differs, and how far a difference comes: later tensors count for more."""
    both = [_followed(net, made, codes) for made in (Meaning(net=net), meaning)]
    reached = np.zeros(len(codes))
    for depth, name in enumerate(both[0]):
        largest = np.abs(both[0][name] - both[1][name]).max(axis=1)
        reached = np.where(largest > 0, depth + largest / (1 + largest), reached)
    return np.any([(both[0][name] != both[1][name]).any(axis=1) for name in net.outputs], axis=0), reached


def _followed(net: QNet, meaning: Meaning, codes: Codes) -> dict[str, npt.NDArray[np.float64]]:
    """Real values of all tensors but the inputs, `(batch, values)`, by op; in codes of the network's."""
    forms, made = Forms(), meaning.net
    tensors = network_forms(made, forms, meaning.casts, forms.sampled(codes))
    inputs = {op.name for op in net.inputs}
    return {
        name: np.stack(
            [
                _reals(forms, value, net.formats[name].frac - made.formats[name].frac, len(codes))
                for value in values.ravel()
            ],
            axis=1,
        )
        for name, values in tensors.items()
        if name not in inputs
    }


def _reals(forms: Forms, value: Value, shift: int, samples: int) -> npt.NDArray[np.float64]:
    plain = forms.shifted(value, value.exp)
    reals: npt.NDArray[np.float64] = forms.simulated(plain, samples) * 2.0 ** (shift - value.exp)
    return reals


def type_cast(text: str, frac: int, *, before: bool, target: int) -> Cast:
    """What a C++ type such as `ap_fixed<8,3,AP_RND,AP_WRAP>` makes of codes with fraction `frac`.

    Args:
        text: the type; without modes it truncates and wraps.
        frac: of the codes that it is given.
        before: see `Cast`.
        target: fraction that the tensor has in the network.
    """
    kind, width, integer, *modes = re.findall(r"[\w-]+", text)
    signed = not kind.startswith("ap_u")
    format = Fixed(signed=signed, width=int(width), frac=int(width) - int(integer))
    rounding = next((m for m in modes if m.startswith(("AP_RND", "AP_TRN"))), "AP_TRN")
    saturates = "AP_SAT" in modes
    down = frac - format.frac

    def function(codes: Codes) -> Codes:
        if down <= 0:
            rounded = codes << -down
        elif rounding == "AP_RND":
            rounded = (codes + (1 << down - 1)) >> down
        elif rounding == "AP_RND_CONV":
            rounded = Fixed(signed=True, width=62, frac=format.frac).requantize(codes, frac)
        else:
            rounded = codes >> down
        if saturates:
            return np.clip(rounded, format.lo, format.hi)
        return ((rounded - format.lo) & ((1 << format.width) - 1)) + format.lo

    return Cast(f"{text} of {frac}", function, format.frac - target, before)
