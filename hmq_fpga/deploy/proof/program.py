"""A traced program in canonical forms, each of its values held against the word that the hardware has for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hmq_fpga.deploy.proof.forms import Forms, Value
from hmq_fpga.deploy.proof.network import product, select
from hmq_fpga.ir.fixed import Codes


@dataclass(frozen=True)
class ProgramForms:
    """What a program computes.

    Attributes:
        values: each of its values.
        outputs: its outputs in a row.
        overflows: one line for each value that is not shown to fit its word.
    """

    values: list[Value]
    outputs: list[Value]
    overflows: list[str]


def program_forms(program: Any, inputs: Sequence[Value], forms: Forms) -> ProgramForms:
    """Follow alkaid's program (`CombLogic`) from the forms of its inputs."""
    reader = _Reader(program, inputs, forms)
    for number, op in enumerate(program.ops):
        reader.take(number, op)
    outputs = []
    for index, shift, negative in zip(program.out_idxs, program.out_shifts, program.out_negs, strict=True):
        value = reader.values[index] if index >= 0 else forms.constant(0)
        value = forms.shifted(value, int(shift))
        outputs.append(forms.sum([(value, -1)]) if negative else value)
    return ProgramForms(reader.values, outputs, reader.overflows)


class _Reader:
    def __init__(self, program: Any, inputs: Sequence[Value], forms: Forms) -> None:
        self.program, self.inputs, self.forms = program, inputs, forms
        self.values: list[Value] = []
        self.overflows: list[str] = []

    def take(self, number: int, op: Any) -> None:
        value = self._value(op)
        signed, integer, frac = (int(n) for n in op.qint.kif)
        if op.opcode not in (2, 3, 6) and not self._fits(value, signed, integer, frac):
            lo, hi = self.forms.bounds(value)
            self.overflows.append(
                f"value {number} of the program, {lo} … {hi} times 2**{-value.exp}, is not shown to fit its word of "
                f"{signed + integer + frac} bits"
            )
        self.values.append(value)

    def _value(self, op: Any) -> Value:
        forms, at = self.forms, [self.values[i] for i in op.addr]
        match op.opcode:
            case -2:
                return forms.sum([(at[0], -1)])
            case -1:
                place = op.data[0]
                return forms.shifted(self.inputs[place], int(self.program.inp_shifts[place]))
            case 0 | 1:
                return forms.sum([(at[0], 1), (forms.shifted(at[1], op.data[0]), 1 - 2 * op.opcode)])
            case 4:
                return forms.sum([(at[0], 1), (forms.constant(op.data[0], op.data[1]), 1)])
            case 5:
                return forms.constant(op.data[0], -round(math.log2(op.qint.step)))
            case 11:
                signs, shifts = op.data[0::2], op.data[1::2]
                return forms.sum(
                    [(forms.shifted(v, k), 1 if plus else -1) for v, plus, k in zip(at, signs, shifts, strict=True)]
                )
            case 2:
                return self._held(op, self._function(("relu",), _relu, at[0], keep=True))
            case 3:
                return self._held(op, forms.shifted(at[0], op.data[0]))
            case 6:
                return self._held(op, self._mux(op, *at))
            case 7:
                return product(forms, at[0], at[1])
            case 8:
                return self._lookup(op, at[0])
            case 9:
                return self._unary(op, at[0])
            case 10:
                return self._binary(op, at[0], at[1])
            case _:
                return forms.opaque(("op", op.opcode, *op.data), at, *self._word(op))

    def _word(self, op: Any) -> tuple[int, int]:
        """The range of an op's word, at its step."""
        signed, integer, frac = (int(n) for n in op.qint.kif)
        return (-(1 << integer + frac) if signed else 0), (1 << integer + frac) - 1

    def _fits(self, value: Value, signed: int, integer: int, frac: int) -> bool:
        """Whether a value is on the grid and within the range of a word."""
        odd = value.key[0] if value.terms or value.constant else frac
        lo, hi = self.forms.bounds(value)
        most = _scale(1, integer + value.exp)
        return odd <= frac and lo >= (-most if signed else 0) and hi < most

    def _held(self, op: Any, value: Value) -> Value:
        """A value cut to the word of an op: the bits below and above are left out."""
        signed, integer, frac = (int(n) for n in op.qint.kif)
        if self._fits(value, signed, integer, frac):
            return value
        down = value.exp - frac

        def cut(x: Codes) -> Codes:
            codes = x >> down if down >= 0 else x << -down
            size, offset = 1 << signed + integer + frac, signed << integer + frac
            return ((codes + offset) & (size - 1)) - offset

        found = self._function(("cut", signed, integer + frac, down), cut, value)
        return self.forms.shifted(found, -frac)

    def _function(self, name: tuple[Any, ...], function: Any, *values: Value, keep: bool = False) -> Value:
        """A function of the numerators, or something that is not looked into; at the exponent of the values or zero."""
        found = self.forms.apply(name, function, *values)
        if found is None:
            bounds = [self.forms.bounds(v) for v in values]
            most = max(1, *(max(abs(lo), abs(hi)) for lo, hi in bounds))
            found = self.forms.opaque(name, values, -most - 1, most)
        return self.forms.shifted(found, -values[0].exp) if keep else found

    def _aligned(self, *values: Value) -> list[Value]:
        """The same values with one exponent."""
        exp = max(v.exp for v in values)
        zero = Value(exp, 0, {})
        return [self.forms.sum([(v, 1), (zero, 1)]) for v in values]

    def _mux(self, op: Any, true: Value, false: Value, key: Value) -> Value:
        source = self.program.ops[op.addr[2]].qint
        limit = 0 if source.min < 0 else _scale(1, int(source.kif[1]) - 1 + key.exp)
        below = source.min < 0
        false = self.forms.shifted(false, op.data[0])
        return select(self.forms, ("mux", limit, below), lambda k: (k < limit) == below, key, true, false)

    def _lookup(self, op: Any, value: Value) -> Value:
        source = self.program.ops[op.addr[0]].qint
        table = self.program.lookup_tables[op.data[0]]
        first, frac = round(source.min / source.step), -round(math.log2(source.step))
        out = -round(math.log2(table.spec.out_qint.step)) if table.spec.out_qint.step else 0
        entries = np.rint(np.asarray(table.float_table, np.float64) * 2.0**out).astype(np.int64)
        down = value.exp - frac
        found = self._function(
            ("lookup", entries.tobytes(), first, down),
            lambda x: entries[np.clip((x >> down if down >= 0 else x << -down) - first, 0, len(entries) - 1)],
            value,
        )
        return self.forms.shifted(found, -out)

    def _unary(self, op: Any, value: Value) -> Value:
        signed, integer, frac = (int(n) for n in self.program.ops[op.addr[0]].qint.kif)
        down, bits = value.exp - frac, signed + integer + frac
        _, _, out = (int(n) for n in op.qint.kif)
        lowest, size = self._word(op)[0], sum(int(n) for n in op.qint.kif)

        def function(x: Codes) -> Any:
            word = (x >> down if down >= 0 else x << -down) & ((1 << bits) - 1)
            match op.data[0]:
                case 0:
                    flipped = ~word & ((1 << size) - 1)
                    return np.where(flipped >= 1 << size - 1, flipped - (1 << size), flipped) if lowest < 0 else flipped
                case 1:
                    return (word != 0).astype(np.int64)
                case _:
                    return (word == (1 << bits) - 1).astype(np.int64)

        found = self._function(("unary", op.data[0], down, bits, size, lowest < 0), function, value)
        return self.forms.shifted(found, -out)

    def _binary(self, op: Any, first: Value, second: Value) -> Value:
        shift, kind = op.data
        first, second = self._aligned(first, self.forms.shifted(second, shift))
        operation = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)[kind]
        return self._held(op, self._function(("binary", kind), operation, first, second, keep=True))


def _relu(x: Codes) -> Codes:
    return np.maximum(x, 0)


def _scale(number: int, shift: int) -> float:
    return number * 2.0**shift
