"""What a search finds: one format per tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed

Kind = Literal["weight", "activation", "input"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One quantized tensor.

    Attributes:
        name: path of the module in the user's model that owns the weight or makes the activation.
        kind: weights count for R_w; activations and the input count for R_a.
        format: its fixed-point format.
        size: number of elements (an activation's for one sample).
    """

    name: str
    kind: Kind
    format: Fixed
    size: int


@dataclass(frozen=True)
class Scheme(Mapping[str, Tensor]):
    """Formats by tensor name, in network order, and how they were found.

    Weights are keyed `<module>.weight`, activations by the module that makes them, the network's
    input `input`.
    """

    tensors: tuple[Tensor, ...]
    found_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [t.name for t in self.tensors]
        if twice := {n for n in names if names.count(n) > 1}:
            raise InvalidInput(f"scheme names a tensor twice: {sorted(twice)}")

    def __getitem__(self, name: str) -> Tensor:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (t.name for t in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def of_kind(self, *kinds: Kind) -> tuple[Tensor, ...]:
        """The tensors of the given kinds, in network order."""
        return tuple(t for t in self.tensors if t.kind in kinds)

    def to_json(self) -> dict[str, Any]:
        """The content of `scheme.json`: `signed`, `bits` and `threshold_log2` per tensor."""
        return {
            "tensors": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "signed": t.format.signed,
                    "bits": t.format.width,
                    "threshold_log2": t.format.threshold_log2,
                    "size": t.size,
                }
                for t in self.tensors
            ],
            "found_by": dict(self.found_by),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheme:
        """Inverse of `to_json`.

        Raises:
            InvalidInput: naming the entry that is not a tensor's format.
        """
        tensors = []
        for entry in data.get("tensors", ()):
            match entry:
                case {
                    "name": str(name),
                    "kind": str(kind),
                    "signed": bool(signed),
                    "bits": int(bits),
                    "threshold_log2": int(m),
                    "size": int(size),
                } if kind in get_args(Kind):
                    format_ = Fixed(signed=signed, width=bits, frac=bits - signed - m)
                    tensors.append(Tensor(name=name, kind=kind, format=format_, size=size))  # type: ignore[arg-type]
                case _:
                    raise InvalidInput(f"scheme entry is not a tensor's format: {entry!r}")
        return cls(tuple(tensors), data.get("found_by", {}))

    def save(self, path: Path) -> None:
        """Write `scheme.json`."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Scheme:
        """Read `scheme.json`."""
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise InvalidInput(f"{path}: cannot read the scheme: {error}") from error
