"""What a search finds: one format per tensor, and of a weight, it may be, a width per element."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes, Fixed

Kind = Literal["weight", "activation", "input"]
Widths = npt.NDArray[np.integer[Any]]

WIDTHS = "widths.npz"  # beside `scheme.json`, where a tensor has widths


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """One quantized tensor.

    Attributes:
        name: path of the module in the user's model that owns the weight or makes the activation.
        kind: weights count for R_w; activations and the input count for R_a.
        format: its fixed-point format.
        size: number of elements (an activation's for one sample).
        widths: of a weight, bits of each element, `(size,)` in the order of PyTorch's tensor; None where all have
            those of `format`. An element of `b` bits has the format `format.narrowed(b)`, whose values are among those
            of `format`; one of 0 bits is zero.

    Raises:
        InvalidInput: naming the tensor, when `widths` are not that.
    """

    name: str
    kind: Kind
    format: Fixed
    size: int
    widths: Widths | None = None

    def __post_init__(self) -> None:
        if self.widths is None:
            return
        given, most = np.asarray(self.widths), self.format.width
        if self.kind != "weight":
            raise InvalidInput(f"tensor {self.name!r}: only a weight has widths of its elements, not an {self.kind}")
        if given.shape != (self.size,) or not np.issubdtype(given.dtype, np.integer):
            shape = "×".join(map(str, given.shape))
            raise InvalidInput(f"tensor {self.name!r}: widths are {shape} {given.dtype}, not {self.size} integers")
        if given.min() < 0 or given.max() > most:
            raise InvalidInput(
                f"tensor {self.name!r}: widths of {given.min()} … {given.max()} bits; they must be within 0 … {most}"
            )
        widths = given.astype(np.uint8)
        widths.flags.writeable = False
        object.__setattr__(self, "widths", widths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        widths = None if self.widths is None else self.widths.tobytes()
        return self.name, self.kind, self.format, self.size, widths

    def encode(self, values: npt.ArrayLike) -> Codes:
        """Codes of `format`, of real values, `(size,)` or of any shape with as many, each rounded to its own width."""
        if self.widths is None:
            return self.format.encode(values)
        reals = np.asarray(values, dtype=np.float64)
        widths = self.widths.reshape(reals.shape)
        codes = np.zeros(reals.shape, np.int64)
        for width in np.unique(widths[widths > 0]).tolist():
            these = widths == width
            codes[these] = self.format.narrowed(width).encode(reals[these]) << (self.format.width - width)
        return codes

    @property
    def bits(self) -> int:
        """Bits of all elements together."""
        return self.format.width * self.size if self.widths is None else int(self.widths.sum(dtype=np.int64))

    @property
    def mean_width(self) -> float:
        """Bits of an element on average: a whole number, the format's, where elements have no widths of their own."""
        return self.format.width if self.widths is None else self.bits / self.size


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

    @property
    def widths(self) -> dict[str, Widths]:
        """Of the tensors that have them: the arrays in `widths.npz`, by name."""
        return {t.name: t.widths for t in self.tensors if t.widths is not None}

    def to_json(self) -> dict[str, Any]:
        """The content of `scheme.json`: `signed`, `bits` and `threshold_log2` per tensor.

        Where a tensor has `widths`, its entry has the name of their array.
        """
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
                | ({} if t.widths is None else {"widths": t.name})
                for t in self.tensors
            ],
            "found_by": dict(self.found_by),
        }

    @classmethod
    def from_json(cls, data: object, widths: Mapping[str, Any] | None = None) -> Scheme:
        """Inverse of `to_json`.

        Args:
            data: the content of `scheme.json`.
            widths: the arrays that its entries name.

        Raises:
            InvalidInput: naming the entry that is not a tensor's format.
        """
        match data:
            case {"tensors": [*entries], **rest} if isinstance(found_by := rest.get("found_by", {}), dict):
                return cls(tuple(_tensor(entry, widths or {}) for entry in entries), found_by)
        raise InvalidInput('not a scheme: {"tensors": […], "found_by": {…}}')

    def save(self, path: Path) -> None:
        """Write `scheme.json`, and `widths.npz` beside it where a tensor has widths; each in one step."""
        beside, new = path.with_name(WIDTHS), path.with_name(f".{WIDTHS}.new")
        if widths := self.widths:
            with new.open("wb") as file:
                np.savez_compressed(file, **widths)
            new.replace(beside)
        new = path.with_name(f".{path.name}.new")
        new.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        new.replace(path)
        if not widths:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Scheme:
        """Read `scheme.json`, and `widths.npz` where it names arrays.

        Raises:
            InvalidInput: naming the file, when it cannot be read or is not a scheme.
        """
        try:
            data = json.loads(path.read_text())
            return cls.from_json(data, _arrays(path.with_name(WIDTHS)) if _names_widths(data) else None)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path}: not a readable scheme: {error}") from error


def _names_widths(data: Any) -> bool:
    entries = data.get("tensors") if isinstance(data, dict) else None
    return isinstance(entries, list) and any(isinstance(entry, dict) and "widths" in entry for entry in entries)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # from a damaged archive anything may come
        raise InvalidInput(f"{path.name} beside it cannot be read: {error}") from error


def _tensor(entry: object, arrays: Mapping[str, Any]) -> Tensor:
    match entry:
        case {
            "name": str(name),
            "kind": "weight" | "activation" | "input" as kind,
            "signed": bool(signed),
            "bits": int(bits),
            "threshold_log2": int(m),
            "size": int(size),
            **rest,
        } if size > 0 and bool not in (type(bits), type(m), type(size)):
            try:
                format_ = Fixed(signed=signed, width=bits, frac=bits - signed - m)
            except InvalidInput as error:
                raise InvalidInput(f"tensor {name!r}: {error}") from error
            widths = _widths(name, rest["widths"], arrays) if "widths" in rest else None
            return Tensor(name=name, kind=kind, format=format_, size=size, widths=widths)
    raise InvalidInput(f"scheme entry is not a tensor's format: {entry!r}")


def _widths(tensor: str, array: object, arrays: Mapping[str, Any]) -> Any:
    if not isinstance(array, str) or array not in arrays:
        raise InvalidInput(f"tensor {tensor!r}: its widths {array!r} are not in {WIDTHS}")
    return arrays[array]
