"""Faults of a traced program, simulated by the tracer's interpreter: those of the Verilog that is written from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.audit.fault import Compared, Fault, witness
from hmq_fpga.deploy.proof.opened import Places, find_places
from hmq_fpga.deploy.proof.prove import prove_program
from hmq_fpga.deploy.rtl.trace import Interpreter
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet

Change = Callable[[Any], Any]
_KINDS: tuple[tuple[str, tuple[int, ...], Change], ...] = (
    ("shift of an alignment", (0, 1), lambda op: op._replace(data=(op.data[0] + 1,))),
    ("shift of an alignment", (0, 1), lambda op: op._replace(data=(op.data[0] - 1,))),
    ("sign", (0, 1), lambda op: op._replace(opcode=1 - op.opcode)),
    ("constant", (4,), lambda op: op._replace(data=(op.data[0] + 1, *op.data[1:]))),
    ("rounding", (3,), lambda op: op._replace(data=(op.data[0] + 1,))),
    ("rounding", (10,), lambda op: op._replace(data=(op.data[0], (op.data[1] + 1) % 3))),
    ("saturation", (6,), lambda op: op._replace(addr=(op.addr[1], op.addr[0], op.addr[2]))),
    ("connection", (0, 1, 4), lambda op: op._replace(addr=(op.addr[0] - 1, *op.addr[1:]))),
)


def program_faults(net: QNet, program: Any, rng: np.random.Generator) -> Iterator[Fault]:
    """Faults of single operations, of table entries and of swapped outputs, without end."""
    places = find_places(net, program)
    while True:
        if program.lookup_tables and rng.random() < 1 / (1 + len(_KINDS)):
            yield _fault(net, places, *_entry(program, rng))
        elif program.shape[1] > 1 and rng.random() < 1 / (1 + len(_KINDS)):
            yield _fault(net, places, *_swapped(program, rng))
        else:
            kind, codes, change = _KINDS[rng.integers(len(_KINDS))]
            numbers = [i for i, op in enumerate(program.ops) if op.opcode in codes and (not op.addr or op.addr[0] > 0)]
            if numbers:
                number = int(rng.choice(numbers))
                ops = list(program.ops)
                ops[number] = changed = change(ops[number])
                yield _fault(
                    net,
                    places,
                    program._replace(ops=ops),
                    kind,
                    f"value {number}",
                    f"{_told(program.ops[number])} to {_told(changed)}",
                )


def _told(op: Any) -> str:
    return f"op {op.opcode} of {list(op.addr)} with {list(op.data)}"


def _entry(program: Any, rng: np.random.Generator) -> tuple[Any, str, str, str]:
    tables = list(program.lookup_tables)
    which = int(rng.integers(len(tables)))
    entries = tables[which].float_table
    at = int(rng.integers(len(entries)))
    step = tables[which].spec.out_qint.step
    changed = entries.copy()
    changed[at] += step if changed[at] < changed.max() else -step
    table = type(tables[which])(*_spec(tables[which], changed))
    tables[which] = table
    told = f"{entries[at]:g} to {changed[at]:g}"
    return program._replace(lookup_tables=tuple(tables)), "table entry", f"table {which}, entry {at}", told


def _spec(table: Any, values: npt.NDArray[np.float64]) -> tuple[Any, ...]:
    """A table's own specification with other values, which are on its grid and within its range."""
    codes = np.rint(values / table.spec.out_qint.step).astype(table.table.dtype)
    return table.spec, codes, table.mask


def _swapped(program: Any, rng: np.random.Generator) -> tuple[Any, str, str, str]:
    first, second = (int(i) for i in rng.choice(program.shape[1], 2, replace=False))
    fields = {}
    for name in ("out_idxs", "out_shifts", "out_negs"):
        values = list(getattr(program, name))
        values[first], values[second] = values[second], values[first]
        fields[name] = values
    return program._replace(**fields), "swapped channels", "outputs", f"{first} and {second}"


def _fault(net: QNet, places: Places, program: Any, kind: str, where: str, change: str) -> Fault:
    faulty = Interpreter(net=net, program=program, places=places)

    def judge(near: Codes) -> tuple[str | None, list[int] | None]:
        proof = prove_program(net, program)
        if proof.state == "proved":
            return "equal for all inputs: proved", None
        if proof.counterexample:
            return None, list(proof.counterexample.inputs)
        step = np.repeat([op.format.step for op in net.inputs], [math.prod(op.shape) for op in net.inputs])

        def compare(codes: Codes) -> Compared:
            x = (codes * step).reshape(len(codes), *net.input_shape)
            off = np.abs(faulty.predict(x.astype(np.float32)) - reference.run(net, x)).reshape(len(x), -1).max(axis=1)
            return off > 0, off.astype(np.float64)

        return None, witness(net, near, compare)

    return Fault(
        backend="rtl", kind=kind, where=where, change=change, simulator=lambda: nullcontext(faulty), judge=judge
    )
