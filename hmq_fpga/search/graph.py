"""A float model with a quantizer at every tensor that hardware will see."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmq_fpga.ir.cost import Holds, Step, moments
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import joined_shape
from hmq_fpga.ir.scheme import Kind, Scheme
from hmq_fpga.search.layers import (
    FORMATTED_LAYERS,
    LINEAR_LAYERS,
    MOVING_LAYERS,
    Activation,
    Affine,
    AvgPool,
    Below,
    Bilinear,
    Function,
    Join,
    Move,
    Multiply,
    joined,
    parted,
)
from hmq_fpga.search.quantizers import (
    AnyGrid,
    Grid,
    GridOfEach,
    fake_quantize,
    fake_quantize_all,
    grid_of,
    quantized_linear,
    recomputed,
)

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
        sources: the tensors that it reads.
        path: what the user's model calls it.
        shape: of the tensor for one sample, channels first.
    """

    name: str
    sources: tuple[str, ...]
    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Final:
    """A function at the very end of the user's model, which hardware leaves out.

    Attributes:
        name: of the function, such as `Tanh`.
        function: of a batch of outputs, `(batch, *shape)`, channels first.
    """

    name: str
    function: Callable[[Tensor], Tensor]


class Statistics(NamedTuple):
    """Of a tensor over the training set, as the user's BatchNorm stored them.

    Attributes:
        mean, deviation: `(channels,)`.
        axis: the dimension of a sample along which the channels stand.
    """

    mean: Tensor
    deviation: Tensor
    axis: int = 0

    def scaled(self, scale: Tensor | float, shift: Tensor | float = 0.0) -> Statistics:
        """Those of `x * scale + shift`, where these are of `x`."""
        return self._replace(mean=self.mean * scale + shift, deviation=self.deviation * torch.as_tensor(scale).abs())

    def of(self, x: Tensor) -> Statistics:
        """The same figures of a batch `(batch, *shape)`."""
        channels = x.movedim(self.axis + 1, 0).flatten(1)
        return self._replace(mean=channels.mean(1), deviation=channels.std(1, correction=0))


