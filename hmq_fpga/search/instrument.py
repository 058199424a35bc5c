"""From the user's module to a `QModel`: what it is made of, what is folded, removed or refused."""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.search.graph import (
    INPUT,
    LINEAR_LAYERS,
    MOVING_LAYERS,
    Activation,
    Add,
    Affine,
    AvgPool,
    Concat,
    Final,
    Join,
    Node,
    Pad,
    QModel,
    Site,
    Upsample,
    joined,
    weight_site,
)

Shape = tuple[int, ...]


def instrument(model: nn.Module, input_shape: Shape, *, input_signed: bool = True) -> QModel:
    """Trace a float model and put a quantizer site at every tensor that becomes a type in hardware.

    BatchNorm is folded into the layer before or after it where that is exact, dropout and a final softmax are removed.
    Every weight, the input, every ReLU and every other value that a layer with weights, an addition or a concatenation
    reads gets a site; the output stays an exact accumulator. The given model is left as it is; parameters that several
    of its layers share become one copy each. What comes out computes what went in: both are run and compared.

    Args:
        model: any module that torch.fx can trace and whose operations are supported.
        input_shape: shape of one sample, channels first.
        input_signed: whether inputs can be negative.

    Raises:
        UnsupportedLayer: naming the module or function that is not supported, or where the model computes something
            else than the operations that were traced, as with hooks.
        InvalidInput: when the model cannot be copied or traced, holds NaN, or does not take `input_shape`.
    """
    try:
        model = copy.deepcopy(model).float().eval()
    except RuntimeError as error:  # of torch: such as the older weight_norm
        raise InvalidInput(f"model: {type(model).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    _untie(model)
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
    recorder = _Recorder(traced.double(), garbage_collect_values=False)
    x = torch.randn(_BATCH, *input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x if input_signed else x.abs()
    try:
        with torch.no_grad():
            recorder.run(x)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"model: does not accept an input of shape {input_shape}: {str(error).splitlines()[0]}"
        ) from error
    builder = _Builder(traced.float(), input_shape, input_signed)
    read = builder.build()
    if builder.is_exact:
        _compare(read, x, joined([recorder.env[node] for node in builder.returned]))
    return read


def _untie(model: nn.Module) -> None:
    """Give each layer its own copy of a parameter that it shares: in hardware it has one, scaled and rounded apart."""
    known: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in known:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            known.add(id(parameter))


@torch.no_grad()
def _compare(read: QModel, x: Tensor, expected: Tensor) -> None:
    """Raise `UnsupportedLayer` unless a model gives what is expected, but for roundings of float64."""
    found = joined(read.double()(x))
    read.float()
    scale = max(1.0, float(expected.abs().max()))
    if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * scale):
        raise UnsupportedLayer(
            f"model: computes something else than its layers do, by {float((found - expected).abs().max()):.3g}: "
            "take away hooks, and in-place functions whose input is read elsewhere"
        )


def supported() -> list[str]:
    """Names of the supported modules, functions and methods."""
    targets = {*_READERS, *_MERGES, *_FINAL}
    return sorted(
        {t.__name__ if isinstance(t, type) else f".{t}()" if isinstance(t, str) else f"{t.__name__}()" for t in targets}
    )


# --- how single operations are read ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shapes:
    """Shapes of one sample before and after an operation, channels first."""

    source: Shape
    result: Shape


_Reader = Callable[..., nn.Module | None]
_Registered = TypeVar("_Registered", bound=_Reader)
_READERS: dict[Any, _Reader] = {}
_MERGES: dict[Any, type[nn.Module]] = {
    operator.add: Add,
    operator.iadd: Add,
    torch.add: Add,
    "add": Add,
    "add_": Add,
    torch.cat: Concat,
    torch.concat: Concat,
}
_MERGED = ("input", "tensors", "other")  # names of their tensors
_FINAL = {
    *(nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.Tanh),
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.sigmoid, torch.tanh),
    *("softmax", "log_softmax", "sigmoid", "tanh"),
}
_RESHAPES = (
    nn.Flatten,
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    "flatten",
    "reshape",
    "view",
    "squeeze",
    "contiguous",
)
_BATCH = 2  # of the run that finds the shapes
_TOLERANCE = 1e-4  # of a model in float64, whose folded weights are float32


