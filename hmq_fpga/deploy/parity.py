"""Parity: every simulator's output equals the integer reference, code for code.

A simulator is anything with a name and `predict`; one that also has `trace` lets a failure name the first
tensor that differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.coverage import Coverage, Tally
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Input

TRACED = 16  # differing samples that are traced to find the first tensor that differs


class ParityError(RuntimeError):
    """A simulator does not compute what the network's integers say; the message names it and the tensor."""


class Simulator(Protocol):
    """Computes a network's output."""

    @property
    def name(self) -> str:
        """Its key in `parity.json`."""
        ...

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output_shape)` for real inputs `(batch, *input_shape)`, channels last."""
        ...


@runtime_checkable
class Tracer(Protocol):
    """A simulator that can show the tensors in between."""

    def trace(self, x: npt.NDArray[np.float32]) -> Mapping[str, Codes]:
        """Codes `(batch, *shape)` by op name, for every op that it can observe."""
        ...


@runtime_checkable
class Layered(Protocol):
    """A simulator whose layers can be given codes of their own, see `reference.layers`."""

    def takes(self, codes: Mapping[str, Codes]) -> Mapping[str, Codes]:
        """Of codes `(batch, *shape)` by op name those that it can take, as near as it can; none at all is an answer."""
        ...

    def layers(self, given: Mapping[str, Codes]) -> Mapping[str, Codes]:
        """What ops make of given codes of their sources, by op name, for every op that it can observe."""
        ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a simulator first leaves the reference, in network order.

    Attributes:
        tensor: the op that makes it.
        sample: index of the first sample that shows it.
        index: position inside the tensor.
        expected, actual: the codes there.
    """

    tensor: str
    sample: int
    index: tuple[int, ...]
    expected: int
    actual: int

    def __str__(self) -> str:
        return (
            f"tensor {self.tensor!r} first differs at sample {self.sample}, index {list(self.index)}: "
            f"code {self.actual}, expected {self.expected}"
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One simulator against the reference.

    Attributes:
        values: output codes compared.
        mismatches: how many of them differ.
        max_abs_diff: largest difference of two codes.
        accuracy: share of samples whose class is the label's, see `classes`; None without labels.
        first_difference: where it starts; None where nothing differs.
    """

    values: int
    mismatches: int
    max_abs_diff: int
    accuracy: float | None
    first_difference: Difference | None

    def to_json(self) -> dict[str, Any]:
        """One entry of `parity.json`."""
        entry: dict[str, Any] = {
            "values": self.values,
            "mismatches": self.mismatches,
            "max_abs_diff": self.max_abs_diff,
            "accuracy": self.accuracy,
        }
        if d := self.first_difference:
            entry["first_difference"] = {
                "tensor": d.tensor,
                "sample": d.sample,
                "index": list(d.index),
                "expected": d.expected,
                "actual": d.actual,
            }
        return entry


@dataclass(frozen=True)
class Parity:
    """All simulators against the reference on the same samples.

    Attributes:
        samples: how many inputs.
        simulators: the comparisons by simulator name.
        made: the same on inputs made for what these do not reach, see `made_samples`; None without.
        layers: the same of each layer by itself, on codes that need come from no input, see `layer_codes`; of those
            simulators that can, and None without.
        coverage: what all inputs together reached; None without.
    """

    samples: int
    simulators: Mapping[str, Comparison]
    made: Parity | None = None
    layers: Parity | None = None
    coverage: Coverage | None = None

    @property
    def passed(self) -> bool:
        """Whether not a single code differs anywhere."""
        own = all(c.mismatches == 0 for c in self.simulators.values())
        return own and all(part is None or part.passed for part in (self.made, self.layers))

    def raise_for_mismatch(self) -> None:
        """Do nothing if all is equal.

        Raises:
            ParityError: naming the simulators and the first tensor that differs in each.
        """
        if not self.passed:
            made = self.made._differences("output codes differ on made samples") if self.made else []
            layers = self.layers._differences("codes differ layer by layer") if self.layers else []
            raise ParityError("; ".join([*self._differences("output codes differ"), *made, *layers]))

    def _differences(self, what: str) -> list[str]:
        return [
            f"{name}: {c.mismatches} of {c.values} {what}, by up to {c.max_abs_diff}; {c.first_difference}"
            for name, c in self.simulators.items()
            if c.mismatches
        ]

    def to_json(self) -> dict[str, Any]:
        """The content of `parity.json`."""
        found: dict[str, Any] = {
            "passed": self.passed,
            "samples": self.samples,
            "simulators": {name: c.to_json() for name, c in self.simulators.items()},
        }
        found |= {name: part.to_json() for name in ("made", "layers") if (part := getattr(self, name))}
        if self.coverage:
            found["coverage"] = self.coverage.to_json()
        return found


def check(
    net: QNet,
    simulators: Sequence[Simulator],
    x: npt.ArrayLike,
    labels: npt.ArrayLike | None = None,
    *,
    made: bool = False,
) -> Parity:
    """Compare simulators with the integer reference.

    Args:
        net: the network.
        simulators: what to compare.
        x: real inputs `(batch, *input_shape)`, channels last; taken as float32, which is what reaches hardware.
        labels: `(batch,)` classes, for the accuracy; see `classes`.
        made: also compare on inputs made for what the samples do not reach, and layer by layer, and say what all of
            that reached.

    Raises:
        InvalidInput: when there is nothing to compare or the labels do not fit.
        ParityError: when a simulator's values are not even on their tensor's grid.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    if not simulators or not len(x):
        raise InvalidInput("nothing to compare: parity needs at least one simulator and one sample")
    if labels is not None and np.shape(labels) != (len(x),):
        raise InvalidInput(f"{np.shape(labels)} labels for {len(x)} samples: give one class per sample")
    compared = _compare_all(net, simulators, x, labels)
    if not made:
        return compared
    from hmq_fpga.deploy.samples import made_samples

    tally = Tally(net)
    tally.add(x, "data")
    more = _compare_all(net, simulators, made_samples(net, tally), None)
    layers = _compare_layers(net, simulators, tally)
    return replace(compared, made=more, layers=layers, coverage=tally.coverage())


def compare_layers(
    net: QNet, simulator: Layered, codes: Mapping[str, Codes]
) -> tuple[Comparison | None, dict[str, Codes], dict[str, Codes]]:
    """A simulator's layers against the reference, each by itself; None where it can take none.

    Args:
        net: the network.
        simulator: that can be given codes.
        codes: `(batch, *shape)` by op, see `layer_codes`.

    Returns:
        the comparison; the codes that were given; and what the reference makes of them.

    Raises:
        ParityError: when a simulator's values are not even on their tensor's grid.
    """
    given = dict(simulator.takes(codes))
    if not given:
        return None, {}, {}
    expected, actual = reference.layers(net, given), simulator.layers(given)
    names = [op.name for op in net.ops if op.name in actual and not isinstance(op, Input)]
    differences = {name: np.abs(actual[name] - expected[name]) for name in names}
    count = len(next(iter(given.values())))
    found = (_difference(name, np.arange(count), expected[name], actual[name]) for name in names)
    comparison = Comparison(
        values=sum(difference.size for difference in differences.values()),
        mismatches=sum(int(np.count_nonzero(difference)) for difference in differences.values()),
        max_abs_diff=max((int(difference.max()) for difference in differences.values()), default=0),
        accuracy=None,
        first_difference=next(filter(None, found), None),
    )
    return comparison, given, expected


def _compare_layers(net: QNet, simulators: Sequence[Simulator], tally: Tally) -> Parity | None:
    """All simulators that can; what every one of them reached is counted."""
    from hmq_fpga.deploy.layers import layer_codes

    if (codes := layer_codes(net)) is None:
        return None
    comparisons, reached = {}, []
    for simulator in simulators:
        if isinstance(simulator, Layered):
            comparison, given, expected = compare_layers(net, simulator, codes)
            if comparison:
                comparisons[simulator.name] = comparison
                reached.append(tally.seen_in_layers(given, expected))
    if not comparisons:
        return None
    tally.add_layers(set.intersection(*reached))
    return Parity(len(next(iter(codes.values()))), comparisons)


def classes(outputs: Codes) -> Codes:
    """The class that each row of outputs stands for: the largest one's; of a single output 1 where it is positive."""
    found: Codes = (outputs[..., 0] > 0).astype(np.int64) if outputs.shape[-1] == 1 else outputs.argmax(axis=-1)
    return found


def to_codes(values: npt.NDArray[np.floating[Any]], format: Fixed, tensor: str) -> Codes:
    """Simulated real values to codes of `format`'s grid, exactly.

    Codes outside the format's range pass, so that they show as a difference.

    Raises:
        ParityError: when a value is not on the grid, naming the tensor.
    """
    scaled = values.astype(np.float64) * 2.0**format.frac
    off = ~((np.abs(scaled) < 2.0**MAX_WIDTH) & (np.rint(scaled) == scaled))  # NaN too
    if off.any():
        raise ParityError(f"tensor {tensor!r} holds {values[off].flat[0]}, not a multiple of its step {format.step}")
    codes: Codes = scaled.astype(np.int64)
    return codes


def _compare_all(
    net: QNet, simulators: Sequence[Simulator], x: npt.NDArray[np.float32], labels: npt.ArrayLike | None
) -> Parity:
    expected = reference.run(net, x)
    return Parity(len(x), {s.name: _compare(net, s, x, expected, labels) for s in simulators})


def _compare(
    net: QNet, simulator: Simulator, x: npt.NDArray[np.float32], expected: Codes, labels: npt.ArrayLike | None
) -> Comparison:
    actual = simulator.predict(x)
    if actual.shape != expected.shape:
        raise ParityError(f"{simulator.name}: output of shape {actual.shape}, expected {expected.shape}")
    difference = np.abs(actual - expected)
    return Comparison(
        values=expected.size,
        mismatches=int(np.count_nonzero(difference)),
        max_abs_diff=int(difference.max()),
        accuracy=None if labels is None else float(np.mean(classes(actual) == labels)),
        first_difference=_first_difference(net, simulator, x, expected, actual) if difference.any() else None,
    )


def _first_difference(
    net: QNet, simulator: Simulator, x: npt.NDArray[np.float32], expected: Codes, actual: Codes
) -> Difference | None:
    samples = np.unique(np.nonzero(actual != expected)[0])[:TRACED]
    references = reference.trace(net, x[samples])
    tensors = dict(simulator.trace(x[samples])) if isinstance(simulator, Tracer) else {}
    for op in net.ops:
        if op.name in tensors and (found := _difference(op.name, samples, references[op.name], tensors[op.name])):
            return found
    outputs = net.split(actual[samples])
    for name, right in net.split(expected[samples]).items():
        if found := _difference(name, samples, right, outputs[name]):
            return found
    return None


def _difference(tensor: str, samples: Codes, expected: Codes, actual: Codes) -> Difference | None:
    """The first place where the codes `(samples, *shape)` of a tensor differ, if any."""
    at = np.argwhere(actual != expected)
    if not at.size:
        return None
    sample, *index = (int(i) for i in at[0])
    return Difference(
        tensor=tensor,
        sample=int(samples[sample]),
        index=tuple(index),
        expected=int(expected[tuple(at[0])]),
        actual=int(actual[tuple(at[0])]),
    )