def weight_sites_of(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Site of the weight of each layer that has one: layers of one parameter have one, named after the first of them.

    Args:
        layers: by name, in execution order.
    """
    sites: dict[Tensor, str] = {}  # a parameter is known by what it is, not by its values
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, LINEAR_LAYERS)}
    return {name: sites.setdefault(layer.weight, f"{name}.weight") for name, layer in linear.items()}


def _tensor(parameter: Tensor | None) -> Tensor:
    """A parameter that `instrument` made sure is there."""
    if parameter is None:
        raise AssertionError("every linear layer has a bias")
    return parameter


def _bias(layer: str) -> str:
    return f"{layer}.bias"


def _channels_last(x: Tensor) -> Tensor:
    """Images with the channels of a pixel side by side in memory, the order in which a CPU convolves them fastest.

    All operations keep it. A single channel must be told by its strides.
    """
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x) if x.is_cpu and x.dim() == 4 else x


def _linear(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    match layer:
        case nn.Linear():
            return F.linear(x, weight, bias)
        case Affine():
            along = x.shape[1:] if layer.axis is None else (-1, *(1,) * (x.ndim - 2 - layer.axis))
            return x * weight.view(along) + bias.view(along)
        case nn.ConvTranspose1d() | nn.ConvTranspose2d():
            convolve = F.conv_transpose1d if isinstance(layer, nn.ConvTranspose1d) else F.conv_transpose2d
            windows = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
            return convolve(x, weight, bias, *windows)  # type: ignore[arg-type]
        case _:
            convolved: Tensor = layer._conv_forward(x, weight, bias)  # type: ignore[operator]
            return convolved


def below_format(read: Fixed) -> Fixed:
    """Format of what `Below` makes of values of a format: without a sign it has room for their largest distance."""
    return replace(read, signed=False)


class _Replaced(torch.autograd.Function):
    """Values in place of a tensor's, which gets their gradient."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor, _tensor: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class QModel(nn.Module):
    """A float model in which every tensor that becomes a type in hardware has a `Site`.

    The forward pass runs on floats until a scheme is set, then on values of the scheme's formats with straight-through
    gradients: weights, input and activations rounded and saturated, biases rounded to their accumulator's grid.

    Attributes:
        inputs: shape of one sample of each input by name, channels first.
        sites: the tensors to quantize, in network order.
        nodes: the layers, in execution order.
        notes: what instrumentation folded, removed or replaced, one sentence each.
        finals: for each output, the function of the user's model that hardware leaves out; None where there is none.
        statistics: what the user's BatchNorms knew of tensors, by name; folding moved them along with the values.
        weight_sites: site of the weight of each layer that has one, by the layer's name.
        multiplied: the tensor that each of these weights multiplies, likewise.
    """

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        layers: Mapping[str, nn.Module],
        nodes: Iterable[Node],
        sites: Iterable[Site],
        notes: Iterable[str],
        finals: Iterable[Final | None] = (),
        statistics: Mapping[str, Statistics] | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.statistics = dict(inputs), dict(statistics or {})
        self.nodes, self.sites, self.notes = tuple(nodes), tuple(sites), tuple(notes)
        self.finals = tuple(finals)
        self.layers = nn.ModuleList(layers[node.name] for node in self.nodes)
        self.weight_sites = weight_sites_of(dict(zip((node.name for node in self.nodes), self.layers, strict=True)))
        self.multiplied = {node.name: node.sources[0] for node in self.nodes if node.name in self.weight_sites}
        self._linears = [
            (self.weight_sites[node.name], _bias(node.name), layer)
            for node, layer in zip(self.nodes, self.layers, strict=True)
            if isinstance(layer, LINEAR_LAYERS)
        ]
        readers = {source: i for i, node in enumerate(self.nodes) for source in node.sources}
        self._last_reads = [[name for name, last in readers.items() if last == i] for i in range(len(self.nodes))]
        layers_of_nodes = zip(self.nodes, self.layers, strict=True)
        self._moved = {node.name: node.sources[0] for node, x in layers_of_nodes if isinstance(x, MOVING_LAYERS)}
        self._below = {
            node.name: node.sources[0] for node, x in zip(self.nodes, self.layers, strict=True) if isinstance(x, Below)
        }
        self._dense = self._of_dense_layers()
        self._scheme = Scheme(())
        self._formats: dict[str, Fixed] = {}
        self._grids: dict[str, Grid | GridOfEach] = {}
        self._steps: dict[str, float] = {}
        self._tables: dict[str, Tensor] = {}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample, channels first; several inputs stand in a row, see `layers.joined`."""
        return joined_shape(list(self.inputs.values()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the tensors that the model puts out."""
        last = self.nodes[-1]
        return last.sources if isinstance(self.layers[-1], Join) else (last.name,)

    def bypassed(self, weight: str) -> bool:
        """Whether all outputs depend on inputs even where the layers of a weight, a site, pass nothing on."""
        reached = set(self.inputs)
        for node in self.nodes:
            if self.weight_sites.get(node.name) != weight and not reached.isdisjoint(node.sources):
                reached.add(node.name)
        return reached.issuperset(self.outputs)

    def _of_dense_layers(self) -> set[str]:
        """Weights and biases of dense layers, and what has a format and is read by one dense layer alone."""
        layers = zip(self.nodes, self.layers, strict=True)
        uses = Counter(self.weight_sites.values())
        dense = [
            node
            for node, layer in layers
            if isinstance(layer, nn.Linear) and len(node.shape) == 1 and uses[self.weight_sites[node.name]] == 1
        ]
        made = {node.name for node, layer in zip(self.nodes, self.layers, strict=True) if isinstance(layer, Activation)}
        reads = Counter(source for node in self.nodes for source in node.sources)
        formatted = {*self.inputs, *made}
        lone = {source for node in dense for source in node.sources if source in formatted and reads[source] == 1}
        return lone.union(*((self.weight_sites[node.name], _bias(node.name)) for node in dense))

    @property
    def scheme(self) -> Scheme:
        """That was set last; empty for a float model."""
        return self._scheme

    @property
    def formats(self) -> Mapping[str, Fixed]:
        """Formats by site name; empty for a float model."""
        return self._formats

    @property
    def steps(self) -> Mapping[str, float]:
        """The power of two of which every value of a tensor is a multiple, by tensor; empty for a float model."""
        return self._steps

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights by site name, in network order."""
        return {name: _tensor(layer.weight) for name, _, layer in self._linears}

    @property
    def _parameters_by_site(self) -> dict[str, Tensor]:
        return self.weights | {name: _tensor(layer.bias) for _, name, layer in self._linears}

    @cached_property
    def moments(self) -> list[dict[str, int]]:
        """How many values are held in the formats of which sites, whenever one was made: see `cost.moments`."""
        steps = [Step(name=n, sources=(), size=math.prod(s), holds="format") for n, s in self.inputs.items()]
        for node, layer in zip(self.nodes, self.layers, strict=True):
            made, moved = isinstance(layer, FORMATTED_LAYERS), isinstance(layer, (*MOVING_LAYERS, Below))
            holds: Holds = "format" if made else "source" if moved else "nothing"
            steps.append(Step(name=node.name, sources=node.sources, size=math.prod(node.shape), holds=holds))
        return moments(steps)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one sample of each output, channels first; where there are several, a `Join` is last."""
        shapes = {node.name: node.shape for node in self.nodes}
        return tuple(shapes[name] for name in self.outputs)

    def finish(self, output: Tensor) -> Tensor:
        """What the user's model returns, from what this one does: its final functions applied to `(batch, …)`."""
        if not any(self.finals):
            return output
        if len(self.finals) == 1:
            return self.finals[0].function(output) if self.finals[0] else output
        parts = parted(output, self.output_shapes)
        return joined([final.function(x) if final else x for final, x in zip(self.finals, parts, strict=True)])

    def set_scheme(self, scheme: Scheme) -> None:
        """Freeze the formats of all sites, and the widths of single weights where the scheme has such.

        Raises:
            InvalidInput: when the scheme does not name exactly the sites of this model, its widths are not as many as
                a weight has elements, or a threshold exceeds the limit at which an activation clips.
        """
        names = [site.name for site in self.sites]
        if sorted(scheme) != sorted(names):
            differing = sorted(set(names) ^ set(scheme))
            raise InvalidInput(f"scheme and model differ in the tensors {differing}")
        formats = {name: scheme[name].format for name in names}
        for node, layer in zip(self.nodes, self.layers, strict=True):
            limit = layer.limit_log2 if isinstance(layer, Activation) else None
            if limit is not None and Grid.of(formats[node.name]).hi > 2.0**limit:
                raise InvalidInput(f"tensor {node.name!r} is clipped at 2**{limit}: its threshold must not exceed that")
        weights, widths = self.weights, scheme.widths
        for name, given in widths.items():
            if name not in weights or given.size != weights[name].numel():
                raise InvalidInput(f"tensor {name!r}: the scheme has widths of {given.size} weights, not the model's")
        self._scheme, self._formats = scheme, formats
        self._grids = {name: Grid.of(f) for name, f in formats.items()}
        self._grids |= {name: grid_of(formats[name], own, weights[name]) for name, own in widths.items()}
        self._steps = {name: formats[name].step for name in self.inputs}
        self._tables = {}
        for node, layer in zip(self.nodes, self.layers, strict=True):
            self._steps[node.name] = self._step(node, layer)
            if isinstance(layer, Function):
                self._tables[node.name] = self._table(node, layer)
            if isinstance(layer, LINEAR_LAYERS):
                self._grids[_bias(node.name)] = Grid.unbounded(self._steps[node.name])

    def _apply(self, fn: Any, recurse: bool = True) -> QModel:
        """Move what is no parameter as well: another device or type is given to all by `fn`."""
        moved = {name: GridOfEach(*map(fn, g)) if isinstance(g, GridOfEach) else g for name, g in self._grids.items()}
        self._grids = moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def origin(self, tensor: str) -> str:
        """Where a tensor's format was given to it, if it has one: what only moved its values is passed by."""
        while tensor in self._moved:
            tensor = self._moved[tensor]
        return tensor

    def _read_format(self, node: Node) -> Fixed:
        """The format of what a function reads."""
        origin = self.origin(node.sources[0])
        below = self._below.get(origin)
        return below_format(self._formats[self.origin(below)]) if below else self._formats[origin]

    @property
    def tables(self) -> Mapping[str, Tensor]:
        """Values of each `Function` by the code that it reads, in ascending order; empty for a float model."""
        return self._tables

    @torch.no_grad()
    def _table(self, node: Node, layer: Function) -> Tensor:
        """Computed in float64, once, whatever the model's type; zero where the function has no value."""
        read, made = self._read_format(node), self._formats[node.name]
        values = layer.function(torch.arange(read.lo, read.hi + 1, dtype=torch.float64) * read.step)
        return fake_quantize(values.nan_to_num(0.0, math.inf, -math.inf), Grid.of(made))

    def _looked_up(self, node: Node, x: Tensor, tensor: Tensor) -> Tensor:
        """A function's quantized values, with the gradient of the float ones."""
        read, table = self._read_format(node), self._tables[node.name]
        codes = (x.detach() / read.step).sub_(read.lo)
        values: Tensor = _Replaced.apply(table.to(x)[codes.long()], tensor)  # type: ignore[no-untyped-call]
        return values

    def _step(self, node: Node, layer: nn.Module) -> float:
        source = min(self._steps[name] for name in node.sources)
        match layer:
            case Activation() | Function():
                return self._formats[node.name].step
            case Multiply():
                return math.prod(self._steps[name] for name in node.sources)
            case Bilinear():
                return source * layer.step
            case nn.LeakyReLU():
                return source * layer.negative_slope
            case AvgPool():
                return source / layer.divisor
            case _ if isinstance(layer, LINEAR_LAYERS):
                return source * self._formats[self.weight_sites[node.name]].step
            case _:
                return source

    def forward(
        self,
        x: Tensor,
        grids: Mapping[str, AnyGrid] | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
        follow: Callable[[str, Tensor], None] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Output for `x`, `(batch, *input_shape)`; several inputs, and several outputs, stand in a row.

        Args:
            x: real inputs.
            grids: quantizer of each site by name, in place of the frozen ones; a site that is left out stays float.
            observe: called with the name and the unquantized tensor of the input and of every activation.
            follow: called with the name and the values of every tensor that layers read or the model puts out.
            known: such values, of nodes that are not to be computed again.
        """
        grids, known = self._grids if grids is None else grids, known or {}
        inputs = {
            name: _channels_last(part)
            for name, part in zip(self.inputs, parted(x, list(self.inputs.values())), strict=True)
        }
        if observe:
            for name, tensor in inputs.items():
                observe(name, tensor)
        # What dense layers quantize for themselves, by name
        watched = observe or follow
        dense = () if watched or torch.is_autocast_enabled(x.device.type) else self._dense
        values = {**self._parameters_by_site, **inputs}
        if names := [name for name in values if name in grids and name not in dense]:
            quantized = fake_quantize_all([values[name] for name in names], [grids[name] for name in names])
            values |= zip(names, quantized, strict=True)

        tensors = {name: values[name] for name in inputs}
        if follow:
            for name, tensor in tensors.items():
                follow(name, tensor)
        relus: set[str] = set()  # that a dense layer is to apply
        origins: dict[str, tuple[Tensor, AnyGrid]] = {}  # what tensors were quantized from, and how
        origins |= {name: (x, grids[name]) for name, x in inputs.items() if name in grids and name not in dense}
        for node, layer, read in zip(self.nodes, self.layers, self._last_reads, strict=True):
            name, sources = node.name, [tensors[source] for source in node.sources]
            if name in known:
                tensors[name] = known[name]
            elif isinstance(layer, Activation):
                fused = layer.relu and name in grids and not watched  # no grid reaches beyond the limit of a clip
                tensor = sources[0] if fused else layer(*sources)
                if observe:
                    observe(name, tensor)
                if name in dense:
                    if fused:
                        relus.add(name)
                elif name in grids:
                    origins[name] = tensor, grids[name]
                    tensor = fake_quantize(tensor, grids[name], relu=fused)
                tensors[name] = tensor
                del tensor
            elif isinstance(layer, Function):
                tensor = layer(*sources)
                if observe:
                    observe(name, tensor)
                if grids is self._grids and name in grids:
                    tensor = self._looked_up(node, sources[0], tensor)
                elif name in grids:
                    tensor = fake_quantize(tensor, grids[name])
                tensors[name] = tensor
                del tensor
            else:
                source = node.sources[0]
                origin = origins.get(source) if len(sources) == 1 else None
                with recomputed(sources[0], *origin) if origin else nullcontext():
                    if isinstance(layer, LINEAR_LAYERS):
                        sites = self.weight_sites[name], _bias(name)
                        parameters = values[sites[0]], values[sites[1]]
                        if sites[0] in dense:
                            its_grids = [grids.get(site) if site in dense else None for site in (source, *sites)]
                            tensors[name] = quantized_linear(
                                sources[0], *parameters, grids=its_grids, relu=source in relus
                            )
                        else:
                            tensors[name] = _linear(layer, sources[0], *parameters)
                    else:
                        tensors[name] = layer(*sources)
                if origin and isinstance(layer, Move) and layer.is_reshape:
                    origins[name] = origin
            if follow:
                follow(name, tensors[name])
            del sources
            for done in read:
                del tensors[done]
                origins.pop(done, None)
        return tensors[self.nodes[-1].name]
