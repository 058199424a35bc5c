"""Whether a traced program and its Verilog compute a network for every input; if not, an input that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hmq_fpga.deploy.bounds import Relaxation
from hmq_fpga.deploy.coverage import Tally
from hmq_fpga.deploy.proof.forms import Forms, Value
from hmq_fpga.deploy.proof.netlist import elaborate, netlist_forms
from hmq_fpga.deploy.proof.network import input_forms, network_forms, output_forms
from hmq_fpga.deploy.proof.program import program_forms
from hmq_fpga.deploy.rtl.project import CORE, TOP, RtlProject
from hmq_fpga.deploy.rtl.trace import Interpreter, load_program
from hmq_fpga.deploy.samples import made_samples
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet

RANDOM = 2000  # inputs that are tried where a proof fails
EXHAUSTIVE_BITS = 16  # of all inputs together, up to which all of them are tried
State = Literal["proved", "refuted", "left"]


@dataclass(frozen=True, kw_only=True)
class Counterexample:
    """An input for which an output is not the network's.

    Attributes:
        inputs: codes of all inputs in a row.
        output: the output, counted in a row.
        expected, actual: its codes.
    """

    inputs: tuple[int, ...]
    output: int
    expected: int
    actual: int

    def to_json(self) -> dict[str, Any]:
        """The entry `counterexample`."""
        return {
            "inputs": list(self.inputs),
            "output": self.output,
            "expected": self.expected,
            "actual": self.actual,
        }


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was shown of a program or of Verilog.

    Attributes:
        subject: `program` or `verilog`.
        outputs: how many there are.
        shown: for how many of them equality holds for every input.
        left: one line for each thing that could not be shown.
        counterexample: where it is refuted.
        seconds: what it took.
    """

    subject: str
    outputs: int
    shown: int
    left: tuple[str, ...]
    counterexample: Counterexample | None
    seconds: float

    @property
    def state(self) -> State:
        """`proved` for all inputs, `refuted` by one, or `left` open."""
        if self.counterexample:
            return "refuted"
        return "left" if self.left or self.shown < self.outputs else "proved"

    def to_json(self) -> dict[str, Any]:
        """One entry of `proofs` in `audit.json`."""
        return {
            "subject": self.subject,
            "state": self.state,
            "outputs": self.outputs,
            "shown": self.shown,
            "left": list(self.left),
            "counterexample": self.counterexample.to_json() if self.counterexample else None,
            "seconds": round(self.seconds, 3),
        }


def prove(net: QNet, project: RtlProject) -> list[Proof]:
    """Both proofs of a network's RTL project, from what is on disk.

    Raises:
        ToolMissing: without Yosys, by which the Verilog is read.
        ToolFailed: where it cannot read it.
    """
    return [prove_program(net, load_program(project.folder)), prove_verilog(net, project)]


def prove_program(net: QNet, program: Any) -> Proof:
    """Whether a traced program equals a network, every value in between in the word that hardware has for it."""

    def follow(inputs: Sequence[Value], forms: Forms) -> tuple[list[Value], list[str]]:
        found = program_forms(program, inputs, forms)
        return found.outputs, found.overflows

    def simulate(codes: Codes) -> Codes:
        return Interpreter(net=net, program=program).run(codes)

    return _proof("program", net, follow, simulate)


def prove_verilog(net: QNet, project: RtlProject) -> Proof:
    """Whether Verilog equals a network, and comes after as many registers as its record says.

    Raises:
        ToolMissing: without Yosys.
        ToolFailed: where it cannot read the Verilog.
    """
    started = time.perf_counter()
    netlist = elaborate(project.sources, TOP, [CORE, "logic*"])

    def follow(inputs: Sequence[Value], forms: Forms) -> tuple[list[Value], list[str]]:
        outputs, stages = netlist_forms(netlist, inputs, project.input_port, project.output_port, forms)
        late = sorted(stages - {project.latency_cycles})
        lines = [f"an output comes after {n} registers, not {project.latency_cycles}" for n in late]
        return outputs, lines

    def simulate(codes: Codes) -> Codes:
        forms = Forms()
        outputs, _ = follow(forms.sampled(codes), forms)
        return np.stack([forms.simulated(value, len(codes)) for value in outputs], axis=1)

    proof = _proof("verilog", net, follow, simulate)
    return replace(proof, seconds=time.perf_counter() - started)


