"""A traced program cut open at the network's tensors: each can be given codes, and shows what is made of others.

Where a tensor's values are in a program is told by their forms, which are exact. What tracing made one function of with
what reads it, such as sums and their rounding, stays within a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.layers import moves
from hmq_fpga.deploy.parity import to_codes
from hmq_fpga.deploy.proof.forms import Forms, Value
from hmq_fpga.deploy.proof.network import input_forms, network_forms
from hmq_fpga.deploy.proof.program import program_forms
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Input

_INPUT = -1  # opcode
_CONSTANT, _ABSENT = -1, -2  # in the place of a value's number


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor is in a program.

    Attributes:
        numbers: the value of each element in a row; `_CONSTANT` where it is one, `_ABSENT` where nothing needs it.
        constants: the codes of those that are.
    """

    numbers: npt.NDArray[np.int64]
    constants: Codes

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """The elements that are values of the program."""
        return self.numbers >= 0


Places = Mapping[str, Place]


def find_places(net: QNet, program: Any) -> dict[str, Place]:
    """The computed tensors of which no element is more than one value of the program, by op.

    Without those that what comes after them reads past: it may have an element in another form.
    """
    forms = Forms()
    values = program_forms(program, input_forms(net, forms), forms).values
    numbers: dict[Any, list[int]] = {}
    for number, value in enumerate(values):
        numbers.setdefault(value.key, []).append(number)
    places: dict[str, Place] = {}
    inputs = {number for number, op in enumerate(program.ops) if op.opcode == _INPUT}
    for name, tensor in network_forms(net, forms).items():
        if isinstance(net[name], Input) or moves(net[name]) or (place := _place(tensor.ravel(), numbers)) is None:
            continue
        used = set(place.numbers[place.held].tolist())
        if used and not used & inputs and _separate(net, program, {**places, name: place}):
            places[name] = place
    return places


def _place(tensor: npt.NDArray[Any], numbers: Mapping[Any, list[int]]) -> Place | None:
    found = []
    for value in tensor:
        at = numbers.get(value.key, [_ABSENT]) if value.terms else [_CONSTANT]
        if len(at) > 1:
            return None
        found += at
    return Place(np.array(found), np.array([0 if value.terms else _code(value) for value in tensor]))


def _code(value: Value) -> int:
    return value.constant >> value.exp if value.exp >= 0 else value.constant << -value.exp


def _separate(net: QNet, program: Any, places: Places) -> bool:
    """Whether what makes each tensor, and each output, reads only what the network's op reads."""
    owners: dict[int, frozenset[str]] = {}  # one value may be of several tensors
    for name, place in places.items():
        for n in place.numbers[place.held].tolist():
            owners[n] = owners.get(n, frozenset()) | {name}
    inputs = [frozenset([op.name]) for op in net.inputs for _ in range(int(np.prod(op.shape)))]
    bits = {owned: 1 << i for i, owned in enumerate({*inputs, *owners.values()})}
    made: list[int] = []
    for op in program.ops:
        mask = bits[inputs[op.data[0]]] if op.opcode == _INPUT else 0
        for address in op.addr:
            mask |= bits[owners[address]] if address in owners else made[address]
        made.append(mask)

    def read(name: str) -> set[str]:
        """The opened tensors, and inputs, that an op reads."""
        opened = [
            {source} if isinstance(net[source], Input) or source in places else read(source)
            for source in net[name].reads
        ]
        return set().union(*opened)

    def other(name: str) -> int:
        """All but those."""
        allowed = read(name)
        return sum(bit for owned, bit in bits.items() if not owned & allowed)

    outputs = np.split(np.array(program.out_idxs), np.cumsum([int(np.prod(net.shapes[n])) for n in net.outputs])[:-1])
    values = [(name, place.numbers[place.held]) for name, place in places.items()]
    values += [(name, part[part >= 0]) for name, part in zip(net.outputs, outputs, strict=True)]
    return not any(made[n] & mask for name, numbers in values for mask in [other(name)] for n in numbers.tolist())


