"""What a search finds: one format per tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    def from_json(cls, data: object) -> Scheme:
        """Inverse of `to_json`.

        Raises:
            InvalidInput: naming the entry that is not a tensor's format.
        """
        match data:
            case {"tensors": [*entries], **rest} if isinstance(found_by := rest.get("found_by", {}), dict):
                return cls(tuple(_tensor(entry) for entry in entries), found_by)
        raise InvalidInput('not a scheme: {"tensors": […], "found_by": {…}}')

    def save(self, path: Path) -> None:
        """Write `scheme.json`."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Scheme:
        """Read `scheme.json`.

        Raises:
            InvalidInput: naming the file, when it cannot be read or is not a scheme.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path}: not a readable scheme: {error}") from error


def _tensor(entry: object) -> Tensor:
    match entry:
        case {
            "name": str(name),
            "kind": "weight" | "activation" | "input" as kind,
            "signed": bool(signed),
            "bits": int(bits),
            "threshold_log2": int(m),
            "size": int(size),
        } if size > 0 and bool not in (type(bits), type(m), type(size)):
            try:
                format_ = Fixed(signed=signed, width=bits, frac=bits - signed - m)
            except InvalidInput as error:
                raise InvalidInput(f"tensor {name!r}: {error}") from error
            return Tensor(name=name, kind=kind, format=format_, size=size)
    raise InvalidInput(f"scheme entry is not a tensor's format: {entry!r}")
