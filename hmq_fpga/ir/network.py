"""QNet: the exact integer description of a quantized network, the waist of the package.

Everything is channels-last and integer: a weight is a code plus a `Fixed`, a bias is a code on its
layer's accumulator grid. Operations (see `ops`) form a graph in topological order; each makes one tensor, known by
its name. Shapes leave out the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.files import replacing
from hmq_fpga.ir.fixed import Codes, Fixed, Reals
from hmq_fpga.ir.ops import OPS, Input, Linear, Op, Ranges, Shape, TensorType, common_format, joined

FORMAT_VERSION = 4
_READABLE = (2, 3, FORMAT_VERSION)  # what 3 lacks has defaults
_FILES = ("network.json", "weights.npz")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class QNet:
    """A quantized network.

    Several inputs, or several outputs, are one array `(batch, values)` to whoever runs the network: each flattened,
    channels last, one after the other; the outputs' codes are then on the finest of their grids. In hardware each of
    them has a port of its own.

    Attributes:
        ops: the operations, the inputs first.
        outputs: names of the tensors that leave the network; the last one where none is given.

    Raises:
        InvalidInput: from the constructor, naming the op and what is wrong with it.
    """

    ops: tuple[Op, ...]
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ops or not isinstance(self.ops[0], Input):
            raise InvalidInput("a network starts with its Input")
        if not self.outputs:
            object.__setattr__(self, "outputs", (self.ops[-1].name,))
        self._check_graph()
        self._check_outputs()
        for op in self.ops:
            with naming(op):
                op.check()
        _ = self.tensors
        if len(self.outputs) > 1:
            _ = self.output_format

    def _check_graph(self) -> None:
        seen: set[str] = set()
        for op in self.ops:
            if not _NAME.fullmatch(op.name):
                raise InvalidInput(f"op {op.name!r}: a name is letters, digits and underscores, a letter first")
            if op.name in seen:
                raise InvalidInput(f"op {op.name!r}: the name is taken by an earlier op")
            if set(op.reads) - seen or (isinstance(op, Input) and len(seen) >= len(self.inputs)):
                raise InvalidInput(f"op {op.name!r}: must read earlier ops' tensors, not {op.reads}")
            seen.add(op.name)

    def _check_outputs(self) -> None:
        names = [op.name for op in self.ops]
        if len(set(self.outputs)) != len(self.outputs) or set(self.outputs) - set(names):
            raise InvalidInput(f"outputs {self.outputs}: must name different tensors of the network")
        for op in self.ops:
            for source in op.reads:
                if source in self.outputs:
                    raise InvalidInput(f"op {op.name!r}: reads {source!r}, which is an output of the network")
        read = {source for op in self.ops for source in op.reads}
        if unread := [name for name in names if name not in read.union(self.outputs)]:
            raise InvalidInput(f"op {unread[0]!r}: nothing reads its tensor")

    def __getitem__(self, name: str) -> Op:
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The ops whose tensors come from outside."""
        return tuple(op for op in self.ops if isinstance(op, Input))

    @property
    def input(self) -> Input:
        """The only input.

        Raises:
            InvalidInput: where there are several.
        """
        if len(self.inputs) > 1:
            raise InvalidInput(f"the network has {len(self.inputs)} inputs, and only one is supported here")
        return self.inputs[0]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The ops that have weights."""
        return tuple(op for op in self.ops if isinstance(op, Linear))

    @cached_property
    def tensors(self) -> Mapping[str, TensorType]:
        """Shape and format of every tensor, by op name. A linear op's format is wide enough to be exact."""
        types: dict[str, TensorType] = {}
        for op in self.ops:
            with naming(op):
                types[op.name] = op.result([types[name] for name in op.reads])
        return types

    @cached_property
    def formats(self) -> Mapping[str, Fixed]:
        """Format of every tensor."""
        return {name: tensor.format for name, tensor in self.tensors.items()}

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, without the batch."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def ranges(self) -> Mapping[str, Ranges]:
        """What each channel of every tensor can hold, by interval arithmetic on the actual weights."""
        ranges: dict[str, Ranges] = {}
        for op in self.ops:
            ranges[op.name] = op.ranges(self.sources(op), [ranges[name] for name in op.reads])
        return ranges

    def sources(self, op: Op) -> list[TensorType]:
        """Shapes and formats of the tensors that `op` reads."""
        return [self.tensors[name] for name in op.reads]

    @property
    def input_shape(self) -> Shape:
        """Of one sample for `encode`."""
        return joined_shape([op.shape for op in self.inputs])

    @property
    def output_shape(self) -> Shape:
        """Of one sample's output codes."""
        return joined_shape([self.shapes[name] for name in self.outputs])

    @cached_property
    def output_format(self) -> Fixed:
        """Format of the output codes; for logits, that of the exact accumulator."""
        formats = [self.formats[name] for name in self.outputs]
        return formats[0] if len(formats) == 1 else common_format(formats)

    def bias_format(self, op: Linear) -> Fixed:
        """The narrowest format, on the accumulator's grid, that holds the bias of `op` exactly."""
        return Fixed.enclosing(int(op.bias.min()), int(op.bias.max()), self.formats[op.name].frac)

    def partial_sum_bits(self, op: Linear) -> int:
        """See `Dense.partial_sum_bits`, of the format that `op` reads here."""
        return op.partial_sum_bits(self.formats[op.source])

    def encode(self, x: _Array) -> Codes:
        """Real inputs `(batch, *input_shape)` to input codes of the same shape."""
        if x.shape[1:] != self.input_shape:
            raise InvalidInput(f"input of shape {x.shape[1:]}; the network takes {self.input_shape}, channels last")
        if len(self.inputs) == 1:
            return self.inputs[0].format.encode(x)
        parts = self.split_inputs(x)
        return np.concatenate([op.format.encode(parts[op.name].reshape(len(x), -1)) for op in self.inputs], 1)

    def decode(self, codes: Codes) -> Reals:
        """Output codes to real values."""
        return self.output_format.decode(codes)

    def split_inputs(self, x: _Array) -> dict[str, _Array]:
        """The single inputs by op name, each `(batch, *shape)`, of values or codes `(batch, *input_shape)`."""
        return split_row(x, {op.name: op.shape for op in self.inputs})

    def split(self, outputs: _Array) -> dict[str, _Array]:
        """The single outputs by op name, each `(batch, *shape)`, of output codes or values `(batch, *output_shape)`."""
        return split_row(outputs, {name: self.shapes[name] for name in self.outputs})

    def join(self, tensors: Mapping[str, Codes]) -> Codes:
        """Output codes `(batch, *output_shape)` of the outputs' codes by op name, each `(batch, *shape)`."""
        return joined([self.tensors[name] for name in self.outputs], [tensors[name] for name in self.outputs])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides an output; equal networks have equal digests."""
        return _digest(self._description(), self._arrays())

    def save(self, folder: Path) -> None:
        """Write `network.json` and `weights.npz` into `folder`, which may hold an earlier network but nothing else.

        Both are written beside it and moved there together.

        Raises:
            InvalidInput: when there are other files in it.
        """
        if folder.exists() and (foreign := sorted({p.name for p in folder.iterdir()} - set(_FILES))):
            raise InvalidInput(f"{folder}: holds {foreign[0]!r}, which is not a QNet's; give a new folder")
        with replacing(folder) as new:
            text = json.dumps({"digest": self.digest, **self._description()}, indent=1)
            (new / "network.json").write_text(text + "\n")
            np.savez(new / "weights.npz", **self._arrays())

    @classmethod
    def load(cls, folder: Path) -> QNet:
        """Read what `save` wrote, or what it wrote as format version 2 or 3.

        Raises:
            InvalidInput: when a file is missing, damaged, of another version, or not what was saved.
        """
        try:
            data = json.loads((folder / "network.json").read_text())
            with (folder / "weights.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # from a damaged archive anything may come
            raise InvalidInput(f"{folder}: not a readable QNet folder: {error}") from error
        if not isinstance(data, dict) or data.get("format_version") not in _READABLE:
            raise InvalidInput(f"{folder / 'network.json'}: not a QNet of format version 2 to {FORMAT_VERSION}")
        try:
            recorded = data.pop("digest", None)
            if _digest(data, arrays) != recorded:
                raise InvalidInput("digest differs from the one recorded: the files were changed or mixed up")
            outputs, ops = _outputs_and_ops(data)
            return cls(tuple(_op_from_json(entry, arrays) for entry in ops), outputs)
        except InvalidInput as error:
            raise InvalidInput(f"{folder}: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InvalidInput(f"{folder / 'network.json'}: malformed op: {error!r}") from error

    def _description(self) -> dict[str, Any]:
        ops = [_op_to_json(op) for op in self.ops]
        return {"format_version": FORMAT_VERSION, "outputs": list(self.outputs), "ops": ops}

    def _arrays(self) -> dict[str, Codes]:
        return {
            f"{op.name}.{field.name}": value
            for op in self.ops
            for field in fields(op)
            if isinstance(value := getattr(op, field.name), np.ndarray)
        }


@contextmanager
def naming(op: Op) -> Iterator[None]:
    """Put the op's name in front of an error about it."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"op {op.name!r}: {error}") from error


