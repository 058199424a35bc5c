"""A QNet in canonical forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from hmq_fpga.deploy.bounds import Relaxation
from hmq_fpga.deploy.proof.forms import Forms, Function, Key, Value
from hmq_fpga.ir.errors import assert_never
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Computed,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Gather,
    Input,
    LeakyRelu,
    Maximum,
    MaxPool,
    Minimum,
    Multiply,
    Pad,
    Padding,
    Quantize,
    Scale,
    Shape,
    Subtract,
    Table,
    Upsample,
)

Values = npt.NDArray[np.object_]
Index = npt.NDArray[np.int64]


def input_forms(net: QNet, forms: Forms) -> list[Value]:
    """The codes of all inputs in a row, each a variable of its own."""
    values: list[Value] = []
    for op in net.inputs:
        for _ in range(math.prod(op.shape)):
            values.append(forms.leaf(("input", len(values)), op.format.lo, op.format.hi))
    return values


@dataclass(frozen=True)
class Cast:
    """What a type makes of an op's values in place of the op's own rounding.

    Attributes:
        name: tells it from others.
        function: of codes, to codes.
        shift: bits of fraction that the result has more than the op's tensor.
        before: whether it takes the codes of the op's source.
    """

    name: str
    function: Function
    shift: int
    before: bool


def network_forms(
    net: QNet,
    forms: Forms,
    casts: Mapping[str, Cast] | None = None,
    codes: Sequence[Value] = (),
    relaxation: Relaxation | None = None,
) -> dict[str, Values]:
    """The codes of every tensor, in its shape, by op name.

    Args:
        net: the network.
        forms: where they are.
        casts: types that differ from the network's, by op.
        codes: of all inputs in a row; by default each a variable of its own.
        relaxation: of the network, whose bounds the sums before quantizers get.
    """
    codes = codes or input_forms(net, forms)
    inputs = _shaped(list(codes), (len(codes),))
    tensors: dict[str, Values] = {}
    for op in net.ops:
        if isinstance(op, Input):
            size = math.prod(op.shape)
            tensors[op.name], inputs = inputs[:size].reshape(op.shape), inputs[size:]
        else:
            cast = (casts or {}).get(op.name)
            if relaxation and (isinstance(op, Quantize) or (cast and cast.before)):
                _limit(forms, relaxation, op.reads[0], tensors)
            followed = _Op(net, forms, tensors)
            tensors[op.name] = made = followed.run(op)
            if cast is not None:
                if relaxation and not cast.before:
                    _limit(forms, relaxation, op.name, tensors)
                held = followed.cast(cast, tensors[op.reads[0]] if cast.before else made)
                tensors[op.name] = held.reshape(made.shape)
                if any(a.key != b.key for a, b in zip(made.ravel(), held.ravel(), strict=True)):
                    relaxation = None  # what is behind it is another network's
    return tensors


def _limit(forms: Forms, relaxation: Relaxation, tensor: str, tensors: Mapping[str, Values]) -> None:
    if (bounds := relaxation.bounds(tensor)) is not None:
        for value, lo, hi in zip(tensors[tensor].ravel(), *bounds, strict=True):
            forms.limit(value, int(lo), int(hi))


def output_forms(net: QNet, forms: Forms, tensors: dict[str, Values]) -> list[Value]:
    """The output codes in a row, as the network joins them."""
    frac = net.output_format.frac
    return [
        forms.sum([(value, 1 << frac - net.formats[name].frac)])
        for name in net.outputs
        for value in tensors[name].ravel()
    ]


class _Op:
    def __init__(self, net: QNet, forms: Forms, tensors: dict[str, Values]) -> None:
        self.net, self.forms, self.tensors = net, forms, tensors

    def run(self, op: Computed) -> Values:
        shape = self.net.shapes[op.name]
        if isinstance(op, Add | Subtract | Maximum | Minimum | Multiply | Concat):
            return self._merged(op)
        x = self.tensors[op.source]
        match op:
            case Quantize():
                frac = self.net.formats[op.source].frac
                return self._each(("quantize", op.format, frac), lambda v: op.format.requantize(v, frac), x)
            case LeakyRelu():
                return self._each(("leaky", op.shift), lambda v: np.where(v < 0, v, v << op.shift), x)
            case Table():
                first = self.net.formats[op.source].lo
                return self._each(("table", op.name), lambda v: op.values[v - first], x)
            case Dense():
                return self._sums(x.reshape(-1, x.shape[-1]), op.weight, op.bias, shape)
            case Conv():
                columns = self._windows(_padded(x.shape, op.padding), op.kernel, op.stride)
                return self._sums(self._at(x, columns.reshape(-1, len(op.matrix))), op.matrix, op.bias, shape)
            case DepthwiseConv():
                columns = self._windows(_padded(x.shape, op.padding), op.kernel, op.stride)
                return self._by_channel(self._at(x, columns), op.matrix, op.bias, shape)
            case Scale():
                return self._by_channel(x.reshape(-1, 1, x.shape[-1]), op.matrix, op.bias, shape)
            case AvgPool():
                columns = self._windows(np.arange(x.size).reshape(x.shape), op.window, op.stride)
                ones = np.ones((math.prod(op.window), shape[-1]), np.int64)
                return self._by_channel(self._at(x, columns), ones, np.zeros(shape[-1], np.int64), shape)
            case MaxPool():
                windows = self._at(x, self._windows(np.arange(x.size).reshape(x.shape), op.window, op.stride))
                windows = np.moveaxis(windows, 1, -1).reshape(-1, windows.shape[1])
                return _shaped([self.forms.maximum(row) for row in windows], shape)
            case Pad():
                return self._at(x, _padded(x.shape, op.padding))
            case Upsample():
                for axis, factor in enumerate(op.factor):
                    x = x.repeat(factor, axis)
                return x
            case Flatten():
                return x.reshape(-1)
            case Gather():
                return self._at(x, op.index, op.fill)
            case _:
                assert_never(op)

    def cast(self, cast: Cast, x: Values) -> Values:
        """What a type makes of values."""
        made = self._each(("cast", cast.name), cast.function, x)
        return _shaped([self.forms.shifted(v, -cast.shift) for v in made.ravel()], x.shape)

    def _merged(self, op: Add | Subtract | Maximum | Minimum | Multiply | Concat) -> Values:
        shape = self.net.shapes[op.name]
        fracs = [self.net.formats[name].frac for name in op.sources]
        finest = max(fracs) if not isinstance(op, Multiply) else None
        first, second = (
            _shaped(
                [self.forms.sum([(v, 1 << (finest - frac))]) for v in self.tensors[name].ravel()],
                self.tensors[name].shape,
            )
            if finest is not None
            else self.tensors[name]
            for name, frac in zip(op.sources, fracs, strict=True)
        )
        if isinstance(op, Concat):
            return np.concatenate([first, second], axis=-1)
        return _shaped([self._pair(op, a, b) for a, b in zip(first.ravel(), second.ravel(), strict=True)], shape)

    def _finer(self, x: Values, shift: int) -> Values:
        return _shaped([self.forms.sum([(v, 1 << shift)]) for v in x.ravel()], x.shape)

    def _pair(self, op: Add | Subtract | Maximum | Minimum | Multiply, a: Value, b: Value) -> Value:
        match op:
            case Add():
                return self.forms.sum([(a, 1), (b, 1)])
            case Subtract():
                return self.forms.sum([(a, 1), (b, -1)])
            case Maximum():
                return self.forms.maximum([a, b])
            case Minimum():
                return minimum(self.forms, a, b)
            case Multiply():
                return product(self.forms, a, b)
            case _:
                assert_never(op)

    def _each(self, name: tuple[Any, ...], function: Any, x: Values) -> Values:
        made = []
        for value in x.ravel():
            found = self.forms.apply(name, function, value)
            if found is None:  # too many codes to tabulate
                ends = function(np.array(self.forms.bounds(value)))
                found = self.forms.opaque(name, [value], int(ends.min()), int(ends.max()))
            made.append(found)
        return _shaped(made, x.shape)

    def _sums(self, rows: Values, weight: Codes, bias: Codes, shape: Shape) -> Values:
        made = [
            self.forms.sum([(rows[i, k], int(weight[k, j])) for k in np.flatnonzero(weight[:, j])], int(bias[j]))
            for i in range(len(rows))
            for j in range(weight.shape[1])
        ]
        return _shaped(made, shape)

    def _by_channel(self, columns: Values, weight: Codes, bias: Codes, shape: Shape) -> Values:
        """Of windows `(positions, terms, channels)` with weights `(terms, channels)`."""
        made = [
            self.forms.sum([(window[k, c], int(weight[k, c])) for k in range(len(weight))], int(bias[c]))
            for window in columns
            for c in range(weight.shape[1])
        ]
        return _shaped(made, shape)

    def _windows(self, index: Index, window: Shape, stride: Shape) -> Index:
        """Places of the values of each window, `(positions, values of a window, channels)`."""
        views = sliding_window_view(index, window, tuple(range(len(window))))  # type: ignore[call-overload]
        views = np.moveaxis(views[tuple(slice(None, None, step) for step in stride)], len(window), -1)
        return np.asarray(views.reshape(-1, math.prod(window), index.shape[-1]))

    def _at(self, x: Values, index: Index, fill: int = 0) -> Values:
        """The values at places counted in a row; -1 is the filling."""
        values = _shaped([*x.ravel(), self.forms.constant(fill)], (x.size + 1,))
        return np.asarray(values[index])


def minimum(forms: Forms, a: Value, b: Value) -> Value:
    """The smaller of two values."""
    return forms.sum([(forms.maximum([forms.sum([(a, -1)]), forms.sum([(b, -1)])]), -1)])


def select(forms: Forms, name: Key, holds: Function, key: Value, true: Value, false: Value) -> Value:
    """One value where a condition on the numerator of the key holds, else the other; a maximum where it is one.

    Args:
        forms: where they are.
        name: tells the condition from others.
        holds: the condition, on arrays.
        key: what it is about.
        true: the value where it holds.
        false: the value where it does not.
    """
    exp = max(true.exp, false.exp)
    true, false = (forms.sum([(v, 1), (Value(exp, 0, {}), 1)]) for v in (true, false))
    if not key.terms:
        return true if holds(np.array([key.constant]))[0] else false
    found = forms.apply((*name, "select"), lambda k, a, b: np.where(holds(k), a, b), key, true, false)
    if found is not None:
        return forms.shifted(found, -exp)
    more = forms.sum([(true, 1), (false, -1)])
    found = forms.apply((*name, "more"), lambda k, d: np.where(holds(k), d, 0), key, more)
    if found is not None:
        if found.key == _part(forms, "largest", np.maximum, more):
            return forms.maximum([true, false])
        if found.key == _part(forms, "least", np.minimum, more):
            return minimum(forms, true, false)
        return forms.sum([(false, 1), (forms.shifted(found, -more.exp), 1)])
    lo, hi = zip(forms.bounds(true), forms.bounds(false), strict=True)
    return forms.shifted(forms.opaque((*name, "select"), [key, true, false], min(lo), max(hi)), -exp)


def _part(forms: Forms, name: str, function: Function, value: Value) -> Key | None:
    found = forms.apply((name,), lambda d: function(d, 0), value)
    return found.key if found else None


def product(forms: Forms, a: Value, b: Value) -> Value:
    """The product of two values."""
    found = forms.apply(("product",), lambda x, y: x * y, a, b)
    if found is not None:
        return forms.shifted(found, -a.exp - b.exp)
    if not a.terms or not b.terms:
        constant, value = (a, b) if not a.terms else (b, a)
        return forms.shifted(forms.sum([(value, constant.constant)]), -constant.exp)
    sides = sorted((a, b), key=lambda v: v.key)
    corners = [x * y for x in forms.bounds(a) for y in forms.bounds(b)]
    return forms.shifted(forms.opaque(("product",), sides, min(corners), max(corners)), -a.exp - b.exp)


def _padded(shape: Shape, padding: Padding) -> Index:
    """Places of a tensor's values, with -1 around them."""
    return np.pad(np.arange(math.prod(shape)).reshape(shape), (*padding, (0, 0)), constant_values=-1)


def _shaped(values: list[Value], shape: Shape) -> Values:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made.reshape(shape)
