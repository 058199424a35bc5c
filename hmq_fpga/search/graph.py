"""From the user's module to a model with a quantizer at every tensor that hardware will see, and on to a QNet.

This is the only place that knows PyTorch's channels-first layout.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from hmq_fpga.ir import network
from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.fixed import MAX_WIDTH, Codes, Fixed
from hmq_fpga.ir.scheme import Kind, Scheme
from hmq_fpga.search.quantizers import Grid, fake_quantize

INPUT = "input"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A tensor that gets a format.

    Attributes:
        name: its name in the `Scheme`.
        kind: weight, activation or input.
        size: elements; of an activation for one sample.
        signed: whether it can be negative; the input's is decided by the training data.
    """

    name: str
    kind: Kind
    size: int
    signed: bool


@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of a `QModel`.

    Attributes:
        name: the layer, and the tensor that it makes.
        source: the tensor that it reads.
        path: what the user's model calls it.
        shape: of the tensor for one sample, channels first.
    """

    name: str
    source: str
    path: str
    shape: tuple[int, ...]


class QModel(nn.Module):
    """A float model in which every tensor that becomes a type in hardware has a `Site`.

    The forward pass runs on floats until a scheme is set, then on values of the scheme's formats with straight-through
    gradients: weights, input and activations rounded and saturated, biases rounded to their accumulator's grid.

    Attributes:
        input_shape: shape of one sample, channels first.
        sites: the tensors to quantize, in network order.
        nodes: the layers, in execution order.
        notes: what instrumentation folded or removed, one sentence each.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        layers: Mapping[str, nn.Module],
        nodes: Iterable[Node],
        sites: Iterable[Site],
        notes: Iterable[str],
    ) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.nodes, self.sites, self.notes = tuple(nodes), tuple(sites), tuple(notes)
        self.layers = nn.ModuleList(layers[node.name] for node in self.nodes)
        self._formats: dict[str, Fixed] = {}
        self._grids: dict[str, Grid] = {}

    @property
    def formats(self) -> Mapping[str, Fixed]:
        """Formats by site name; empty for a float model."""
        return self._formats

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights by site name, in network order."""
        pairs = zip(self.nodes, self.layers, strict=True)
        return {weight_site(node.name): layer.weight for node, layer in pairs if isinstance(layer, LINEAR_LAYERS)}

    def layer(self, name: str) -> nn.Module:
        """The layer that makes the tensor `name`."""
        return next(layer for node, layer in zip(self.nodes, self.layers, strict=True) if node.name == name)

    def set_scheme(self, scheme: Scheme) -> None:
        """Freeze the formats of all sites.

        Raises:
            InvalidInput: when the scheme does not name exactly the sites of this model.
        """
        names = [site.name for site in self.sites]
        if sorted(scheme) != sorted(names):
            differing = sorted(set(names) ^ set(scheme))
            raise InvalidInput(f"scheme and model differ in the tensors {differing}")
        self._formats = {name: scheme[name].format for name in names}
        self._grids = {name: Grid.of(f) for name, f in self._formats.items()}
        for node, layer in zip(self.nodes, self.layers, strict=True):
            if isinstance(layer, LINEAR_LAYERS):
                step = self._grids[_feeding_site(self, node)].step * self._grids[weight_site(node.name)].step
                self._grids[_bias(node.name)] = Grid.unbounded(step)

    def forward(
        self, x: Tensor, grids: Mapping[str, Grid] | None = None, observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor:
        """Output for `x`, `(batch, *input_shape)`.

        Args:
            x: real inputs.
            grids: quantizer of each site by name, in place of the frozen ones; a site that is left out stays float.
            observe: called with the name and the unquantized tensor of the input and of every activation.
        """
        grids = self._grids if grids is None else grids

        def quantize(name: str, tensor: Tensor) -> Tensor:
            if observe:
                observe(name, tensor)
            return fake_quantize(tensor, grids[name]) if name in grids else tensor

        tensors = {INPUT: quantize(INPUT, x)}
        for node, layer in zip(self.nodes, self.layers, strict=True):
            source = tensors[node.source]
            if isinstance(layer, LINEAR_LAYERS):
                weight, bias = layer.weight, layer.bias
                if (grid := grids.get(weight_site(node.name))) is not None:
                    weight = fake_quantize(weight, grid)
                if (grid := grids.get(_bias(node.name))) is not None:
                    bias = fake_quantize(bias, grid)
                tensors[node.name] = _linear(layer, source, weight, bias)
            elif isinstance(layer, Activation):
                tensors[node.name] = quantize(node.name, layer(source))
            else:
                tensors[node.name] = layer(source)
        return tensors[self.nodes[-1].name]


class Activation(nn.Module):
    """A place where hardware rounds and saturates, after a ReLU or by itself."""

    def __init__(self, *, relu: bool) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Tensor before its quantizer, of any shape."""
        return torch.relu(x) if self.relu else x