def joined_shape(shapes: Sequence[Shape]) -> Shape:
    """Of one sample of several tensors that stand in a row; of a single one its own."""
    return shapes[0] if len(shapes) == 1 else (sum(math.prod(shape) for shape in shapes),)


def split_row(values: _Array, shapes: Mapping[str, Shape]) -> dict[str, _Array]:
    """Tensors `(batch, *shape)` by name, of what holds them in a row, `(batch, values)`, or of a single one."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(values.reshape(len(values), -1), ends, 1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _digest(description: Mapping[str, Any], arrays: Mapping[str, Codes]) -> str:
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        sha.update(f"{name}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return sha.hexdigest()


def _outputs_and_ops(data: dict[str, Any]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Of a description of any version: in version 2 a last op `Outputs` names several outputs."""
    if data["format_version"] > 2:
        return tuple(data["outputs"]), data["ops"]
    *ops, last = data["ops"]
    return (tuple(last["sources"]), ops) if last["op"] == "Outputs" else ((), [*ops, last])


def _op_to_json(op: Op) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": type(op).__name__}
    for field in fields(op):
        value = getattr(op, field.name)
        if not isinstance(value, np.ndarray):
            entry[field.name] = value.to_json() if isinstance(value, Fixed) else value
    return entry


def _op_from_json(entry: dict[str, Any], arrays: Mapping[str, Codes]) -> Op:
    """An op by the types of its fields: an array from the archive, a format, a text, or integers."""
    cls = OPS[entry["op"]]
    values: dict[str, Any] = {}
    missing = {field.name for field in fields(cls) if field.default is not MISSING and field.name not in entry}
    for name, hint in get_type_hints(cls).items():
        if name in missing:
            continue  # of an older version
        if hint == Codes:
            values[name] = arrays[f"{entry['name']}.{name}"]
        elif hint is Fixed:
            values[name] = Fixed.from_json(entry[name])
        elif hint is str:
            values[name] = entry[name]
        elif hint == tuple[str, str]:
            values[name] = tuple(entry[name])
        else:
            values[name] = _integers(entry[name])
    return cls(**values)


def _integers(value: object) -> Any:
    """Nested lists of integers as tuples."""
    if isinstance(value, list):
        return tuple(_integers(v) for v in value)
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value
