"""QNet: the exact integer description of a quantized network, the waist of the package.

Everything is channels-last and integer: a weight is a code plus a `Fixed`, a bias is a code on its
layer's accumulator grid. Ops form a graph in topological order; each makes one tensor, known by the
op's name. Shapes leave out the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, assert_never, get_args

import numpy as np

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed, Reals

FORMAT_VERSION = 2
Shape = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]  # zeros before and after, for each spatial dimension


@dataclass(frozen=True, kw_only=True, eq=False)
class Input:
    """The network's input, quantized to `format`.

    Its shape is `(features,)`, `(length, channels)` or `(height, width, channels)`.
    """

    name: str
    shape: Shape
    format: Fixed


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize:
    """Round and saturate to `format`; an unsigned format clips at zero and so contains the ReLU."""

    name: str
    source: str
    format: Fixed


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """`(…, n) @ weight + bias`, with weight codes `(n, m)` and bias codes `(m,)`."""

    name: str
    source: str
    weight: Codes
    weight_format: Fixed
    bias: Codes


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv:
    """Cross-correlation over one or two spatial dimensions.

    Reads `(*spatial, c)` with weight codes `(*kernel, c, m)` and bias codes `(m,)`.
    """

    name: str
    source: str
    weight: Codes
    weight_format: Fixed
    bias: Codes
    stride: Shape
    padding: Padding


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthwiseConv:
    """Cross-correlation of each channel with a kernel of its own.

    Reads `(*spatial, c)` with weight codes `(*kernel, c)` and bias codes `(c,)`.
    """

    name: str
    source: str
    weight: Codes
    weight_format: Fixed
    bias: Codes
    stride: Shape
    padding: Padding


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale:
    """`x * weight + bias` per channel, with weight codes `(c,)` and bias codes `(c,)`: a BatchNorm not folded."""

    name: str
    source: str
    weight: Codes
    weight_format: Fixed
    bias: Codes


@dataclass(frozen=True, kw_only=True, eq=False)
class LeakyRelu:
    """`x` where it is not negative, else `x * 2**-shift`: exact, with `shift` more fractional bits."""

    name: str
    source: str
    shift: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MaxPool:
    """Maximum over windows; windows that do not fit are dropped."""

    name: str
    source: str
    window: Shape
    stride: Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class AvgPool:
    """Mean over windows of a power of two of values: their exact sum, with as many more fractional bits."""

    name: str
    source: str
    window: Shape
    stride: Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Pad:
    """Zeros around every channel."""

    name: str
    source: str
    padding: Padding


@dataclass(frozen=True, kw_only=True, eq=False)
class Upsample:
    """Every value repeated `factor` times along each spatial dimension: nearest-neighbour interpolation."""

    name: str
    source: str
    factor: Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten:
    """`(*spatial, c)` to one dimension, in that order."""

    name: str
    source: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Add:
    """Exact sum of two tensors of one shape, on the finer of their grids."""

    name: str
    sources: tuple[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Concat:
    """Two tensors side by side along the channels, on the finer of their grids."""

    name: str
    sources: tuple[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """All outputs of a network that has several, each flattened, one after the other, on the finest of their grids.

    The last op, and a description only: in hardware each of them has a port of its own.
    """

    name: str
    sources: tuple[str, ...]


Linear = Dense | Conv | DepthwiseConv | Scale
Window = Conv | DepthwiseConv | MaxPool | AvgPool
Merge = Add | Concat
Op = (
    Input
    | Quantize
    | Dense
    | Conv
    | DepthwiseConv
    | Scale
    | LeakyRelu
    | MaxPool
    | AvgPool
    | Pad
    | Upsample
    | Flatten
    | Add
    | Concat
    | Outputs
)
_OPS: Mapping[str, type[Op]] = {op.__name__: op for op in get_args(Op)}
_BIAS = Fixed(signed=True, width=MAX_WIDTH, frac=0)  # with it, no sum of a linear op exceeds int64
_MAX_SHIFT = 16  # of a leaky ReLU
_FILES = ("network.json", "weights.npz")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def sources_of(op: Op) -> tuple[str, ...]:
    """Names of the tensors that `op` reads; none for the input."""
    match op:
        case Input():
            return ()
        case Add() | Concat() | Outputs():
            return op.sources
        case _:
            return (op.source,)


def kernel_of(op: Window) -> Shape:
    """How many positions an op reads at once, in each spatial dimension."""
    match op:
        case MaxPool() | AvgPool():
            return op.window
        case DepthwiseConv():
            return op.weight.shape[:-1]
        case Conv():
            return op.weight.shape[:-2]


@dataclass(frozen=True, eq=False)
class QNet:
    """A quantized network. Its first op is the one `Input`, its last op makes the output.

    Raises:
        InvalidInput: from the constructor, naming the op and what is wrong with it.
    """

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        if not self.ops or not isinstance(self.ops[0], Input):
            raise InvalidInput("a network starts with its Input")
        seen: set[str] = set()
        for i, op in enumerate(self.ops):
            if not _NAME.fullmatch(op.name):
                raise InvalidInput(f"op {op.name!r}: a name is letters, digits and underscores, a letter first")
            if op.name in seen:
                raise InvalidInput(f"op {op.name!r}: the name is taken by an earlier op")
            if i and (not sources_of(op) or set(sources_of(op)) - seen):
                raise InvalidInput(f"op {op.name!r}: must read earlier ops' tensors, not {sources_of(op)}")
            seen.add(op.name)
        read = {source for op in self.ops for source in sources_of(op)}
        if unread := [op.name for op in self.ops[:-1] if op.name not in read]:
            raise InvalidInput(f"op {unread[0]!r}: nothing reads its tensor")
        self._check_outputs()
        for op in self.ops:
            with _naming(op):
                _check(op)
        _ = self.formats, self.shapes

    def _check_outputs(self) -> None:
        for op in self.ops[:-1]:
            if isinstance(op, Outputs):
                raise InvalidInput(f"op {op.name!r}: lists outputs, so it must be the last")
            for source in sources_of(op):
                if isinstance(self.output, Outputs) and source in self.output.sources:
                    raise InvalidInput(f"op {op.name!r}: reads {source!r}, which is an output of the network")

    def __getitem__(self, name: str) -> Op:
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)

    @property
    def input(self) -> Input:
        """The first op."""
        assert isinstance(self.ops[0], Input)
        return self.ops[0]

    @property
    def output(self) -> Op:
        """The last op: its tensor is the network's output."""
        return self.ops[-1]

    @property
    def outputs(self) -> tuple[Op, ...]:
        """The ops whose tensors hardware puts out: the last one, or those that it lists."""
        return tuple(self[name] for name in self.output.sources) if isinstance(self.output, Outputs) else (self.output,)

    @property
    def output_format(self) -> Fixed:
        """Format of the output codes; for logits, that of the exact accumulator."""
        return self.formats[self.output.name]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The ops that have weights."""
        return tuple(op for op in self.ops if isinstance(op, Linear))

    @cached_property
    def formats(self) -> Mapping[str, Fixed]:
        """Format of every tensor. A linear op's is its accumulator's: wide enough to be exact."""
        formats: dict[str, Fixed] = {}
        for op in self.ops:
            with _naming(op):
                formats[op.name] = _format(op, formats)
        return formats

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, without the batch."""
        shapes: dict[str, Shape] = {}
        for op in self.ops:
            with _naming(op):
                shapes[op.name] = _shape(op, shapes)
        return shapes

    def bias_format(self, op: Linear) -> Fixed:
        """The narrowest format, on the accumulator's grid, that holds the bias of `op` exactly."""
        return Fixed.enclosing(int(op.bias.min()), int(op.bias.max()), self.formats[op.name].frac)

    def partial_sum_bits(self, op: Linear) -> int:
        """Bits that hold the magnitude of any partial sum of `op`, whatever the order of summation.

        A float computation of `op` is exact if this fits its significand: 24 bits in float32, 53 in float64.
        """
        source = self.formats[op.source]
        largest = np.abs(by_output(op)).sum(axis=0) * max(source.hi, -source.lo) + np.abs(op.bias)
        return int(largest.max()).bit_length()

    def encode(self, x: np.ndarray[Any, Any]) -> Codes:
        """Real inputs `(batch, *input shape)` to input codes."""
        if x.shape[1:] != self.input.shape:
            raise InvalidInput(f"input of shape {x.shape[1:]}; the network takes {self.input.shape}, channels last")
        return self.input.format.encode(x)

    def decode(self, codes: Codes) -> Reals:
        """Output codes to real values."""
        return self.output_format.decode(codes)

    def split(self, outputs: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The single outputs by op name, each `(batch, *shape)`, of output codes or values `(batch, *output shape)`."""
        shapes = [self.shapes[op.name] for op in self.outputs]
        parts = np.split(outputs.reshape(len(outputs), -1), np.cumsum([math.prod(shape) for shape in shapes])[:-1], 1)
        return {op.name: part.reshape(-1, *s) for op, part, s in zip(self.outputs, parts, shapes, strict=True)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides an output; equal networks have equal digests."""
        sha = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            sha.update(f"{name}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return sha.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `network.json` and `weights.npz` into `folder`, which may hold an earlier network but nothing else.

        Both are written beside it and moved there together.

        Raises:
            InvalidInput: when there are other files in it.
        """
        if folder.exists() and (foreign := sorted({p.name for p in folder.iterdir()} - set(_FILES))):
            raise InvalidInput(f"{folder}: holds {foreign[0]!r}, which is not a QNet's; give a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            text = json.dumps({"digest": self.digest, **self._description()}, indent=1)
            (new / "network.json").write_text(text + "\n")
            np.savez(new / "weights.npz", **self._arrays())
            new.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> QNet:
        """Read what `save` wrote.

        Raises:
            InvalidInput: when a file is missing, damaged, of another version, or not what was saved.
        """
        try:
            data = json.loads((folder / "network.json").read_text())
            with (folder / "weights.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # from a damaged archive anything may come
            raise InvalidInput(f"{folder}: not a readable QNet folder: {error}") from error
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
            raise InvalidInput(f"{folder / 'network.json'}: not a QNet of format version {FORMAT_VERSION}")
        try:
            net = cls(tuple(_op_from_json(entry, arrays) for entry in data["ops"]))
        except InvalidInput as error:
            raise InvalidInput(f"{folder}: {error}") from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(f"{folder / 'network.json'}: malformed op: {error!r}") from error
        if net.digest != data.get("digest"):
            raise InvalidInput(f"{folder}: digest differs from the one recorded: the files were changed or mixed up")
        return net

    def _description(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "ops": [_op_to_json(op) for op in self.ops]}

    def _arrays(self) -> dict[str, Codes]:
        return {f"{op.name}.{key}": getattr(op, key) for op in self.linears for key in ("weight", "bias")}


@contextmanager
def _naming(op: Op) -> Iterator[None]:
    """Put the op's name in front of an error about it."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"op {op.name!r}: {error}") from error


def _check(op: Op) -> None:
    """What an op's own fields must satisfy."""
    if isinstance(op, Linear):
        _check_constants(op)
    if isinstance(op, Window) and (min(op.stride) < 1 or len(op.stride) != len(kernel_of(op))):
        raise InvalidInput(f"stride {op.stride} does not fit a window of {kernel_of(op)}")
    if isinstance(op, Conv | DepthwiseConv | Pad):
        dims = len(op.padding) if isinstance(op, Pad) else len(kernel_of(op))
        if len(op.padding) != dims or dims not in (1, 2) or min(min(pair) for pair in op.padding) < 0:
            raise InvalidInput(f"padding {op.padding} is out of range")
    match op:
        case Input():
            if len(op.shape) not in (1, 2, 3) or min(op.shape) < 1:
                raise InvalidInput(
                    f"input shape {op.shape} is none of (features,), (length, channels), (height, width, channels)"
                )
        case MaxPool() | AvgPool():
            if min(op.window) < 1 or len(op.window) not in (1, 2):
                raise InvalidInput(f"window {op.window} is out of range")
            if isinstance(op, AvgPool) and math.prod(op.window).bit_count() != 1:
                raise InvalidInput(f"a mean over {op.window} values is exact only for powers of two")
        case LeakyRelu():
            if not 0 <= op.shift <= _MAX_SHIFT:
                raise InvalidInput(f"slope 2**-{op.shift} is outside 2**-{_MAX_SHIFT} … 1")
        case Upsample():
            if min(op.factor) < 1 or len(op.factor) not in (1, 2):
                raise InvalidInput(f"factor {op.factor} is out of range")
        case Add() | Concat():
            if len(set(op.sources)) != 2:
                raise InvalidInput(f"merges two different tensors, not {op.sources}")
        case Outputs():
            if len(op.sources) < 2 or len(set(op.sources)) != len(op.sources):
                raise InvalidInput(f"lists two or more different tensors, not {op.sources}")


_WEIGHT_DIMS: Mapping[type, tuple[int, ...]] = {Dense: (2,), Conv: (3, 4), DepthwiseConv: (2, 3), Scale: (1,)}


def _check_constants(op: Linear) -> None:
    if op.weight.dtype != np.int64 or op.bias.dtype != np.int64:
        raise InvalidInput("weight and bias codes are int64")
    dims = _WEIGHT_DIMS[type(op)]
    if op.weight.ndim not in dims or 0 in op.weight.shape or op.bias.shape != op.weight.shape[-1:]:
        raise InvalidInput(f"weight {op.weight.shape} and bias {op.bias.shape} do not fit a {type(op).__name__}")
    if not op.weight_format.contains(op.weight):
        raise InvalidInput(f"a weight code is outside {op.weight_format}")
    if not _BIAS.contains(op.bias):
        raise InvalidInput(f"a bias code exceeds {_BIAS.width} bits")


def _format(op: Op, formats: Mapping[str, Fixed]) -> Fixed:
    match op:
        case Input() | Quantize():
            return op.format
        case Dense() | Conv() | DepthwiseConv() | Scale():
            return _accumulator(op, formats[op.source])
        case MaxPool() | Pad() | Upsample() | Flatten():
            return formats[op.source]
        case AvgPool():
            source, values = formats[op.source], math.prod(op.window)
            return Fixed.enclosing(source.lo * values, source.hi * values, source.frac + values.bit_length() - 1)
        case LeakyRelu():
            source = formats[op.source]
            return Fixed.enclosing(source.lo, source.hi << op.shift, source.frac + op.shift)
        case Add() | Concat() | Outputs():
            frac = max(formats[name].frac for name in op.sources)
            sources = [formats[name] for name in op.sources]
            if max(source.width + frac - source.frac for source in sources) >= MAX_WIDTH:
                raise InvalidInput(f"{' and '.join(map(str, sources))} on one grid exceed {MAX_WIDTH} bits")
            los, his = zip(*((f.lo << frac - f.frac, f.hi << frac - f.frac) for f in sources), strict=True)
            both = (sum, sum) if isinstance(op, Add) else (min, max)
            return Fixed.enclosing(both[0](los), both[1](his), frac)
        case _:
            assert_never(op)


def _accumulator(op: Linear, source: Fixed) -> Fixed:
    """Interval arithmetic per output on the actual weights: the narrowest format that is exact.

    Zero padding is covered, since every term's interval contains zero.
    """
    if source.width + op.weight_format.width + int(op.weight.size).bit_length() > MAX_WIDTH:
        raise InvalidInput(f"its sums of {source} times {op.weight_format} may exceed {MAX_WIDTH} bits")
    weight = by_output(op)
    positive, negative = np.maximum(weight, 0).sum(axis=0), np.minimum(weight, 0).sum(axis=0)
    lo = positive * source.lo + negative * source.hi + op.bias
    hi = positive * source.hi + negative * source.lo + op.bias
    return Fixed.enclosing(int(lo.min()), int(hi.max()), source.frac + op.weight_format.frac)


def by_output(op: Linear) -> Codes:
    """Weight codes of a linear op as `(terms of one sum, outputs)`."""
    return op.weight.reshape(-1, op.weight.shape[-1])


def _shape(op: Op, shapes: Mapping[str, Shape]) -> Shape:
    if isinstance(op, Input):
        return op.shape
    if isinstance(op, Add | Concat):
        return _merged_shape(op, *(shapes[name] for name in op.sources))
    if isinstance(op, Outputs):
        return (sum(math.prod(shapes[name]) for name in op.sources),)
    source = shapes[op.source]
    match op:
        case Quantize() | LeakyRelu():
            return source
        case Flatten():
            return (math.prod(source),)
        case Dense():
            _require_channels(op, source, op.weight.shape[0])
            return (*source[:-1], op.weight.shape[1])
        case Scale():
            _require_channels(op, source, op.weight.shape[0])
            return source
        case Conv() | DepthwiseConv() | MaxPool() | AvgPool():
            spatial = _spatial(source, len(kernel_of(op)))
            if isinstance(op, Conv | DepthwiseConv):
                _require_channels(op, source, op.weight.shape[len(spatial)])
                spatial = tuple(n + sum(pair) for n, pair in zip(spatial, op.padding, strict=True))
            outputs = op.weight.shape[-1] if isinstance(op, Conv) else source[-1]
            return (*_windows(spatial, kernel_of(op), op.stride), outputs)
        case Pad():
            spatial = _spatial(source, len(op.padding))
            return (*(n + sum(pair) for n, pair in zip(spatial, op.padding, strict=True)), source[-1])
        case Upsample():
            spatial = _spatial(source, len(op.factor))
            return (*(n * k for n, k in zip(spatial, op.factor, strict=True)), source[-1])
        case _:
            assert_never(op)


def _merged_shape(op: Merge, first: Shape, second: Shape) -> Shape:
    if isinstance(op, Add) and first == second:
        return first
    if isinstance(op, Concat) and first[:-1] == second[:-1]:
        return (*first[:-1], first[-1] + second[-1])
    raise InvalidInput(f"cannot merge {first} and {second}")


def _require_channels(op: Linear, source: Shape, channels: int) -> None:
    if source[-1] != channels:
        raise InvalidInput(f"reads {source}, but its weight {op.weight.shape} takes {channels}")


def _spatial(source: Shape, dims: int) -> Shape:
    """All dimensions but the channels."""
    if len(source) != dims + 1:
        raise InvalidInput(f"reads {source}, but works on {dims} dimensions and channels")
    return source[:-1]


def _windows(size: Shape, window: Shape, stride: Shape) -> Shape:
    """How many whole windows fit."""
    if any(n < k for n, k in zip(size, window, strict=True)):
        raise InvalidInput(f"its window {window} does not fit into {size}")
    return tuple((n - k) // s + 1 for n, k, s in zip(size, window, stride, strict=True))


def _op_to_json(op: Op) -> dict[str, Any]:
    entry: dict[str, Any] = {"op": type(op).__name__}
    for field in fields(op):
        value = getattr(op, field.name)
        if not isinstance(value, np.ndarray):
            entry[field.name] = value.to_json() if isinstance(value, Fixed) else value
    return entry


def _op_from_json(entry: dict[str, Any], arrays: Mapping[str, Codes]) -> Op:
    cls = _OPS[entry["op"]]
    values: dict[str, Any] = {}
    for field in fields(cls):
        name = field.name
        if name in ("weight", "bias"):
            values[name] = arrays[f"{entry['name']}.{name}"]
        elif name in ("format", "weight_format"):
            values[name] = Fixed.from_json(entry[name])
        elif name in ("name", "source"):
            values[name] = entry[name]
        elif name == "sources":
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
