"""From a `QModel` with a scheme to the exact integer network.

PyTorch has an image's channels first, the network has them last, and a dense layer reads features in any order. So a
tensor is known by where its values lie in the network, and is put into another order only where an operation needs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hmq_fpga.ir import ops
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed
from hmq_fpga.ir.network import QNet, naming
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.graph import Node, QModel, below_format
from hmq_fpga.search.layers import (
    Activation,
    Add,
    Affine,
    AvgPool,
    Below,
    Bilinear,
    Concat,
    Function,
    Join,
    Maximum,
    MaxPool,
    Minimum,
    Move,
    Multiply,
    Pad,
    Subtract,
    Upsample,
)

OUTLINE_BITS = 8
Places = npt.NDArray[np.int64]
_ELEMENTWISE: dict[type[nn.Module], type[Any]] = {
    Add: ops.Add,
    Subtract: ops.Subtract,
    Multiply: ops.Multiply,
    Maximum: ops.Maximum,
    Minimum: ops.Minimum,
}


def freeze(model: QModel) -> QNet:
    """The exact integer network of a model whose scheme is set.

    Raises:
        InvalidInput: when no scheme is set, a weight is NaN, or a table would have too many values.
    """
    if not model.formats:
        raise InvalidInput("model: no scheme is set, so there is nothing to freeze; search first")
    return _Freezer(model).net()


def outline(model: QModel, known: Mapping[str, Fixed | int] | None = None) -> QNet:
    """The network that a search will find, but for its numbers; leaves a scheme that means nothing in the model.

    Args:
        model: without a scheme.
        known: formats or bit-widths of sites, by name.

    Raises:
        UnsupportedLayer: as `freeze`.
    """
    limits = [layer.limit_log2 for layer in model.layers if isinstance(layer, Activation)]
    threshold = min([0, *(limit for limit in limits if limit is not None)])
    formats = {}
    for site in model.sites:
        given = (known or {}).get(site.name, OUTLINE_BITS)
        formats[site.name] = (
            given
            if isinstance(given, Fixed)
            else Fixed.from_threshold(signed=site.signed, bits=given, threshold_log2=threshold)
        )
    model.set_scheme(scheme_of(model, formats, {}))
    return freeze(model)


@torch.no_grad()
def run_codes(model: QModel, x: Tensor, output_format: Fixed) -> Codes:
    """Output of a model whose scheme is set, as codes `(batch, *output shape)`, channels last.

    Computed in float64, which is exact while partial sums fit 53 bits.

    Args:
        model: its parameters are left as they are.
        x: real inputs, `(batch, *input_shape)`.
        output_format: `QNet.output_format` of the frozen model.
    """
    double = copy.deepcopy(model).double().eval()
    output = torch.cat([double(batch.double()) for batch in x.split(1024)])
    return _round(_array(output if output.ndim == 2 else output.movedim(1, -1)), output_format.frac)


# --- where values lie ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Lying:
    """Where a tensor of PyTorch's lies in the network.

    Attributes:
        op: name of the op whose tensor holds its values.
        places: of its own shape for one sample: where in that tensor, counted in a row, a value lies; -1: it is zero.
        name: for an op that has to put it into another order, if there is one that fits.
    """

    op: str
    places: Places
    name: str = ""


def _counted(shape: ops.Shape) -> Places:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


def _inverse(places: Places) -> Places:
    """Where in a row each number from 0 stands: what `argsort` finds of any numbers, without sorting."""
    numbers = np.empty(places.size, np.int64)
    numbers[places.ravel()] = np.arange(places.size)
    return numbers


class _Freezer:
    """Walks over a model's layers and collects the ops."""

    def __init__(self, model: QModel) -> None:
        self._model = model
        self._ops: dict[str, ops.Op] = {}
        self._types: dict[str, ops.TensorType] = {}
        self._tensors: dict[str, _Lying] = {}
        self._reordered: dict[tuple[str, ops.Shape, bytes], str] = {}
        self._names = {*model.inputs, *(node.name for node in model.nodes)}

    def net(self) -> QNet:
        for name, shape in self._model.inputs.items():
            entry = ops.Input(name=name, shape=_channels_last(shape), format=self._model.formats[name])
            self._tensors[name] = self._along(entry, 0)
        for node, layer in zip(self._model.nodes, self._model.layers, strict=True):
            if not isinstance(layer, Join):
                self._tensors[node.name] = self._freeze(node, layer)
        read = [self._channels_last(self._tensors[name], name) for name in self._model.outputs]
        return QNet(tuple(self._ops.values()), tuple(read))

    def _freeze(self, node: Node, layer: nn.Module) -> _Lying:
        name, formats = node.name, self._model.formats
        sources = [self._tensors[source] for source in node.sources]
        x = sources[0]
        match layer:
            case nn.Linear():
                return self._dense(node, layer, x)
            case nn.Conv1d() | nn.Conv2d():
                return self._convolution(node, layer, x)
            case nn.ConvTranspose1d() | nn.ConvTranspose2d():
                return self._transposed_convolution(node, layer, x)
            case Affine():
                return self._affine(node, layer, x)
            case Activation():
                x = self._whole(x, name)
                return self._in_place(ops.Quantize(name=name, source=x.op, format=formats[name]), x)
            case Function():
                x, values = self._whole(x, name), formats[name].encode(_array(self._model.tables[name]))
                return self._in_place(ops.Table(name=name, source=x.op, values=values, format=formats[name]), x)
            case nn.LeakyReLU():
                x = self._whole(x, name)
                return self._in_place(ops.LeakyRelu(name=name, source=x.op, shift=-_log2(layer.negative_slope)), x)
            case MaxPool():
                source = self._padded_for_maximum(x, layer, name)
                return self._along(ops.MaxPool(name=name, source=source, window=layer.window, stride=layer.stride), 0)
            case AvgPool():
                return self._along(_average(node, layer, self._channels_last(x, name)), 0)
            case Bilinear():
                return self._bilinear(node, layer, x)
            case Pad():
                return self._along(ops.Pad(name=name, source=self._channels_last(x, name), padding=layer.padding), 0)
            case Upsample():
                return self._along(ops.Upsample(name=name, source=self._channels_last(x, name), factor=layer.factor), 0)
            case Move():
                index = layer.index.cpu().numpy()
                return _Lying(x.op, np.where(index < 0, -1, x.places.ravel()[index]), name)
            case Add() | Subtract() | Multiply() | Maximum() | Minimum():
                first, second = self._alike(sources[0], sources[1], name)
                return self._in_place(_ELEMENTWISE[type(layer)](name=name, sources=(first.op, second)), first)
            case Below():
                return self._below(node, *sources)
            case Concat():
                return self._concat(node, layer.axis, sources)
            case _:
                raise AssertionError(f"instrument() made a layer that freeze() does not know: {layer}")

    # order

    def _add(self, op: ops.Op) -> str:
        with naming(op):
            op.check()
            self._types[op.name] = op.result([self._types[name] for name in op.reads])
        self._ops[op.name] = op
        return op.name

    def _along(self, op: ops.Op, axis: int) -> _Lying:
        """The tensor of a new op, whose channels are PyTorch's dimension `axis`."""
        return _Lying(self._add(op), np.moveaxis(_counted(self._types[op.name].shape), -1, axis))

    def _in_place(self, op: ops.Op, x: _Lying) -> _Lying:
        """The tensor of a new op that leaves every value where it is."""
        return _Lying(self._add(op), x.places, x.name)

    def _whole(self, x: _Lying, reader: str) -> _Lying:
        """`x` in a tensor that holds each of its values once and nothing else."""
        size = math.prod(self._types[x.op].shape)
        held = np.zeros(size + 1, bool)
        held[x.places] = True  # the last one for zeros
        if x.places.size == size and held[:-1].all():
            return x
        return _Lying(self._channels_last(x, reader), np.moveaxis(_counted(_channels_last(x.places.shape)), -1, 0))

    def _channels_last(self, x: _Lying, reader: str) -> str:
        """Name of a tensor that holds `x` with its first dimension last."""
        return self._ordered(x, np.moveaxis(_counted(x.places.shape), 0, -1), reader)

    def _ordered(self, x: _Lying, order: Places, reader: str) -> str:
        """Name of a tensor in which the values of `x` lie in an order, given by their places in PyTorch's row."""
        index = x.places.ravel()[order]
        held = self._types[x.op].shape
        if np.array_equal(index, _counted(held)):
            return x.op
        key = x.op, index.shape, index.tobytes()
        if key not in self._reordered:
            self._reordered[key] = self._reorder(x, index, reader)
        return self._reordered[key]

    def _reorder(self, x: _Lying, index: Places, reader: str) -> str:
        held = self._types[x.op].shape
        name = x.name if x.name and x.name not in self._ops else self._free(f"{reader}_read")
        if index.ndim == 1 and np.array_equal(index, np.arange(math.prod(held))):
            return self._add(ops.Flatten(name=name, source=x.op))
        return self._add(ops.Gather(name=name, source=x.op, index=np.ascontiguousarray(index)))

    def _free(self, base: str) -> str:
        name, n = base, 1
        while name in self._ops or name in self._names:
            name, n = f"{base}_{n}", n + 1
        return name

    def _flat(self, x: _Lying, reader: str) -> tuple[str, Places]:
        """Name of a tensor of one dimension that holds `x`, and in which order: PyTorch's place of each value."""
        x = self._whole(x, reader)
        order = _inverse(x.places)
        return self._ordered(x, order, reader), order

    # layers

    def _constants(self, node: Node, layer: Any) -> tuple[Codes, dict[str, Any]]:
        """Weight codes as PyTorch has them, and the other fields of a linear op, but for its source."""
        tensor = self._model.scheme[self._model.weight_sites[node.name]]
        bias = _round(_array(layer.bias), -_log2(self._model.steps[node.name]))
        return tensor.encode(_array(layer.weight)), {"name": node.name, "weight_format": tensor.format, "bias": bias}

    def _dense(self, node: Node, layer: nn.Linear, x: _Lying) -> _Lying:
        weight, fields = self._constants(node, layer)
        if x.places.ndim == 1:
            source, order = self._flat(x, node.name)
            weight = weight[:, order]
        else:
            source = self._ordered(x, _counted(x.places.shape), node.name)
        return self._along(ops.Dense(**fields, source=source, weight=np.ascontiguousarray(weight.T)), -1)

    def _affine(self, node: Node, layer: Affine, x: _Lying) -> _Lying:
        weight, fields = self._constants(node, layer)
        if layer.axis is None or x.places.ndim == 1:
            source, order = self._flat(x, node.name)
            fields["bias"] = np.ascontiguousarray(fields["bias"][order])
            made = self._add(ops.Scale(**fields, source=source, weight=np.ascontiguousarray(weight[order])))
            return _Lying(made, _inverse(order).reshape(x.places.shape))
        order = np.moveaxis(_counted(x.places.shape), layer.axis, -1)
        source = self._ordered(x, order, node.name)
        return self._along(ops.Scale(**fields, source=source, weight=weight), layer.axis)

    def _convolution(self, node: Node, layer: nn.Conv1d | nn.Conv2d, x: _Lying) -> _Lying:
        weight, fields = self._constants(node, layer)
        fields |= {"stride": layer.stride, "padding": _padding(layer), "dilation": _dilation(layer)}
        fields["source"] = self._channels_last(x, node.name)
        if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
            return self._along(ops.DepthwiseConv(**fields, weight=np.moveaxis(weight[:, 0], 0, -1).copy()), 0)
        weight = np.moveaxis(weight, (1, 0), (-2, -1)).copy()
        return self._along(ops.Conv(**fields, weight=weight, groups=layer.groups), 0)

    def _transposed_convolution(self, node: Node, layer: nn.ConvTranspose1d | nn.ConvTranspose2d, x: _Lying) -> _Lying:
        """Zeros between the values that are read, and a convolution with the weights turned round."""
        weight, fields = self._constants(node, layer)
        reach = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        settings: Any = layer.padding, layer.output_padding
        pads = [(r - p, r - p + more) for r, p, more in zip(reach, *settings, strict=True)]
        spread = [
            [
                place // step if place % step == 0 else -1
                for place in range(max(-before, 0), (n - 1) * step + 1 + min(after, 0))
            ]
            for n, step, (before, after) in zip(x.places.shape[1:], layer.stride, pads, strict=True)
        ]
        source = self._spread(x, spread, node.name)
        groups, spatial = layer.groups, tuple(range(2, weight.ndim))
        turned = np.flip(weight, spatial).reshape(groups, -1, *weight.shape[1:])  # group, channels, outputs, kernel
        turned = np.moveaxis(turned, (1, 0, 2), (-3, -2, -1))
        turned = np.ascontiguousarray(turned.reshape(*turned.shape[:-2], -1))
        padding = tuple((max(before, 0), max(after, 0)) for before, after in pads)
        fields |= {"stride": (1,) * len(spatial), "padding": padding, "dilation": _dilation(layer)}
        return self._along(ops.Conv(**fields, source=source, weight=turned, groups=groups), 0)

    def _bilinear(self, node: Node, layer: Bilinear, x: _Lying) -> _Lying:
        """A triangle of weights over the values with their edges repeated and zeros between them."""
        triangles, spread = [], []
        for n, factor in zip(x.places.shape[1:], layer.factor, strict=True):
            if factor == 1:
                triangles.append([1])
                spread.append(list(range(n)))
                continue
            triangles.append([2 * factor - abs(2 * i - 2 * factor + 1) for i in range(2 * factor)])
            places = [i + 1 - factor // 2 for i in range((n + 2) * factor - 1)]
            spread.append([min(max(i // factor - 1, 0), n - 1) if i % factor == 0 else -1 for i in places])
        kernel = np.array(triangles[0]) if len(triangles) == 1 else np.outer(triangles[0], triangles[1])
        channels = x.places.shape[0]
        weight = np.repeat(kernel.astype(np.int64)[..., None], channels, axis=-1)
        op = ops.DepthwiseConv(
            name=node.name,
            source=self._spread(x, spread, node.name),
            weight=weight,
            weight_format=Fixed.enclosing(0, int(weight.max()), -_log2(layer.step)),
            bias=np.zeros(channels, np.int64),
            stride=(1,) * len(spread),
            padding=((0, 0),) * len(spread),
        )
        return self._along(op, 0)

    def _alike(self, x: _Lying, other: _Lying, reader: str) -> tuple[_Lying, str]:
        """The first of two tensors of one shape, and the name of one that holds the second in the same order."""
        first = self._whole(x, reader)
        held = self._types[first.op].shape
        return first, self._ordered(other, _inverse(first.places).reshape(held), reader)

    def _below(self, node: Node, x: _Lying, largest: _Lying) -> _Lying:
        """A difference that is never negative, in a format that it never exceeds."""
        first, second = self._alike(x, largest, node.name)
        difference = self._free(f"{node.name}_difference")
        self._add(ops.Subtract(name=difference, sources=(second, first.op)))
        format_ = below_format(self._types[first.op].format)
        return self._in_place(ops.Quantize(name=node.name, source=difference, format=format_), first)

    def _spread(self, x: _Lying, spread: list[list[int]], reader: str) -> str:
        """Name of an image whose rows and columns are those of `x` by number, and zero where that is -1."""
        places = np.moveaxis(x.places, 0, -1)
        for axis, numbers in enumerate(spread):
            index = np.array(numbers)
            places = np.where(
                np.expand_dims(index < 0, tuple(range(1, places.ndim - axis))), -1, places.take(index, axis)
            )
        lying = _Lying(x.op, np.moveaxis(places, -1, 0), self._free(f"{reader}_spread"))
        return self._channels_last(lying, reader)

    def _padded_for_maximum(self, x: _Lying, layer: MaxPool, name: str) -> str:
        """Name of the image behind a rim of the smallest code."""
        source = self._channels_last(x, name)
        if not np.any(layer.padding):
            return source
        held, padding = self._types[source], self._free(f"{name}_padding")
        if not held.format.signed:
            return self._add(ops.Pad(name=padding, source=source, padding=layer.padding))
        index = np.pad(_counted(held.shape), (*layer.padding, (0, 0)), constant_values=-1)
        return self._add(ops.Gather(name=padding, source=source, index=index, fill=held.format.lo))

    def _concat(self, node: Node, axis: int, sources: list[_Lying]) -> _Lying:
        if sources[0].places.ndim == 1:
            flat = [self._flat(x, node.name) for x in sources]
            starts = np.cumsum([0, *(len(order) for _, order in flat)])
            order = np.concatenate([start + order for start, (_, order) in zip(starts, flat, strict=False)])
            return _Lying(self._side_by_side(node.name, [name for name, _ in flat]), _inverse(order))
        orders = [np.moveaxis(_counted(x.places.shape), axis, -1) for x in sources]
        names = [self._ordered(x, order, node.name) for x, order in zip(sources, orders, strict=True)]
        made = self._side_by_side(node.name, names)
        return _Lying(made, np.moveaxis(_counted(self._types[made].shape), -1, axis))

    def _side_by_side(self, name: str, sources: list[str]) -> str:
        joined = sources[0]
        for n, source in enumerate(sources[1:], 2):
            own = name if n == len(sources) else self._free(f"{name}_of_{n}")
            joined = self._add(ops.Concat(name=own, sources=(joined, source)))
        return joined


def _average(node: Node, layer: AvgPool, source: str) -> ops.AvgPool | ops.DepthwiseConv:
    """A mean, or where a window does not hold the divisor's number of values, their sum by weights of one."""
    if layer.values == layer.divisor:
        return ops.AvgPool(name=node.name, source=source, window=layer.window, stride=layer.stride)
    channels, *positions = node.shape
    return ops.DepthwiseConv(
        name=node.name,
        source=source,
        weight=np.ones((*layer.window, channels), np.int64),
        weight_format=Fixed(signed=False, width=1, frac=_log2(layer.divisor)),
        bias=np.zeros(channels, np.int64),
        stride=layer.stride if max(positions) > 1 else tuple(max(layer.stride) for _ in positions),
        padding=tuple((0, 0) for _ in layer.window),
    )


def _padding(layer: nn.Conv1d | nn.Conv2d) -> ops.Padding:
    """Explicit padding; PyTorch's 'same' puts the odd one at the end."""
    if layer.padding == "valid":
        return tuple((0, 0) for _ in layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((n, n) for n in layer.padding)  # type: ignore[misc]


def _dilation(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d) -> ops.Shape:
    return tuple(layer.dilation) if set(layer.dilation) != {1} else ()


def _log2(power: float) -> int:
    """Exponent of a power of two."""
    return math.frexp(power)[1] - 1


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().double().cpu().numpy()


def _round(values: np.ndarray[Any, Any], frac: int) -> Codes:
    """Codes on the grid of an accumulator, in the widest format: nothing saturates that a network may hold."""
    return Fixed(signed=True, width=MAX_WIDTH, frac=frac).encode(values)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:], shape[0])