def _reads(*targets: Any) -> Callable[[_Registered], _Registered]:
    """Register how a module, a function's arguments or a method's become a layer; None: nothing to do in evaluation.

    Every reader also gets the shapes before and after the operation.
    """

    def register(reader: _Registered) -> _Registered:
        _READERS.update(dict.fromkeys(targets, reader))
        return reader

    return register


@_reads(nn.Linear)
def _read_linear(shapes: _Shapes, module: nn.Linear) -> nn.Module:
    if len(shapes.result) != 1:
        raise UnsupportedLayer("reads more than (batch, features): flatten first")
    return _with_bias(module, module.out_features)


@_reads(nn.Conv1d, nn.Conv2d)
def _read_conv(_shapes: _Shapes, module: nn.Conv1d | nn.Conv2d) -> nn.Module:
    depthwise = module.groups == module.in_channels == module.out_channels
    if not (module.groups == 1 or depthwise) or set(module.dilation) != {1} or module.padding_mode != "zeros":
        raise UnsupportedLayer(
            "a convolution is supported with groups=1, or groups=in_channels=out_channels, dilation=1 and zero padding"
        )
    if depthwise and module.groups > 1 and len(set(module.stride)) > 1:
        raise UnsupportedLayer(f"a depthwise convolution is supported with one stride, not {module.stride}")
    return _with_bias(module, module.out_channels)


def _with_bias(module: nn.Linear | nn.Conv1d | nn.Conv2d, outputs: int) -> nn.Module:
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_zeros(outputs))
    return module


