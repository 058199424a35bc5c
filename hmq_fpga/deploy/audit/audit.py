"""How many planted faults parity catches, and of each other one why."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.audit.fault import Fault
from hmq_fpga.deploy.audit.firmware import Firmware
from hmq_fpga.deploy.audit.program import program_faults
from hmq_fpga.deploy.backends import HLS, QKERAS, RTL, split_by_installed
from hmq_fpga.deploy.coverage import Tally
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.layers import layer_codes
from hmq_fpga.deploy.parity import Layered, Simulator, compare_layers
from hmq_fpga.deploy.proof.prove import Proof, prove
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.trace import load_program
from hmq_fpga.deploy.samples import made_samples
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet

Result = Literal["caught", "equal", "hole"]
Samples = npt.NDArray[np.float32]
_SHOWN = "no sample of parity shows it, but an input does"
_OPEN = "no input that was tried shows it, nor is it shown that none does"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a planted fault.

    Attributes:
        backend, kind, where, change: the fault.
        result: `caught` by parity; `equal`, since no input tells it from the network; or a `hole`.
        reason: how it was caught, or why it is equal.
        inputs: codes of an input that shows a hole, if one was found.
    """

    backend: str
    kind: str
    where: str
    change: str
    result: Result
    reason: str
    inputs: Sequence[int] | None = None

    def to_json(self) -> dict[str, Any]:
        """One entry of `mutants` in `audit.json`."""
        return {**vars(self), "inputs": None if self.inputs is None else list(self.inputs)}


@dataclass(frozen=True)
class Audit:
    """All verdicts, and the proofs where they were asked for."""

    mutants: Sequence[Verdict]
    proofs: Sequence[Proof] = ()

    def count(self, result: Result) -> int:
        """How many mutants came to a result."""
        return sum(mutant.result == result for mutant in self.mutants)

    @property
    def passed(self) -> bool:
        """Whether there is no hole, and every proof that was asked for succeeded."""
        return not self.count("hole") and all(proof.state == "proved" for proof in self.proofs)

    def to_json(self) -> dict[str, Any]:
        """The content of `audit.json`."""
        results: tuple[Result, ...] = ("caught", "equal", "hole")
        return {
            "passed": self.passed,
            **{result: self.count(result) for result in results},
            "mutants": [mutant.to_json() for mutant in self.mutants],
            "proofs": [proof.to_json() for proof in self.proofs],
        }


def audit(
    net: QNet,
    folder: Path,
    x: Samples,
    *,
    mutants: int = 40,
    proofs: bool = False,
    seed: int = 0,
    said: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Plant faults in copies of what lies in a folder, and prove what can be proved.

    Args:
        net: the network.
        folder: holds `hls`, and `qkeras` and `rtl` as far as they were made; it stays as it is.
        x: the samples of parity beside those that it makes, real inputs `(batch, *input_shape)`, channels last.
        mutants: how many faults; each back end has its share.
        proofs: whether to prove program and Verilog, too.
        seed: of the choice of faults.
        said: hears of each step.

    Raises:
        InvalidInput: where there is nothing to prove.
        ToolMissing: without a compiler, or without Yosys where the Verilog is to be proved.
    """
    if proofs and not (folder / RTL.name).is_dir():
        raise InvalidInput(f"{folder}: has no Verilog to prove: run it with --estimate trace")
    tally = Tally(net)
    tally.add(x, "data")
    samples = np.concatenate([x, made_samples(net, tally)])
    expected = reference.run(net, samples)
    codes, verdicts = layer_codes(net), []
    with tempfile.TemporaryDirectory() as scratch:
        sources = _sources(net, folder, Path(scratch), seed)
        for name, count in _shares(mutants, list(sources)).items():
            for number, fault in enumerate(islice(sources[name], count), 1):
                said(f"{name}: fault {number} of {count}")
                verdicts.append(_judged(net, fault, samples, expected, codes))
    found: list[Proof] = []
    if proofs:
        said("proofs")
        found = prove(net, RtlProject.load(net, folder / RTL.name))
    return Audit(verdicts, found)


def _sources(net: QNet, folder: Path, scratch: Path, seed: int) -> Mapping[str, Iterator[Fault]]:
    """Faults by back end, as far as there is something to plant them in."""
    installed = {backend.name for backend in split_by_installed()[0]}
    sources: dict[str, Iterator[Fault]] = {}
    for number, name in enumerate((QKERAS.name, HLS.name, RTL.name)):
        rng = np.random.default_rng([seed, number])
        if name not in installed or not (folder / name).is_dir():
            continue
        if name == QKERAS.name:
            from hmq_fpga.deploy.qkeras.faults import model_faults

            sources[name] = model_faults(net, folder / name, rng)
        elif name == HLS.name:
            sources[name] = Firmware(net, HlsProject.load(folder / name), scratch).faults(rng)
        else:
            sources[name] = program_faults(net, load_program(folder / name), rng)
    return sources


def _shares(mutants: int, names: Sequence[str]) -> dict[str, int]:
    """Mutants of each back end, the cheapest getting what is left over."""
    each = mutants // len(names) if names else 0
    return {name: each if name != names[-1] else mutants - each * (len(names) - 1) for name in names}


def _caught(
    net: QNet, simulator: Simulator, x: Samples, expected: Codes, codes: Mapping[str, Codes] | None
) -> str | None:
    """What parity says against a simulator."""
    actual = simulator.predict(x)
    differing = int(np.count_nonzero(actual != expected)) if actual.shape == expected.shape else expected.size
    if differing:
        return f"{differing} of {expected.size} values differ"
    layers = compare_layers(net, simulator, codes)[0] if codes and isinstance(simulator, Layered) else None
    if layers and layers.mismatches:
        return f"layer by layer {layers.mismatches} of {layers.values} values differ"
    return None


def _judged(net: QNet, fault: Fault, x: Samples, expected: Codes, codes: Mapping[str, Codes] | None = None) -> Verdict:
    inputs: Sequence[int] | None = None
    result: Result = "caught"
    try:
        with fault.simulator() as simulator:
            reason = _caught(net, simulator, x, expected, codes)
    except Exception as error:  # whatever a faulty model or program does
        reason = f"does not run: {' '.join(str(error).split())[:120]}"
    if not reason:
        why, inputs = fault.judged(net, x)
        result, reason = ("equal", why) if why else ("hole", _SHOWN if inputs else _OPEN)
    return Verdict(
        backend=fault.backend,
        kind=fault.kind,
        where=fault.where,
        change=fault.change,
        result=result,
        reason=reason,
        inputs=inputs,
    )
