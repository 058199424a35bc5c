"""A network being read: layers that make tensors, known by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.graph import Final, Node, Statistics


@dataclass
class Draft:
    """The layers that were read so far, in execution order.

    Attributes:
        inputs: shape of one sample of each input by name.
        nodes, layers: by the name of the tensor that a layer makes.
        outputs: the tensors that the user's model returns.
        finals: for each output the function that was left out, or None.
        statistics: of tensors that a BatchNorm reads, or whose values it has since passed on.
        notes: what was folded, removed or replaced, a sentence each.
        is_exact: whether the draft computes what the user's model does.
    """

    inputs: Mapping[str, Shape]
    nodes: dict[str, Node] = field(default_factory=dict)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    finals: list[Final | None] = field(default_factory=list)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_exact: bool = True

    def add(self, node: Node, layer: nn.Module) -> str:
        """Append a layer; the name of its tensor."""
        self.nodes[node.name], self.layers[node.name] = node, layer
        return node.name

    def shape(self, tensor: str) -> Shape:
        """Of one sample, as PyTorch has it."""
        return self.inputs[tensor] if tensor in self.inputs else self.nodes[tensor].shape

    def size(self, tensor: str) -> int:
        """Values of one sample."""
        return math.prod(self.shape(tensor))

    def free(self, base: str) -> str:
        """A name that no tensor has yet."""
        name, n = base, 1
        while name in self.layers or name in self.inputs:
            name, n = f"{base}_{n}", n + 1
        return name

    def readers(self, tensor: str) -> list[str]:
        """The layers that read a tensor, once for each time."""
        return [node.name for node in self.nodes.values() for source in node.sources if source == tensor]

    def reader(self, tensor: str) -> str | None:
        """The only layer that reads a tensor, if nothing else does and it is no output."""
        readers = self.readers(tensor)
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def remove(self, name: str) -> None:
        """Take a layer with one source out: who read its tensor reads the source."""
        (source,) = self.nodes.pop(name).sources
        del self.layers[name]
        self.statistics.pop(name, None)
        for reader in self.readers(name):
            node = self.nodes[reader]
            self.nodes[reader] = replace(node, sources=tuple(source if s == name else s for s in node.sources))
        self.outputs = [source if output == name else output for output in self.outputs]

    def path(self, tensor: str) -> str:
        """What the user's model calls what made a tensor."""
        return self.nodes[tensor].path if tensor in self.nodes else tensor