@_reads(nn.BatchNorm1d, nn.BatchNorm2d)
def _read_batchnorm(_shapes: _Shapes, module: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    if module.running_mean is None:
        raise UnsupportedLayer("BatchNorm needs track_running_stats=True")
    if not module.affine:
        module.weight = nn.Parameter(torch.ones_like(module.running_mean))
        module.bias = nn.Parameter(torch.zeros_like(module.running_mean))
    return module


@_reads(nn.ReLU)
def _read_relu_module(_shapes: _Shapes, _module: nn.ReLU) -> nn.Module:
    return Activation(relu=True)


@_reads(F.relu, torch.relu, "relu", "relu_")
def _read_relu(_shapes: _Shapes, inplace: bool = False) -> nn.Module:  # noqa: ARG001
    return Activation(relu=True)


@_reads(nn.ReLU6)
def _read_relu6_module(_shapes: _Shapes, _module: nn.ReLU6) -> nn.Module:
    return _Clip(0.0, 6.0)


@_reads(F.relu6)
def _read_relu6(_shapes: _Shapes, inplace: bool = False) -> nn.Module:  # noqa: ARG001
    return _Clip(0.0, 6.0)


@_reads(nn.Hardtanh)
def _read_hardtanh_module(_shapes: _Shapes, module: nn.Hardtanh) -> nn.Module:
    return _Clip(module.min_val, module.max_val)


@_reads(F.hardtanh)
def _read_hardtanh(
    _shapes: _Shapes,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,  # noqa: ARG001
) -> nn.Module:
    return _Clip(min_val, max_val)


@_reads(torch.clamp, torch.clip, "clamp", "clip")
def _read_clamp(_shapes: _Shapes, *limits: float | None, **named: float | None) -> nn.Module:
    low, high = (named.get(name, limit) for name, limit in zip(("min", "max"), (*limits, None, None), strict=False))
    return Activation(relu=True) if (low, high) == (0, None) else _Clip(low, high)


class _Clip(nn.Module):
    """Clips to 0 … high or -high … high; the builder makes an `Activation` of it."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        if not (isinstance(high, int | float) and high > 0 and low in (0, -high)):
            raise UnsupportedLayer("a clip is supported from 0 or -c to a positive c, or from 0 alone")
        self.relu, self.high = low == 0, float(high)


@_reads(nn.LeakyReLU)
def _read_leaky_module(_shapes: _Shapes, module: nn.LeakyReLU) -> nn.Module:
    return _read_leaky(_shapes, module.negative_slope)


@_reads(F.leaky_relu)
def _read_leaky(_shapes: _Shapes, negative_slope: float = 0.01, inplace: bool = False) -> nn.Module:  # noqa: ARG001
    mantissa, exponent = math.frexp(negative_slope)
    if mantissa != 0.5 or not -15 <= exponent <= 1:
        raise UnsupportedLayer(f"its slope is {negative_slope:g}: take a power of two such as 0.125 or 0.015625")
    return nn.LeakyReLU(negative_slope)


@_reads(nn.MaxPool1d, nn.MaxPool2d)
def _read_max_pool_module(shapes: _Shapes, module: nn.MaxPool1d | nn.MaxPool2d) -> nn.Module:
    return _read_max_pool(
        shapes,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
        module.return_indices,
    )


@_reads(F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d)
def _read_max_pool(
    shapes: _Shapes,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    dims = len(shapes.source) - 1
    if set(_each(padding, dims)) != {0} or set(_each(dilation, dims)) != {1} or ceil_mode or return_indices:
        raise UnsupportedLayer("max pooling is supported with padding=0, dilation=1, ceil_mode=False")
    pool = nn.MaxPool1d if dims == 1 else nn.MaxPool2d
    return pool(_each(kernel_size, dims), _each(stride or kernel_size, dims))


@_reads(nn.AvgPool1d, nn.AvgPool2d)
def _read_avg_pool_module(shapes: _Shapes, module: nn.AvgPool1d | nn.AvgPool2d) -> nn.Module:
    divisor = getattr(module, "divisor_override", None)
    return _read_avg_pool(shapes, module.kernel_size, module.stride, module.padding, module.ceil_mode, True, divisor)


@_reads(F.avg_pool1d, F.avg_pool2d)
def _read_avg_pool(
    shapes: _Shapes,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,  # noqa: ARG001
    divisor_override: int | None = None,
) -> nn.Module:
    dims = len(shapes.source) - 1
    if set(_each(padding, dims)) != {0} or ceil_mode or divisor_override:
        raise UnsupportedLayer("average pooling is supported with padding=0, ceil_mode=False and the usual divisor")
    return AvgPool(_each(kernel_size, dims), _each(stride or kernel_size, dims))


@_reads(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
def _read_adaptive_module(shapes: _Shapes, _module: nn.Module) -> nn.Module:
    return _adaptive(shapes, AvgPool)


@_reads(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)
def _read_adaptive(shapes: _Shapes, output_size: Any) -> nn.Module:  # noqa: ARG001
    return _adaptive(shapes, AvgPool)


@_reads(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
def _read_adaptive_max_module(shapes: _Shapes, module: nn.Module) -> nn.Module:
    if getattr(module, "return_indices", False):
        raise UnsupportedLayer("max pooling is supported with return_indices=False")
    return _adaptive(shapes, nn.MaxPool1d if len(shapes.source) == 2 else nn.MaxPool2d)


def _adaptive(shapes: _Shapes, pool: Callable[..., nn.Module]) -> nn.Module:
    before, after = shapes.source[1:], shapes.result[1:]
    if any(n % m for n, m in zip(before, after, strict=True)):
        raise UnsupportedLayer(f"adaptive pooling of {before} to {after} has windows of unequal size")
    window = tuple(n // m for n, m in zip(before, after, strict=True))
    return pool(window, window)


@_reads(torch.mean, "mean")
def _read_mean(shapes: _Shapes, dim: Any = None, keepdim: bool = False) -> nn.Module:  # noqa: ARG001
    dims = len(shapes.source) - 1
    wanted = {d % (dims + 2) for d in ((dim,) if isinstance(dim, int) else dim or ())}
    if not dims or wanted != set(range(2, dims + 2)):
        raise UnsupportedLayer("a mean is supported over all dimensions but batch and channels")
    window = shapes.source[1:]
    return AvgPool(window, window)


@_reads(nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d)
def _read_pad_module(shapes: _Shapes, module: Any) -> nn.Module:
    return _read_pad(shapes, module.padding, "constant", module.value)


@_reads(F.pad)
def _read_pad(shapes: _Shapes, pad: Any, mode: str = "constant", value: float | None = None) -> nn.Module:
    dims = len(shapes.source) - 1
    if mode != "constant" or value or len(pad) != 2 * dims or min(pad) < 0:
        raise UnsupportedLayer("padding is supported with zeros, around every channel")
    return Pad(tuple((pad[i], pad[i + 1]) for i in range(0, 2 * dims, 2))[::-1])


@_reads(nn.Upsample, nn.UpsamplingNearest2d)
def _read_upsample_module(shapes: _Shapes, module: nn.Upsample) -> nn.Module:
    return _read_upsample(shapes, mode=module.mode)


@_reads(F.interpolate)
def _read_upsample(
    shapes: _Shapes,
    size: Any = None,  # noqa: ARG001
    scale_factor: Any = None,  # noqa: ARG001
    mode: str = "nearest",
    **_settings: Any,
) -> nn.Module:
    before, after = shapes.source[1:], shapes.result[1:]
    if mode != "nearest" or any(m % n for n, m in zip(before, after, strict=True)):
        raise UnsupportedLayer("upsampling is supported with mode='nearest' and a whole factor")
    return Upsample(tuple(m // n for n, m in zip(before, after, strict=True)))


@_reads(*_RESHAPES)
def _read_reshape(shapes: _Shapes, *_module_or_arguments: Any, **_settings: Any) -> nn.Module | None:
    if shapes.result == shapes.source:
        return None
    if len(shapes.result) != 1:
        raise UnsupportedLayer(f"cannot turn {shapes.source} into {shapes.result}: only flattening is supported")
    return nn.Flatten()


@_reads(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
def _read_nothing_module(_shapes: _Shapes, _module: nn.Module) -> None:
    return None


@_reads(F.dropout, F.dropout1d, F.dropout2d)
def _read_nothing(_shapes: _Shapes, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:  # noqa: ARG001
    if training:
        raise UnsupportedLayer("acts in evaluation too; give it training=self.training")


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


# --- the walk through the traced graph -------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs the traced graph, noting the shape of every tensor for one sample, and the value of what is no tensor."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            node.meta["shape"], node.meta["batch"] = tuple(result.shape[1:]), result.shape[:1]
        else:
            node.meta["value"] = result
        return result


class _Builder:
    """Walks the traced graph once and collects the parts of a `QModel`."""

    def __init__(self, traced: fx.GraphModule, input_shape: Shape, input_signed: bool) -> None:
        self._modules = dict(traced.named_modules())
        self._graph = traced.graph
        self._graph.eliminate_dead_code()
        self._input_shape = input_shape
        self._layers: dict[str, nn.Module] = {}
        self._nodes: dict[str, Node] = {}
        self._sites = [Site(name=INPUT, kind="input", size=math.prod(input_shape), signed=input_signed)]
        self._notes: list[str] = []
        self._tensor_of: dict[fx.Node, str] = {}
        self._clips: dict[str, float] = {}
        self._final_of: dict[fx.Node, Final] = {}
        self._finals: list[Final | None] = []
        self.returned: list[fx.Node] = []  # what the outputs were in the traced graph
        self.is_exact = True

    def build(self) -> QModel:
        for node in self._graph.nodes:
            match node.op:
                case "placeholder":
                    if self._tensor_of:
                        raise UnsupportedLayer("model: forward takes more than one input; one is supported")
                    self._tensor_of[node] = INPUT
                case "call_module" | "call_function" | "call_method":
                    if "shape" in node.meta:  # others compute sizes
                        self._tensor_of[node] = self._add(node)
                case "output":
                    self._return(node.args[0])
                case _:
                    raise UnsupportedLayer(f"model: {node.target} is read as a bare tensor; make it part of a layer")
        if not any(isinstance(layer, LINEAR_LAYERS) for layer in self._layers.values()):
            raise UnsupportedLayer("model: no Linear and no convolution in it, so there is no weight to quantize")
        for name, high in self._clips.items():
            self._settle_clip(name, high)
        for name, layer in self._layers.items():
            if isinstance(layer, AvgPool) and layer.values != layer.divisor:
                self._settle_mean(name, layer)
        return QModel(self._input_shape, self._layers, self._nodes.values(), self._sites, self._notes, self._finals)

    def _return(self, result: Any) -> None:
        """End with the tensor that `forward` returns, or with several in a row."""
        returned = list(result) if isinstance(result, tuple | list) else [result]
        outputs = [self._tensor_of.get(node, INPUT) if isinstance(node, fx.Node) else INPUT for node in returned]
        if not outputs or INPUT in outputs:
            raise UnsupportedLayer("model: forward must return a tensor that it computed, or a tuple of such")
        if len(set(outputs)) < len(outputs):
            raise UnsupportedLayer(f"model: returns {self._nodes[outputs[-1]].path!r} more than once; return it once")
        self._finals = [self._final_of.get(node) for node in returned]
        self.returned = [node.all_input_nodes[0] if self._kind(node) in _FINAL else node for node in returned]
        read = {source for node in self._nodes.values() for source in node.sources}
        if inside := read.intersection(outputs):
            path = self._nodes[inside.pop()].path
            raise UnsupportedLayer(f"model: its output {path!r} is also read inside; return tensors that nothing reads")
        if len(outputs) > 1:
            size = sum(math.prod(self._nodes[name].shape) for name in outputs)
            name = self._free("outputs")
            self._place(Node(name=name, sources=tuple(outputs), path="outputs", shape=(size,)), Join())
            self._notes.append(f"{len(outputs)} outputs, each with a port of its own: {', '.join(outputs)}")

    # operations

    def _add(self, node: fx.Node) -> str:
        """Name of the tensor that stands for `node`'s result."""
        path, kind = self._described(node)
        where = f"model: layer {path!r} ({kind})"
        sources = [self._tensor_of[n] for n in node.all_input_nodes if "shape" in n.meta]
        if node.meta["batch"] != (_BATCH,):
            raise UnsupportedLayer(f"{where}: its result does not keep the batch as its first dimension")
        target = self._kind(node)
        if target in _FINAL:
            return self._remove_final(node, where, path, *sources)
        if target in _MERGES:
            return self._merge(node, where, _MERGES[target], sources)
        if target in _RESHAPES and node.users and all(self._kind(user) in _RESHAPES for user in node.users):
            return sources[0]  # the order stays: the last of them says all
        try:
            layer = self._read(node, target)
        except UnsupportedLayer as error:
            raise UnsupportedLayer(f"{where}: {error}") from error
        except TypeError as error:
            raise UnsupportedLayer(f"{where}: its arguments are not supported: {error}") from error
        (source,) = sources
        if layer is None:
            self._notes.append(f"{path} removed: it does nothing in evaluation")
            return source
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._normalize(node, path, layer, source)
        if isinstance(layer, AvgPool) and len(node.meta["shape"]) == 1:  # a mean that drops its dimensions
            channels, *spatial = node.all_input_nodes[0].meta["shape"]
            source = self._append(node, path, layer, source, shape=(channels, *(1 for _ in spatial)))
            layer = nn.Flatten()
        return self._append(node, path, layer, source)

    def _shape(self, tensor: str) -> Shape:
        return self._input_shape if tensor == INPUT else self._nodes[tensor].shape

    def _kind(self, node: fx.Node) -> Any:
        """What `_READERS` and the like know an operation by."""
        return type(self._modules[node.target]) if node.op == "call_module" else node.target

    def _described(self, node: fx.Node) -> tuple[str, str]:
        """The user's name of an operation, and its type's or function's; a function's is its module's and its own."""
        if node.op == "call_module":
            return str(node.target), type(self._modules[node.target]).__name__
        module = next(reversed(node.meta.get("nn_module_stack", {})), "")
        return f"{module}.{node.name}" if module else node.name, getattr(node.target, "__name__", str(node.target))

    def _read(self, node: fx.Node, target: Any) -> nn.Module | None:
        tensors = [n for n in node.all_input_nodes if "shape" in n.meta]
        reader = _READERS.get(target)
        if reader is None or len(tensors) != 1 or node.args[:1] != (tensors[0],):
            raise UnsupportedLayer(f"is not supported; supported are {', '.join(supported())}")
        shapes = _Shapes(self._shape(self._tensor_of[tensors[0]]), node.meta["shape"])
        if node.op == "call_module":
            return reader(shapes, self._modules[node.target])
        arguments, named = fx.map_arg((node.args[1:], node.kwargs), lambda size: size.meta["value"])
        return reader(shapes, *arguments, **named)

    def _append(self, node: fx.Node, path: str, layer: nn.Module, source: str, shape: Shape | None = None) -> str:
        shape = shape or node.meta["shape"]
        name = self._name(node, layer)
        if isinstance(layer, LINEAR_LAYERS):
            if any(other is layer for other in self._layers.values()):
                raise UnsupportedLayer(f"model: layer {path!r} is used more than once; give each use its own layer")
            source = self._quantized(source)
            self._sites.append(Site(name=weight_site(name), kind="weight", size=layer.weight.numel(), signed=True))
        if isinstance(layer, _Clip):
            self._clips[name] = layer.high
            layer = Activation(relu=layer.relu, limit_log2=math.ceil(math.log2(layer.high)))
        return self._place(Node(name=name, sources=(source,), path=path, shape=shape), layer)

    def _place(self, node: Node, layer: nn.Module) -> str:
        """Name of the tensor that stands for the layer's result."""
        if isinstance(layer, Activation):
            size = math.prod(node.shape)
            self._sites.append(Site(name=node.name, kind="activation", size=size, signed=not layer.relu))
            (source,) = node.sources
            flat = isinstance(self._layers.get(source), nn.Flatten)
            if flat and (self._is_read_once(source) or self._is_read_by_linears(source)):
                return self._place_before_flatten(node, layer, source)
        self._layers[node.name], self._nodes[node.name] = layer, node
        return node.name

    def _place_before_flatten(self, node: Node, layer: nn.Module, flat: str) -> str:
        """The same function; hls4ml's streams cannot round what was flattened."""
        flatten, module = self._nodes.pop(flat), self._layers.pop(flat)
        (image,) = flatten.sources
        self._layers[node.name] = layer
        self._nodes[node.name] = replace(node, sources=(image,), shape=self._shape(image))
        self._layers[flat], self._nodes[flat] = module, replace(flatten, sources=(node.name,))
        return flat

    def _is_read_once(self, tensor: str) -> bool:
        return all(len(node.users) == 1 for node, made in self._tensor_of.items() if made == tensor)

    def _is_read_by_linears(self, tensor: str) -> bool:
        users = {user for node, made in self._tensor_of.items() if made == tensor for user in node.users}
        return all(
            user.op == "call_module" and isinstance(self._modules[user.target], nn.Linear)
            for user in users
            if self._tensor_of.get(user) != tensor
        )

    def _merge(self, node: fx.Node, where: str, kind: type[nn.Module], sources: list[str]) -> str:
        given: list[Any] = [*node.args, *(node.kwargs[name] for name in _MERGED if name in node.kwargs)]
        if kind is Concat and isinstance(given[0], tuple | list):
            given = list(given[0])
        shapes: list[Any] = [n.meta.get("shape") for n in given if isinstance(n, fx.Node)]
        if len(sources) != 2 or len(given) < 2 or len(shapes) != 2 or None in shapes:
            raise UnsupportedLayer(f"{where}: merges {len(sources)} tensors: merge two different ones at a time")
        if kind is Add and (shapes[0] != shapes[1] or node.kwargs.keys() - set(_MERGED) or len(given) != 2):
            raise UnsupportedLayer(
                f"{where}: adds {shapes[0]} and {shapes[1]}; equal shapes are supported, without alpha"
            )
        if kind is Concat:
            dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            if dim % (len(shapes[0]) + 1) != 1:
                raise UnsupportedLayer(f"{where}: concatenation is supported along the channels, dim=1")
        layer = kind()
        sources = [self._quantized(source) for source in sources]
        name = self._name(node, layer)
        path, _ = self._described(node)
        return self._place(Node(name=name, sources=tuple(sources), path=path, shape=node.meta["shape"]), layer)

    def _remove_final(self, node: fx.Node, where: str, path: str, source: str) -> str:
        if any(user.op != "output" for user in node.users):
            raise UnsupportedLayer(f"{where}: is supported at the very end only, where it is removed; use ReLU here")
        self._notes.append(f"{path} removed: the hardware gives the values before it")
        self._final_of[node] = Final(name=self._described(node)[1], function=self._call(node), shape=node.meta["shape"])
        return source

    def _call(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """What a node with one tensor computes."""
        if node.op == "call_module":
            return self._modules[node.target]
        arguments, named = node.args[1:], node.kwargs
        if node.op == "call_method":
            return lambda x: getattr(x, node.target)(*arguments, **named)
        return lambda x: node.target(x, *arguments, **named)

    def _name(self, node: fx.Node, layer: nn.Module) -> str:
        """A C identifier close to the user's name; a module that is called twice gives two of them."""
        raw = re.sub(r"\W", "_", self._described(node)[0]).strip("_")
        kind = "relu" if isinstance(layer, Activation | _Clip) else type(layer).__name__.lower()
        return self._free(raw if raw[:1].isalpha() else f"{kind}_{raw}")

    def _free(self, base: str) -> str:
        """A name that no tensor has yet."""
        name, n = base, 1
        while name in self._layers or name == INPUT:
            name, n = f"{base}_{n}", n + 1
        return name

    def _quantized(self, name: str) -> str:
        """The tensor `name` in a learned format: itself if it has one, else behind a new quantizer."""
        origin = name
        while origin != INPUT and isinstance(self._layers[origin], MOVING_LAYERS):
            (origin,) = self._nodes[origin].sources
        if origin == INPUT or isinstance(self._layers[origin], Activation):
            return name
        quantizer = f"{name}_quant"
        if quantizer in self._layers:
            return quantizer
        node = self._nodes[name]
        new = Node(name=quantizer, sources=(name,), path=f"after {node.path}", shape=node.shape)
        return self._place(new, Activation(relu=False))

    # BatchNorm

    def _normalize(self, node: fx.Node, path: str, norm: nn.BatchNorm1d | nn.BatchNorm2d, source: str) -> str:
        """Fold a BatchNorm into the layer before, else into the one after, else make it a layer."""
        before = self._layers.get(source)
        if isinstance(before, nn.Linear | nn.Conv1d | nn.Conv2d) and self._is_read_once(source):
            self._layers[source] = _with_norm(before, norm)
            self._notes.append(f"{path} folded into {self._nodes[source].path}")
            return source
        scale, shift = _scale_and_shift(norm)
        if target := self._layer_after(node):
            _fold_into_next(self._modules[target], scale, shift)
            self._notes.append(f"{path} folded into {target}")
            return source
        self._notes.append(f"{path} kept as a scale and a shift per channel: no neighbouring layer can take it")
        return self._append(node, path, Affine(scale, shift), source)

    def _layer_after(self, node: fx.Node) -> str | None:
        """Name of the one module that reads `node`, if it takes a scale and a shift of its input exactly."""
        while len(node.users) == 1:
            (node,) = node.users
            module = self._modules.get(node.target) if node.op == "call_module" else None
            if isinstance(module, nn.Linear) or (
                isinstance(module, nn.Conv1d | nn.Conv2d) and _is_valid_convolution(module)
            ):
                once = [n for n in self._graph.nodes if n.target == node.target and n.op == "call_module"]
                return str(node.target) if len(once) == 1 else None
            if not isinstance(module, nn.Flatten | nn.Dropout | nn.Identity):
                return None
        return None

    # clips and means whose factor is no power of two: neighbouring layers take the rest

    def _settle_clip(self, name: str, high: float) -> None:
        clip, path = self._layers[name], self._nodes[name].path
        if not isinstance(clip, Activation) or clip.limit_log2 is None:
            raise AssertionError(f"{path}: no clip to settle")
        limit = 2.0**clip.limit_log2
        if limit == high:
            return
        makers, takers = self._makers(self._nodes[name].sources[0]), self._takers(name)
        if makers is None or takers is None:
            self._notes.append(f"{path} clips at {limit:g} instead of {high:g}")
            self.is_exact = False
            return
        _multiply(makers, limit / high, biases=True)
        _multiply(takers, high / limit, biases=False)
        self._notes.append(f"{path} clips at {limit:g} instead of {high:g}: the weights before and after are scaled")

    def _settle_mean(self, name: str, layer: AvgPool) -> None:
        rest = layer.divisor / layer.values
        path = self._nodes[name].path
        takers, makers = self._takers(name), self._makers(self._nodes[name].sources[0])
        if takers is not None:
            _multiply(takers, rest, biases=False)
        elif makers is not None:
            _multiply(makers, rest, biases=True)
        else:
            raise UnsupportedLayer(
                f"model: layer {path!r}: a mean over {layer.values} values, no power of two, and no layer before or "
                "after it that could take the rest of the divisor; pool a power of two of values"
            )
        self._notes.append(f"{path} divides by {layer.divisor} instead of {layer.values}: nearby weights take the rest")

    def _takers(self, name: str) -> list[nn.Module] | None:
        """The layers with weights that read `name` in the end, if nothing else does."""
        found: list[nn.Module] = []
        readers = [node for node in self._nodes.values() if name in node.sources]
        if not readers:
            return None
        for node in readers:
            layer = self._layers[node.name]
            if isinstance(layer, LINEAR_LAYERS):
                found.append(layer)
                continue
            further = self._takers(node.name) if _is_homogeneous(layer) else None
            if further is None:
                return None
            found += further
        return found

    def _makers(self, name: str) -> list[nn.Module] | None:
        """The layer with weights that makes `name` in the end, if `name` is all that it is read for."""
        if name == INPUT or sum(name in node.sources for node in self._nodes.values()) > 1:
            return None
        layer = self._layers[name]
        if isinstance(layer, LINEAR_LAYERS):
            return [layer]
        return self._makers(self._nodes[name].sources[0]) if _is_homogeneous(layer) else None


def _is_homogeneous(layer: nn.Module) -> bool:
    """Whether a positive factor passes through a layer, as long as its quantizer's threshold follows."""
    if isinstance(layer, Activation):
        return layer.limit_log2 is None
    return isinstance(layer, (*MOVING_LAYERS, nn.LeakyReLU, AvgPool))


def _with_norm(layer: nn.Linear | nn.Conv1d | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    return fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)


@torch.no_grad()
def _multiply(layers: list[nn.Module], factor: float, *, biases: bool) -> None:
    for layer in layers:
        parameters = dict(layer.named_parameters(recurse=False))
        parameters["weight"].mul_(factor)
        if biases:
            parameters["bias"].mul_(factor)


def _is_valid_convolution(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Without padding, at whose zeros a shift would be missing."""
    return module.padding == "valid" or (module.padding != "same" and not any(module.padding))


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies each channel by in evaluation, and what it adds."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight.detach()
    return scale, norm.bias.detach() - norm.running_mean * scale


@torch.no_grad()
def _fold_into_next(module: nn.Linear | nn.Conv1d | nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let a layer that reads `x` compute what it computed of `x * scale + shift`."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        values = module.in_features // len(scale)  # per channel, when a flattened image is read
        scale, shift = scale.repeat_interleave(values), shift.repeat_interleave(values)
        added, factors = weight @ shift, scale
    elif module.groups == 1:
        added = weight.flatten(2).sum(2) @ shift
        factors = scale.view(1, -1, *(1,) * (weight.ndim - 2))
    else:
        added = weight.flatten(1).sum(1) * shift
        factors = scale.view(-1, *(1,) * (weight.ndim - 1))
    module.bias = nn.Parameter(added if module.bias is None else module.bias + added)
    weight.mul_(factors)
