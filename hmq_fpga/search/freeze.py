"""From a `QModel` with a scheme to the exact integer network.

Channels-first becomes channels-last here, the order of flattened features included.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hmq_fpga.ir import ops
from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.graph import (
    INPUT,
    Activation,
    Add,
    Affine,
    AvgPool,
    Concat,
    Join,
    Node,
    Pad,
    QModel,
    Upsample,
    weight_site,
)

OUTLINE_BITS = 8
Order = np.ndarray[Any, Any] | None  # of flattened features: which of PyTorch's each one is; None: the same


def freeze(model: QModel) -> QNet:
    """The exact integer network of a model whose scheme is set.

    Raises:
        InvalidInput: when no scheme is set, or a weight is NaN.
        UnsupportedLayer: when the output is a flattened image, whose order would differ from PyTorch's.
    """
    if not model.formats:
        raise InvalidInput("model: no scheme is set, so there is nothing to freeze; search first")
    shape = _channels_last(model.input_shape)
    layers: list[ops.Op] = [ops.Input(name=INPUT, shape=shape, format=model.formats[INPUT])]
    shapes = {INPUT: model.input_shape}
    orders: dict[str, Order] = {INPUT: None}
    for node, layer in zip(model.nodes, model.layers, strict=True):
        if isinstance(layer, Join):  # the last one: a list of the outputs
            break
        shapes[node.name] = node.shape
        layers.append(_freeze_layer(model, node, layer, orders[node.sources[0]]))
        orders[node.name] = _order(layer, [(orders[name], shapes[name]) for name in node.sources])
    outputs = model.nodes[-1].sources if isinstance(model.layers[-1], Join) else (model.nodes[-1].name,)
    if any(orders[name] is not None for name in outputs):
        raise UnsupportedLayer("model: its output is a flattened image; end with a Linear, or do not flatten")
    return QNet(tuple(layers), outputs)


def outline(model: QModel) -> QNet:
    """The network that a search will find, but for its numbers; leaves a scheme that means nothing in the model.

    Raises:
        UnsupportedLayer: as `freeze`.
    """
    limits = [layer.limit_log2 for layer in model.layers if isinstance(layer, Activation)]
    threshold = min([0, *(limit for limit in limits if limit is not None)])
    formats = {
        s.name: Fixed.from_threshold(signed=s.signed, bits=OUTLINE_BITS, threshold_log2=threshold) for s in model.sites
    }
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


def _freeze_layer(model: QModel, node: Node, layer: nn.Module, order: Order) -> ops.Op:
    name, source = node.name, node.sources[0]
    match layer:
        case nn.Linear() | nn.Conv1d() | nn.Conv2d() | Affine():
            return _freeze_linear(model, node, layer, order)
        case Activation():
            return ops.Quantize(name=name, source=source, format=model.formats[name])
        case nn.LeakyReLU():
            return ops.LeakyRelu(name=name, source=source, shift=-_log2(layer.negative_slope))
        case nn.MaxPool1d() | nn.MaxPool2d():
            return ops.MaxPool(name=name, source=source, window=_sizes(layer.kernel_size), stride=_sizes(layer.stride))
        case AvgPool() if layer.values == layer.divisor:
            return ops.AvgPool(name=name, source=source, window=layer.window, stride=layer.stride)
        case AvgPool():
            return _sum_pool(node, layer)
        case Pad():
            return ops.Pad(name=name, source=source, padding=layer.padding)
        case Upsample():
            return ops.Upsample(name=name, source=source, factor=layer.factor)
        case nn.Flatten():
            return ops.Flatten(name=name, source=source)
        case Add():
            return ops.Add(name=name, sources=_pair(node.sources))
        case Concat():
            return ops.Concat(name=name, sources=_pair(node.sources))
        case _:
            raise AssertionError(f"instrument() made a layer that freeze() does not know: {layer}")


def _order(layer: nn.Module, sources: list[tuple[Order, tuple[int, ...]]]) -> Order:
    """Order of the features that a layer makes of sources with these orders and shapes."""
    order, shape = sources[0]
    match layer:
        case nn.Linear():
            return None
        case nn.Flatten() if len(shape) > 1:
            index = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), 0, -1).ravel()
            moved: Order = index if (np.diff(index) != 1).any() else None
            return moved
        case Concat() if any(other is not None for other, _ in sources):
            first, second = (_positions(*source) for source in sources)
            joined: Order = np.concatenate([first, len(first) + second])
            return joined
        case Add() if not np.array_equal(_positions(*sources[0]), _positions(*sources[1])):
            raise UnsupportedLayer("model: adds a flattened image to features of another order; flatten after adding")
        case _:
            return order


def _positions(order: Order, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The order spelled out where it is PyTorch's."""
    return np.arange(shape[0]) if order is None else order


def _freeze_linear(model: QModel, node: Node, layer: Any, order: Order) -> ops.Linear:
    format_ = model.formats[weight_site(node.name)]
    weight = format_.encode(_array(layer.weight))
    common: dict[str, Any] = {"name": node.name, "source": node.sources[0], "weight_format": format_}
    common["bias"] = _round(_array(layer.bias), -_log2(model.steps[node.name]))
    every = slice(None) if order is None else order
    if isinstance(layer, nn.Linear):
        return ops.Dense(**common, weight=np.ascontiguousarray(weight.T[every]))
    if isinstance(layer, Affine):
        common["bias"] = np.ascontiguousarray(common["bias"][every])
        return ops.Scale(**common, weight=np.ascontiguousarray(weight[every]))
    windows: dict[str, Any] = {"stride": layer.stride, "padding": _padding(layer)}
    if layer.groups > 1:
        return ops.DepthwiseConv(**common, **windows, weight=np.moveaxis(weight[:, 0], 0, -1).copy())
    return ops.Conv(**common, **windows, weight=np.moveaxis(weight, (1, 0), (-2, -1)).copy())


def _sum_pool(node: Node, layer: AvgPool) -> ops.DepthwiseConv | ops.Conv:
    """A mean over no power of two of values: their sum, by weights of one.

    Keras has no depthwise convolution of two different strides; an ordinary one with zeros between channels does it.
    """
    channels, *positions = node.shape
    stride = layer.stride if max(positions) > 1 else tuple(max(layer.stride) for _ in positions)
    weight = np.ones((*layer.window, channels), np.int64)
    common: dict[str, Any] = {
        "name": node.name,
        "source": node.sources[0],
        "weight_format": Fixed(signed=False, width=1, frac=_log2(layer.divisor)),
        "bias": np.zeros(channels, np.int64),
        "stride": stride,
        "padding": tuple((0, 0) for _ in layer.window),
    }
    if len(set(stride)) == 1:
        return ops.DepthwiseConv(**common, weight=weight)
    return ops.Conv(**common, weight=weight[..., None] * np.eye(channels, dtype=np.int64))


def _padding(layer: nn.Conv1d | nn.Conv2d) -> ops.Padding:
    """Explicit padding; PyTorch's 'same' puts the odd one at the end."""
    if layer.padding == "valid":
        return tuple((0, 0) for _ in layer.kernel_size)
    if layer.padding == "same":
        return tuple(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in layer.kernel_size)
    return tuple((n, n) for n in layer.padding)  # type: ignore[misc]


def _sizes(given: Any) -> ops.Shape:
    """Of the layers that `instrument` makes: always a tuple."""
    return tuple(given)


def _pair(sources: tuple[str, ...]) -> tuple[str, str]:
    first, second = sources
    return first, second


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