class OpenedProgram:
    """A program each of whose layers can be run by itself."""

    def __init__(self, net: QNet, program: Any, places: Places) -> None:
        """Open a program.

        Args:
            net: the network.
            program: traced of it, or another one with as many values.
            places: where the tensors are in it.
        """
        self.net, self.places = net, places
        every = [place.numbers[place.held] for place in places.values()]
        self._numbers = np.unique(np.concatenate([np.empty(0, np.int64), *every]))
        self._steps, self._lo, self._hi = (
            np.array([getattr(program.ops[n].qint, side) for n in self._numbers]) for side in ("step", "min", "max")
        )
        first, count, kind = program.shape[0], len(self._numbers), type(program.ops[0])
        at = {int(n): i for i, n in enumerate(self._numbers)}
        given = [
            kind(addr=(), opcode=_INPUT, data=(first + i,), qint=program.ops[n].qint, latency=0.0, cost=0.0)
            for n, i in at.items()
        ]
        rest = [op._replace(addr=tuple(at.get(n, count + n) for n in op.addr)) for op in program.ops]
        self._program = program._replace(
            shape=(first + count, program.shape[1] + count),
            inp_shifts=[*program.inp_shifts, *[0] * count],
            out_idxs=[*(n if n < 0 else count + n for n in program.out_idxs), *(count + n for n in at)],
            out_shifts=[*program.out_shifts, *[0] * count],
            out_negs=[*program.out_negs, *[False] * count],
            ops=given + rest,
        )

    def takes(self, codes: Mapping[str, Codes]) -> dict[str, Codes]:
        """The nearest codes that the words of the program hold; elements that are one value have one code."""
        taken = {op.name: codes[op.name] for op in self.net.inputs}
        count = len(next(iter(codes.values())))
        held = np.zeros((count, len(self._numbers)), np.int64)
        for name, place in reversed([*self.places.items()]):  # of one value's codes those of the first element stay
            at = np.searchsorted(self._numbers, place.numbers[place.held])
            held[:, at[::-1]] = codes[name].reshape(count, -1)[:, place.held][:, ::-1]
        held = np.clip(np.rint(held / self._steps) * self._steps, self._lo, self._hi).astype(np.int64)
        for name, place in self.places.items():
            rows = np.where(place.numbers == _CONSTANT, place.constants, codes[name].reshape(count, -1))
            rows[:, place.held] = held[:, np.searchsorted(self._numbers, place.numbers[place.held])]
            taken[name] = rows.reshape(codes[name].shape)
        return taken

    def layers(self, given: Mapping[str, Codes]) -> dict[str, Codes]:
        """What is made of given codes, of each tensor and of the outputs; what the program lacks is the network's."""
        count = len(next(iter(given.values())))
        rows = np.empty((count, len(self._numbers)))
        for name, place in self.places.items():
            at = np.searchsorted(self._numbers, place.numbers[place.held])
            rows[:, at] = given[name].reshape(count, -1)[:, place.held]
        inputs = [given[op.name].reshape(count, -1) for op in self.net.inputs]
        values = self._program.predict(np.concatenate([*inputs, rows], axis=1).astype(np.float64))
        outputs, made_values = np.split(
            values.reshape(count, -1), [self._program.shape[1] - len(self._numbers)], axis=1
        )
        joined = outputs.reshape(count, *self.net.output_shape) * self.net.output_format.step
        made = {name: to_codes(part, self.net.formats[name], name) for name, part in self.net.split(joined).items()}
        wanted = reference.layers(self.net, given)
        for name, place in self.places.items():
            codes = made.get(name, wanted[name]).reshape(count, -1).copy()
            codes[:, place.held] = made_values[:, np.searchsorted(self._numbers, place.numbers[place.held])]
            made[name] = codes.reshape(count, *self.net.shapes[name])
        return made