LINEAR_LAYERS = (nn.Linear, nn.Conv2d)


def weight_site(layer: str) -> str:
    """Site name of a layer's weight."""
    return f"{layer}.weight"


def _bias(layer: str) -> str:
    return f"{layer}.bias"


def _linear(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def _feeding_site(model: QModel, node: Node) -> str:
    """The site whose format a node's input has."""
    by_name = {n.name: n for n in model.nodes}
    name = node.source
    while name != INPUT and not isinstance(model.layer(name), Activation):
        name = by_name[name].source
    return name


# --- instrumentation -------------------------------------------------------------------------------------------------


_Reader = Callable[..., nn.Module | None]
_READERS: dict[Any, _Reader] = {}


def _reads(*targets: Any) -> Callable[[_Reader], _Reader]:
    """Register how a module type, function or method name becomes a layer; None means it does nothing in evaluation."""

    def register(reader: _Reader) -> _Reader:
        _READERS.update(dict.fromkeys(targets, reader))
        return reader

    return register


@_reads(nn.Linear)
def _read_linear(module: nn.Linear) -> nn.Module:
    return _with_bias(module, module.out_features)


@_reads(nn.Conv2d)
def _read_conv2d(module: nn.Conv2d) -> nn.Module:
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        raise UnsupportedLayer("Conv2d is supported with groups=1, dilation=1 and zero padding")
    return _with_bias(module, module.out_channels)


def _with_bias(module: Any, outputs: int) -> nn.Module:
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_zeros(outputs))
    return module


@_reads(nn.BatchNorm1d, nn.BatchNorm2d)
def _read_batchnorm(module: nn.Module) -> nn.Module:
    return module


@_reads(nn.ReLU)
def _read_relu_module(_module: nn.ReLU) -> nn.Module:
    return Activation(relu=True)


@_reads(F.relu, torch.relu, "relu")
def _read_relu_function(inplace: bool = False) -> nn.Module:  # noqa: ARG001
    return Activation(relu=True)


@_reads(nn.MaxPool2d)
def _read_max_pool_module(module: nn.MaxPool2d) -> nn.Module:
    return _read_max_pool(
        module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, module.return_indices
    )


@_reads(F.max_pool2d, torch.max_pool2d)
def _read_max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    if _pair(padding) != (0, 0) or _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        raise UnsupportedLayer("max pooling is supported with padding=0, dilation=1, ceil_mode=False")
    return nn.MaxPool2d(_pair(kernel_size), _pair(stride or kernel_size))


@_reads(nn.Flatten)
def _read_flatten_module(module: nn.Flatten) -> nn.Module:
    return _read_flatten(module.start_dim, module.end_dim)


@_reads(torch.flatten, "flatten")
def _read_flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    if (start_dim, end_dim) != (1, -1):
        raise UnsupportedLayer("flatten is supported over all dimensions but the batch: start_dim=1, end_dim=-1")
    return nn.Flatten()


