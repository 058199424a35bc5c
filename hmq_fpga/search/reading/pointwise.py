"""Functions of one value that a program writes out in several operations, each element by itself.

`torch.where(x > 0, x, 0.1 * x)` is no operation that hardware has, nor is a comparison; but all of it is a function of
`x`, and so a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

_ALSO = frozenset(["where", "masked_fill", "to", "_to_copy", "__and__", "__or__", "__xor__"])  # PyTorch does not say so


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operation makes each element of the elements at its place, and changes nothing."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.is_mutable:
        return False
    return torch.Tag.pointwise in node.target.tags or schema.name.partition("::")[2] in _ALSO  # type: ignore[union-attr]


class Pointwise:
    """What operations of a graph are functions of, element by element.

    Args:
        values: what has been read so far, by node; constants are tensors and numbers.
        depends: whether such a thing depends on the input.
    """

    def __init__(self, values: Mapping[fx.Node, Any], depends: Callable[[Any], bool]) -> None:
        self._values, self._depends = values, depends
        self._chains: dict[fx.Node, list[fx.Node]] = {}

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """A node, and those that alone decide it, element by element, the nearest first."""
        if node not in self._chains:
            self._chains[node] = [node, *self._deciding(node)]
        return self._chains[node]

    def _deciding(self, node: fx.Node) -> list[fx.Node]:
        sources = self.sources(node)
        constants = [self._values.get(n) for n in node.all_input_nodes if n not in sources]
        if not (sources and is_pointwise(node) and all(_same_shape(node, source) for source in sources)):
            return []
        if not all(_is_one_number(constant) for constant in constants):
            return []
        first, *others = (self.chain(source) for source in sources)
        return [candidate for candidate in first if all(candidate in other for other in others)]

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads that depends on the input, each once."""
        return [n for n in node.all_input_nodes if self._depends(self._values.get(n))]

    def steps(self, node: fx.Node, source: fx.Node) -> list[fx.Node]:
        """What leads from one of a node's chain to the node, each after what it reads."""
        found: dict[fx.Node, None] = {}

        def collect(step: fx.Node) -> None:
            if step not in found and step is not source:
                for read in self.sources(step):
                    collect(read)
                found[step] = None

        collect(node)
        return [*found]

    def function(self, node: fx.Node, source: fx.Node) -> Callable[[Tensor], Tensor]:
        """A node as a function of one of its chain, of a tensor of any shape and type of reals."""

        def told(n: fx.Node) -> Any:
            return n if self._depends(self._values.get(n)) else self._number(n)

        given = {step: fx.map_arg((step.args, step.kwargs), told) for step in self.steps(node, source)}

        def function(x: Tensor) -> Tensor:
            made = {source: x}
            for step, (args, kwargs) in given.items():
                args, kwargs = fx.map_arg((args, kwargs), made.__getitem__)
                made[step] = step.target(*_of_type(args, x.dtype), **_of_type(kwargs, x.dtype))  # type: ignore[operator]
            return made[node].to(x.dtype)

        return function

    def _number(self, node: fx.Node) -> Any:
        """A constant, which makes no tensor another type."""
        value = self._values.get(node)
        return value.flatten()[0] if isinstance(value, Tensor) else value


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    """But for the batch."""
    made, read = (n.meta["val"].shape for n in (node, source))
    return len(made) == len(read) and list(map(int, made[1:])) == list(map(int, read[1:]))


def _is_one_number(constant: Any) -> bool:
    return not isinstance(constant, Tensor) or len(constant.unique()) == 1


def _of_type(given: Any, dtype: torch.dtype) -> Any:
    """Arguments that make no other type of reals than this."""
    if isinstance(given, dict):
        return {name: _of_type(value, dtype) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(_of_type(value, dtype) for value in given)
    if isinstance(given, Tensor):
        return given.to(dtype) if given.is_floating_point() else given
    return dtype if isinstance(given, torch.dtype) and given.is_floating_point else given