Follow = Callable[[Sequence[Value], Forms], tuple[list[Value], list[str]]]
Simulate = Callable[[Codes], Codes]  # input codes in a row to output codes in a row, `(samples, values)`


def _proof(subject: str, net: QNet, follow: Follow, simulate: Simulate) -> Proof:
    started = time.perf_counter()
    outputs = sum(int(np.prod(net.shapes[name])) for name in net.outputs)
    shown, found = 0, None
    left: list[str] = []
    try:
        shown, left = _followed(net, follow, None)
        if shown < outputs or left:
            found = _refuted(net, simulate)
            if found is None and _input_bits(net) <= EXHAUSTIVE_BITS:
                shown = outputs
            elif found is None:
                shown, left = _followed(net, follow, Relaxation(net))
        if shown < outputs:
            left.append(f"{outputs - shown} of {outputs} outputs have another form than the network's")
    except InvalidInput as error:
        left = [str(error)]
    return Proof(
        subject=subject,
        outputs=outputs,
        shown=shown,
        left=tuple(left),
        counterexample=found,
        seconds=time.perf_counter() - started,
    )


def _followed(net: QNet, follow: Follow, relaxation: Relaxation | None) -> tuple[int, list[str]]:
    """How many outputs have the network's form, and what else is not shown."""
    forms = Forms()
    expected = output_forms(net, forms, network_forms(net, forms, relaxation=relaxation))
    actual, left = follow(input_forms(net, forms), forms)
    return sum(a.key == b.key for a, b in zip(actual, expected, strict=True)), left


def _refuted(net: QNet, simulate: Simulate) -> Counterexample | None:
    """On all inputs where they are few, else on random ones and made ones."""
    codes = _tried(net)
    actual = simulate(codes)
    expected = reference.run(net, _decoded(net, codes)).reshape(actual.shape)
    at = np.argwhere(actual != expected)
    if not len(at):
        return None
    sample, output = (int(i) for i in at[0])
    return Counterexample(
        inputs=tuple(codes[sample].tolist()),
        output=output,
        expected=int(expected[sample, output]),
        actual=int(actual[sample, output]),
    )


def _tried(net: QNet) -> Codes:
    """Input codes in a row."""
    sizes = [int(np.prod(op.shape)) for op in net.inputs]
    lo, hi = (np.repeat([getattr(op.format, side) for op in net.inputs], sizes) for side in ("lo", "hi"))
    if _input_bits(net) <= EXHAUSTIVE_BITS:
        every = np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(lo, hi, strict=True)), indexing="ij")
        return np.asarray(np.stack(every, axis=-1).reshape(-1, len(lo)), np.int64)
    drawn = np.random.default_rng(0).integers(lo, hi, (RANDOM, len(lo)), endpoint=True)
    made = net.encode(made_samples(net, Tally(net), decide=False))
    return np.asarray(np.concatenate([drawn, made.reshape(len(made), -1)]), np.int64)


def _decoded(net: QNet, codes: Codes) -> np.ndarray[Any, Any]:
    """Real inputs of codes, exact in float64."""
    steps = np.repeat([op.format.step for op in net.inputs], [int(np.prod(op.shape)) for op in net.inputs])
    values: np.ndarray[Any, Any] = codes * steps
    return values.reshape(len(codes), *net.input_shape)


def _input_bits(net: QNet) -> int:
    return sum(op.format.width * int(np.prod(op.shape)) for op in net.inputs)