@_reads(nn.Dropout, nn.Dropout2d, nn.Identity)
def _read_nothing_module(_module: nn.Module) -> None:
    return None


@_reads(F.dropout)
def _read_nothing_function(*_arguments: Any, **_settings: Any) -> None:
    return None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def supported() -> list[str]:
    """Names of the supported modules, functions and methods."""
    return sorted(
        {
            t.__name__ if isinstance(t, type) else f".{t}()" if isinstance(t, str) else f"{t.__name__}()"
            for t in _READERS
        }
    )


def instrument(model: nn.Module, input_shape: tuple[int, ...], *, input_signed: bool = True) -> QModel:
    """Trace a float model and put a quantizer site at every tensor that becomes a type in hardware.

    BatchNorm is folded into the layer before it, dropout is removed. Every weight, the input, every ReLU and every
    other value that a layer with weights reads gets a site; the output stays an exact accumulator. The given
    model is left as it is.

    Args:
        model: any module that torch.fx can trace and whose operations are supported.
        input_shape: shape of one sample, channels first.
        input_signed: whether inputs can be negative.

    Raises:
        UnsupportedLayer: naming the module or function that is not supported.
        InvalidInput: when the model cannot be traced, holds NaN, or does not take `input_shape`.
    """
    model = copy.deepcopy(model).float().eval()
    if type(model) in _READERS:  # torch.fx would look inside a lone layer
        model = nn.Sequential(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InvalidInput(f"model: {name} holds NaN or infinity; train it again or load another checkpoint")
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the user's forward: anything can come out of it
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise InvalidInput(f"model: torch.fx cannot trace {type(model).__name__}: {reason}") from error
    try:
        _Shapes(traced, garbage_collect_values=False).run(torch.zeros(2, *input_shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"model: does not accept an input of shape {input_shape}: {str(error).splitlines()[0]}"
        ) from error
    return _Builder(traced, input_shape, input_signed).build()


class _Shapes(fx.Interpreter):
    """Runs the traced graph, noting the shape of every result for one sample."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            node.meta["shape"] = tuple(result.shape[1:])
        return result


class _Builder:
    """Walks the traced graph once and collects the parts of a `QModel`."""

    def __init__(self, traced: fx.GraphModule, input_shape: tuple[int, ...], input_signed: bool) -> None:
        self._modules = dict(traced.named_modules())
        self._graph = traced.graph
        self._graph.eliminate_dead_code()
        self._input_shape = input_shape
        self._layers: dict[str, nn.Module] = {}
        self._nodes: dict[str, Node] = {}
        self._sites = [Site(name=INPUT, kind="input", size=int(np.prod(input_shape)), signed=input_signed)]
        self._notes: list[str] = []
        self._tensor_of: dict[fx.Node, str] = {}

    def build(self) -> QModel:
        for node in self._graph.nodes:
            match node.op:
                case "placeholder":
                    if self._tensor_of:
                        raise UnsupportedLayer("model: forward takes more than one input; one is supported")
                    self._tensor_of[node] = INPUT
                case "call_module" | "call_function" | "call_method":
                    self._tensor_of[node] = self._add(node)
                case "output":
                    if not isinstance(node.args[0], fx.Node) or node.args[0].op == "placeholder":
                        raise UnsupportedLayer("model: forward must return one tensor that it computed")
                case _:
                    raise UnsupportedLayer(f"model: {node.target} is read as a bare tensor; make it part of a layer")
        if not any(isinstance(layer, LINEAR_LAYERS) for layer in self._layers.values()):
            raise UnsupportedLayer("model: no Linear or Conv2d in it, so there is no weight to quantize")
        return QModel(self._input_shape, self._layers, self._nodes.values(), self._sites, self._notes)

    def _add(self, node: fx.Node) -> str:
        """Name of the tensor that stands for `node`'s result."""
        path, layer = self._read(node)
        source = self._tensor_of[node.args[0]]
        if layer is None:
            self._notes.append(f"{path} removed: it does nothing in evaluation")
            return source
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._fold(node, path, layer, source)
        name = self._name(node, layer)
        shape = node.meta["shape"]
        if isinstance(layer, LINEAR_LAYERS):
            if any(other is layer for other in self._layers.values()):
                raise UnsupportedLayer(f"model: layer {path!r} is used more than once; give each use its own layer")
            if isinstance(layer, nn.Linear) and len(shape) != 1:
                raise UnsupportedLayer(
                    f"model: layer {path!r} (Linear) reads more than (batch, features): flatten first"
                )
            source = self._quantized(source)
            self._sites.append(Site(name=weight_site(name), kind="weight", size=layer.weight.numel(), signed=True))
        return self._append(Node(name=name, source=source, path=path, shape=shape), layer)

    def _append(self, node: Node, layer: nn.Module) -> str:
        self._layers[node.name], self._nodes[node.name] = layer, node
        if isinstance(layer, Activation):
            size = int(np.prod(node.shape))
            self._sites.append(Site(name=node.name, kind="activation", size=size, signed=not layer.relu))
        return node.name

    def _read(self, node: fx.Node) -> tuple[str, nn.Module | None]:
        """The user's name of an operation, and the layer it becomes."""
        if node.op == "call_module":
            target = self._modules[node.target]
            path, kind, reader = node.target, type(target).__name__, _READERS.get(type(target))
            arguments: tuple[Any, ...] = (target,)
        else:
            path, kind = node.name, getattr(node.target, "__name__", node.target)
            reader, arguments = _READERS.get(node.target), node.args[1:]
        where = f"model: layer {path!r} ({kind})"
        if reader is None or not node.args or len(node.all_input_nodes) != 1:
            raise UnsupportedLayer(f"{where} is not supported; supported are {', '.join(supported())}")
        try:
            return path, reader(*arguments, **node.kwargs)
        except UnsupportedLayer as error:
            raise UnsupportedLayer(f"{where}: {error}") from error
        except TypeError as error:
            raise UnsupportedLayer(f"{where}: its arguments are not supported: {error}") from error

    def _name(self, node: fx.Node, layer: nn.Module) -> str:
        """A C identifier close to the user's name; a module that is called twice gives two of them."""
        raw = re.sub(r"\W", "_", str(node.target) if node.op == "call_module" else node.name).strip("_")
        kind = "relu" if isinstance(layer, Activation) else type(layer).__name__.lower()
        base = raw if raw[:1].isalpha() else f"{kind}_{raw}"
        name, n = base, 1
        while name in self._layers or name == INPUT:
            name, n = f"{base}_{n}", n + 1
        return name

    def _fold(self, node: fx.Node, path: str, norm: nn.BatchNorm1d | nn.BatchNorm2d, source: str) -> str:
        layer = self._layers.get(source)
        if not isinstance(layer, LINEAR_LAYERS) or len(node.args[0].users) > 1:
            raise UnsupportedLayer(
                f"model: layer {path!r} ({type(norm).__name__}) can only be folded into a Linear or Conv2d "
                "whose output nothing else reads; move it behind one"
            )
        if norm.running_mean is None:
            raise UnsupportedLayer(f"model: layer {path!r}: BatchNorm needs track_running_stats=True to be folded")
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        self._layers[source] = fuse(layer, norm)
        self._notes.append(f"{path} folded into {self._nodes[source].path}")
        return source

    def _quantized(self, name: str) -> str:
        """The tensor `name` in a learned format: itself if it has one, else behind a new quantizer."""
        origin = name
        while origin != INPUT and not isinstance(self._layers[origin], Activation):
            if isinstance(self._layers[origin], LINEAR_LAYERS):
                quantizer = f"{name}_quant"
                if quantizer in self._layers:
                    return quantizer
                node = self._nodes[name]
                new = Node(name=quantizer, source=name, path=f"after {node.path}", shape=node.shape)
                return self._append(new, Activation(relu=False))
            origin = self._nodes[origin].source
        return name


# --- freezing --------------------------------------------------------------------------------------------------------


def freeze(model: QModel) -> network.QNet:
    """The exact integer network of a model whose scheme is set.

    Channels-first becomes channels-last here, the order of flattened features included.

    Raises:
        InvalidInput: when no scheme is set, or a weight is NaN.
        UnsupportedLayer: when the output is a flattened image, whose order would differ from PyTorch's.
    """
    if not model.formats:
        raise InvalidInput("model: no scheme is set, so there is nothing to freeze; search first")
    formats = model.formats
    ops: list[network.Op] = [network.Input(name=INPUT, shape=_channels_last(model.input_shape), format=formats[INPUT])]
    shapes = {INPUT: model.input_shape}
    orders: dict[str, np.ndarray[Any, Any] | None] = {INPUT: None}  # of flattened features: where PyTorch keeps each
    for node, layer in zip(model.nodes, model.layers, strict=True):
        name, source = node.name, node.source
        shapes[name], orders[name] = node.shape, orders[source]
        match layer:
            case nn.Linear() | nn.Conv2d():
                ops.append(_freeze_linear(model, node, layer, orders[source]))
                orders[name] = None
            case Activation():
                ops.append(network.Quantize(name=name, source=source, format=formats[name]))
            case nn.MaxPool2d():
                ops.append(network.MaxPool2d(name=name, source=source, window=layer.kernel_size, stride=layer.stride))
            case nn.Flatten():
                ops.append(network.Flatten(name=name, source=source))
                if len(shapes[source]) == 3:
                    index = np.arange(np.prod(shapes[source])).reshape(shapes[source])
                    orders[name] = index.transpose(1, 2, 0).ravel()
            case _:
                raise AssertionError(f"instrument() made a layer that freeze() does not know: {layer}")
    if orders[model.nodes[-1].name] is not None:
        raise UnsupportedLayer("model: its output is a flattened image; end with a Linear, or do not flatten")
    return network.QNet(tuple(ops))


def _freeze_linear(
    model: QModel, node: Node, layer: nn.Linear | nn.Conv2d, order: np.ndarray[Any, Any] | None
) -> network.Linear:
    weight_format = model.formats[weight_site(node.name)]
    weight = weight_format.encode(_array(layer.weight))
    accumulator_frac = model.formats[_feeding_site(model, node)].frac + weight_format.frac
    bias = _round(_array(layer.bias), accumulator_frac)
    if isinstance(layer, nn.Linear):
        weight = weight.T if order is None else weight.T[order]
        return network.Dense(
            name=node.name,
            source=node.source,
            weight=np.ascontiguousarray(weight),
            weight_format=weight_format,
            bias=bias,
        )
    return network.Conv2d(
        name=node.name,
        source=node.source,
        weight=np.ascontiguousarray(weight.transpose(2, 3, 1, 0)),
        weight_format=weight_format,
        bias=bias,
        stride=layer.stride,
        padding=_padding(layer),
    )


def _padding(layer: nn.Conv2d) -> network.Padding:
    """Explicit padding; PyTorch's 'same' puts the odd one at the end."""
    if layer.padding == "valid":
        return ((0, 0), (0, 0))
    if layer.padding == "same":
        (top, left), (height, width) = ((k - 1) // 2 for k in layer.kernel_size), layer.kernel_size
        return ((top, height - 1 - top), (left, width - 1 - left))
    vertical, horizontal = layer.padding
    return ((vertical, vertical), (horizontal, horizontal))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().double().cpu().numpy()


def _round(values: np.ndarray[Any, Any], frac: int) -> Codes:
    """Codes on the grid of an accumulator, in the widest format: nothing saturates that a network may hold."""
    return Fixed(signed=True, width=MAX_WIDTH, frac=frac).encode(values)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:], shape[0])


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
