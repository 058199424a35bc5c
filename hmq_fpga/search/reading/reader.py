"""The walk over an exported program: constants are computed, moves are followed, all else goes by the table."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.graph import INPUT, Final, Node, Statistics
from hmq_fpga.search.layers import (
    FORMATTED_LAYERS,
    MERGING_LAYERS,
    MOVING_LAYERS,
    Activation,
    Affine,
    AvgPool,
    Concat,
    Function,
    MaxPool,
    Move,
)
from hmq_fpga.search.reading.draft import Draft
from hmq_fpga.search.reading.exported import BATCH, Exported, place
from hmq_fpga.search.reading.pointwise import Pointwise, is_pointwise


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that depends on the input.

    Attributes:
        tensor: its name in the draft.
        shape: of one sample.
        index: where it was only moved since: which value of the whole batch, counted in a row from one, stands where,
            the batch's dimension included; zero: none of them, but zero.
        label: of the last move, for its name.
    """

    tensor: str
    shape: Shape
    index: Tensor | None = None
    label: Label | None = None


@dataclass(frozen=True)
class Label:
    """What people call an operation.

    Attributes:
        path: its name in the user's model.
        kind: the module's class, or the function.
        name: what its layer is called, before that is made unique.
        where: for errors.
    """

    path: str
    kind: str
    name: str
    where: str


@dataclass(frozen=True, eq=False)
class Unread:
    """What depends on the input and has no layer, as a comparison; maybe it has one with what is made of it.

    Attributes:
        node: that makes it.
        reason: why it has none.
    """

    node: fx.Node
    reason: UnsupportedLayer


Read = Callable[..., Any]


class Reader:
    """Reads an exported module into a draft."""

    def __init__(
        self, exported: Exported, table: dict[str, Read], moves: frozenset[str], *, keep_final: bool = False
    ) -> None:
        self._exported, self._table, self._moves, self.keep_final = exported, table, moves, keep_final
        program = exported.program
        self._graph = program.graph
        users = program.graph_signature.user_inputs
        names = [INPUT] if len(users) == 1 else [re.sub(r"\W", "_", str(name)) for name in users]
        self.draft = Draft({name: tuple(x.shape[1:]) for name, x in zip(names, exported.examples, strict=True)})
        self._values: dict[fx.Node, Any] = {}
        self._inputs = dict(zip(users, names, strict=True))
        self._calls = Counter(map(self._call_of, self._graph.nodes))
        self._named: set[str] = set()
        self._settled: dict[Value, Value] = {}
        self._parameters: dict[Tensor, nn.Parameter] = {}  # a tensor is known by what it is, not by its values
        self._derived: dict[tuple[Tensor, str], Tensor] = {}
        self._doubled: dict[tuple[int, Shape], Tensor] = {}
        self.pointwise = Pointwise(self._values, lambda value: isinstance(value, Value | Unread))
        self.label = Label("", "", "", "model")
        self.node: fx.Node

    def read(self) -> Draft:
        """The whole program.

        Raises:
            UnsupportedLayer: naming the operation and its place in the user's code.
            InvalidInput: where the module works for one size of batch only.
        """
        constants = self._exported.constants
        for node in self._graph.nodes:
            self.node = node
            if node.op == "placeholder" and node.name in self._inputs:
                self._enter(node)
            elif node.op == "placeholder":
                self._values[node] = self._constant(constants[node.name])
            elif node.op == "call_function":
                self._follow(node)
            elif node.op == "output":
                self._end(node)
            else:
                raise UnsupportedLayer(
                    f"model: forward holds {node.target}, a part that runs in its own way, as under autocast or cond: "
                    "take that away"
                )
        return self.draft

    def _enter(self, node: fx.Node) -> None:
        name = self._inputs[node.name]
        if isinstance(node.meta["val"].shape[0], int):
            raise InvalidInput(f"model: forward takes batches of {BATCH} only; do not fix the size of the batch in it")
        self._values[node] = Value(name, self.draft.inputs[name])

    def _constant(self, value: Any) -> Any:
        """In float64; the same one for what the user's model shares."""
        if not _is_real(value):
            return value
        return self._doubled.setdefault((value.data_ptr(), tuple(value.shape)), value.detach().double())

    def _follow(self, node: fx.Node) -> None:
        name, mutates = _name_of(node.target)
        if name.startswith(("_assert", "sym_constrain")) or not (node.users or mutates):
            return
        given: Any = fx.map_arg((node.args, node.kwargs), lambda n: self._values.get(n))
        values = [v for v in tree_leaves(given) if isinstance(v, Value | Finished | Unread)]
        result: Any
        if name == "sym_size":
            x, dim = given[0]
            shape = (BATCH, *node.args[0].meta["val"].shape[1:]) if isinstance(x, Unread) else self.full_shape(x)  # type: ignore[union-attr]
            result = int(shape[dim])
        elif node.target is operator.getitem:
            result = given[0][0][given[0][1]]
        elif not values:
            result = _computed(node.target, *given)
        else:
            self.label = self._labelled(node, name)
            try:
                result = self._read(node, name, given, values)
            except UnsupportedLayer:
                raise
            except Exception as error:  # an operation as nobody wrote it yet
                reason = str(error).strip().partition("\n")[0] or repr(error)
                raise UnsupportedLayer(f"{self.label.where}: cannot be read: {reason}; write it otherwise") from error
        self._values[node] = result
        if mutates:
            self._values[node.args[0]] = result  # type: ignore[index]

    def _read(self, node: fx.Node, name: str, given: Any, values: list[Any]) -> Any:
        """By the table; else as a function of one value, together with what was made of that before."""
        unread = [v for v in values if isinstance(v, Unread)]
        try:
            if not unread:
                alone = self.of_one_value(node) if self._is_written_out(node) else None
                return alone or self._apply(node, name, given, values)
            reason = unread[0].reason
        except UnsupportedLayer as error:
            reason = UnsupportedLayer(f"{self.label.where}: {error}")
        if len(self.pointwise.chain(node)) > 1:
            made = self.of_one_value(node) if _is_real(node.meta["val"]) else None
            return made or Unread(node, reason)
        if made := self._of_truths(node, name, given, values):
            return made
        if is_pointwise(node):
            return Unread(node, reason)
        raise reason

    def _is_written_out(self, node: fx.Node) -> bool:
        """Whether an operation joins what was made of one value, a table among it: one table does it all."""
        source, *_ = [*self.pointwise.chain(node)[1:], None]
        if source is None or len(self.pointwise.sources(node)) < 2:
            return False
        made = (self._values.get(step) for step in self.pointwise.steps(node, source))
        layers = (self.draft.layers.get(value.tensor) for value in made if isinstance(value, Value))
        return any(isinstance(layer, Function) for layer in layers)

    def of_one_value(self, node: fx.Node | None = None) -> Value | None:
        """A table for the operation, where it is a function of one value that has been read, element by element."""
        node = node or self.node
        for source in self.pointwise.chain(node)[1:]:
            value = self._values[source]
            if isinstance(value, Value) and _is_real(source.meta["val"]):
                function = Function(self.label.kind, self.pointwise.function(node, source))
                return self.layer(function, value, shape=value.shape)
        return None

    def _of_truths(self, node: fx.Node, name: str, given: Any, values: list[Any]) -> Any:
        """By the table, from truth values as tables of 0 and 1; None where there are none, or it cannot."""
        unread = [v for v in values if isinstance(v, Unread)]
        for truth in unread:
            if (made := self.of_one_value(truth.node)) is None:
                return None
            given, values = _replaced((given, values), truth, made)
        try:
            return self._apply(node, name, given, values) if unread else None
        except UnsupportedLayer:
            return None

    def _apply(self, node: fx.Node, name: str, given: Any, values: list[Any]) -> Any:
        if isinstance(values[0], Finished) and name not in FINALS:
            return self._reshaped_final(
                values[0], lambda x: self._moved(x, node.target, *_replaced(given, values[0], x))
            )
        if name in self._moves and (len(values) == 1 or name.endswith("_as")):
            first = tree_leaves(given)[0]
            if isinstance(first, Value):
                return self._moved(first, node.target, *given)
            if name.endswith("_as"):
                return self.of_shape()
            raise UnsupportedLayer(
                "looks values up by a number; give them as inputs, or use a Linear of one-hot inputs"
            )
        read = self._table.get(name)
        if read is None:
            raise UnsupportedLayer("is not supported; see `hmq-fpga layers` for what is")
        return read(self, **_bound(node.target, given, read))

    def _reshaped_final(self, x: Finished, move: Callable[[Value], Value]) -> Finished:
        """A function that is left out, and then its result in another shape: left out together."""
        before = Value(x.value.tensor, x.shape)
        after = move(before)
        count = torch.arange(1, 1 + BATCH * math.prod(x.shape))
        if after.index is not None and (len(after.index) != BATCH or not torch.equal(after.index.flatten(), count)):
            raise UnsupportedLayer(
                f"comes after {x.final.name}; only shapes may change after that, with the batch first"
            )
        function = x.final.function
        final = replace(x.final, function=lambda y: function(y).reshape(len(y), *after.shape))
        return Finished(x.value, final, after.shape)

    def _end(self, node: fx.Node) -> None:
        returned: list[Any] = [self._values.get(n) if isinstance(n, fx.Node) else n for n in node.args[0]]  # type: ignore[union-attr]
        for unread in (v for v in returned if isinstance(v, Unread)):
            raise unread.reason
        self.label = Label("output", "output", "output", "model")
        if not returned or any(not isinstance(v, Value | Finished) for v in returned):
            raise UnsupportedLayer("model: forward must return a tensor that it computed, or a tuple of such")
        returned = [self._squeezed(v) if isinstance(v, Value) and len(self.full_shape(v)) == 1 else v for v in returned]
        for value in (v.value if isinstance(v, Finished) else v for v in returned):
            try:
                name = self.settled(value).tensor
            except UnsupportedLayer as error:
                raise UnsupportedLayer(f"model: its output {error}") from error
            if name in self.draft.inputs:
                raise UnsupportedLayer("model: forward must return a tensor that it computed, or a tuple of such")
            if name in self.draft.outputs:
                raise UnsupportedLayer(f"model: returns {self.draft.path(name)!r} more than once; return it once")
            self.draft.outputs.append(name)
        self.draft.finals = [v.final if isinstance(v, Finished) else None for v in returned]

    def _squeezed(self, x: Value) -> Value | Finished:
        """One number for each sample: hardware gives a tensor of one value."""
        if self.is_batch_first(x):
            return Finished(self.settled(x), Final(name="squeeze", function=lambda y: y.flatten()), ())
        return x

    # for the table's entries

    @property
    def shape(self) -> Shape:
        """Of one sample of the result."""
        return tuple(int(n) for n in self.node.meta["val"].shape[1:])

    @property
    def is_last(self) -> bool:
        """Whether the result is only returned, at most in another shape or as the number of the largest."""
        return _is_returned(self.node)

    def full_shape(self, x: Value) -> Shape:
        """Of the example batch."""
        return (BATCH, *x.shape) if x.index is None else tuple(x.index.shape)

    def layer(self, layer: nn.Module, *sources: Value, shape: Shape | None = None, name: str = "") -> Value:
        """Add a layer that reads these values; its result has the operation's shape where none is given."""
        shape = self.shape if shape is None else shape
        if _is_of_rows(layer) and (turned := self._batch_first(layer, sources, name)):
            return turned
        settled = [self.settled(source) for source in sources]
        if 0 in shape:
            raise UnsupportedLayer("makes no values: one of its sizes is zero")
        if not shape:  # one number for each sample
            return self.moved(self.layer(layer, *settled, shape=(1,), name=name), lambda i: i.flatten())  # type: ignore[no-any-return]
        tensor = self.draft.free(
            _identifier(f"{self.label.name}_{name}" if name else self.label.name, layer, self.label.kind)
        )
        node = Node(name=tensor, sources=tuple(v.tensor for v in settled), path=self.label.path, shape=shape)
        return Value(self.draft.add(node, layer), shape)

    def _batch_first(self, layer: nn.Module, sources: Sequence[Value], name: str) -> Value | None:
        """The result of a layer that does the same to each row, where the batch is not the first dimension."""
        if isinstance(layer, Affine) and len(self.full_shape(sources[0])) == 1:
            return None
        turned, back, axis = self.turned(*sources)
        if back is None or (isinstance(layer, nn.Linear) and axis == len(self.full_shape(sources[0])) - 1):
            return None
        if isinstance(layer, Affine) and layer.axis is not None and (axis == 0 or layer.axis + 1 < axis):
            layer.axis += 1
        shape = turned[0].shape
        made = self.layer(
            layer,
            *turned,
            shape=(*shape[:-1], layer.out_features) if isinstance(layer, nn.Linear) else shape,
            name=name,
        )
        return self.moved(made, back)  # type: ignore[no-any-return]

    def turned(self, *sources: Value) -> tuple[list[Value], Callable[[Tensor], Tensor] | None, int]:
        """Values of one layout with the batch first, the way back, and the batch's dimension.

        Rows of samples that stand where the batch does become a dimension of their own. None: they are so already.
        """
        axes = {self.batch_axis(x) for x in sources}
        if axes == {None} and all(len(self.full_shape(x)) and self.full_shape(x)[0] % BATCH == 0 for x in sources):
            for apart, together in _ROWS:
                split = [self.moved(x, apart) for x in sources]
                if all(map(self.is_batch_first, split)):
                    return split, together, 0
        axis = (axes.pop() if len(axes) == 1 else 0) or 0
        if axis == 0:
            return list(sources), None, 0
        return [self.moved(x, lambda i: i.movedim(axis, 0)) for x in sources], lambda i: i.movedim(0, axis), axis

    def formatted(self, x: Value) -> Value:
        """The value in a format of its own: behind a quantizer, where it has none yet."""
        origin = x.tensor
        while origin in self.draft.layers and isinstance(self.draft.layers[origin], MOVING_LAYERS):
            (origin,) = self.draft.nodes[origin].sources
        if origin in self.draft.inputs or isinstance(self.draft.layers[origin], FORMATTED_LAYERS):
            return x
        return self.layer(Activation(relu=False), x, shape=x.shape, name="read")

    def parameter(self, constant: Tensor) -> nn.Parameter:
        """The same one for the same constant: what the user's model shares stays shared."""
        if constant not in self._parameters:
            self._parameters[constant] = nn.Parameter(constant.detach().float().clone())
        return self._parameters[constant]

    def derived(self, constant: Tensor, how: str, make: Callable[[], Tensor]) -> Tensor:
        """What is made of a constant, the same one for the same constant."""
        if (constant, how) not in self._derived:
            self._derived[constant, how] = make()
        return self._derived[constant, how]

    def function(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The operation as a function of the one value that it reads, and its name."""
        name, _ = _name_of(self.node.target)
        settings: dict[str, Any] = {}
        for argument, value in zip(self.node.target._schema.arguments[1:], self.node.args[1:], strict=False):  # type: ignore[union-attr]
            settings[argument.name] = value
        return name, functools.partial(getattr(torch.ops.aten, name), **settings, **self.node.kwargs)

    def module(self) -> nn.Module:
        """The user's module that the operation is in."""
        path, _ = next(reversed(self.node.meta["nn_module_stack"].values()))
        return self._exported.module.get_submodule(path)

    def affine(self, x: Value, weight: Tensor, bias: Tensor, axis: int | None) -> Value:
        """`x * weight + bias` along a dimension of the sample."""
        return self.layer(Affine(weight.float(), bias.float(), axis), x, shape=x.shape)

    def normalized(self, x: Value, weight: Tensor, bias: Tensor, statistics: Statistics) -> Value:
        """`x * weight + bias` along the channels, where `x` is known to have these statistics."""
        made = self.affine(x, weight, bias, 0)
        name, affine = next(reversed(self.draft.layers.items()))
        assert isinstance(affine, Affine)
        (source,) = self.draft.nodes[name].sources
        self.draft.statistics[source] = statistics._replace(axis=affine.axis or 0)
        return made

    def final(self, x: Value | Finished, function: Callable[[Tensor], Tensor]) -> Finished:
        """A function that is left out, since only its result is returned."""
        self.draft.notes.append(f"{self.label.path} removed: the hardware gives the values before it")
        if isinstance(x, Finished):
            before = x.final.function
            both = replace(x.final, name=self.label.kind, function=lambda y: function(before(y)))
            return Finished(x.value, both, self.shape)
        settled, function_of = self.settled(x), function
        if not x.shape:
            function_of = lambda y: function(y.flatten())  # noqa: E731
        return Finished(settled, Final(name=self.label.kind, function=function_of), self.shape)

    def of_shape(self) -> Tensor:
        """What the operation makes of the shapes of its values alone."""
        given = fx.map_arg((self.node.args, self.node.kwargs), lambda n: self._values.get(n))
        args, kwargs = tree_map(lambda v: torch.zeros(self.full_shape(v)) if isinstance(v, Value) else v, given)
        made: Tensor = _computed(self.node.target, args, kwargs)
        return made

    def nothing(self, x: Value) -> Value:
        """An operation that does nothing in evaluation."""
        if self.label.kind in ("Identity", "dropout") or "Dropout" in self.label.kind:
            self.draft.notes.append(f"{self.label.path} removed: it does nothing in evaluation")
        return x

    def moved(self, x: Value, function: Callable[[Tensor], Any]) -> Any:
        """A value, or a tuple of such, whose places a function of the whole batch changes."""
        label = self.label
        self.label = replace(label, name=f"{label.name}_moved")  # the name itself is for what the operation makes
        moved = self._moved(x, function, (x,), {})
        self.label = label
        return moved

    def reshaped(self, x: Value, shape: Shape) -> Value:
        """The values in a row in another shape of the sample."""
        result: Value = x if x.shape == shape and x.index is None else self.moved(x, lambda i: i.reshape(BATCH, *shape))
        return result

    def settled(self, x: Value) -> Value:
        """The value as a tensor of the draft: where it was moved, behind a layer that moves it.

        Raises:
            UnsupportedLayer: where the batch is no longer the first dimension.
        """
        if x.index is None:
            return x
        if x not in self._settled:
            self._settled[x] = self._settle(x, x.index.long())
        return self._settled[x]

    def _settle(self, x: Value, index: Tensor) -> Value:
        size, shape = self.draft.size(x.tensor), self.draft.shape(x.tensor)
        if index.shape == (BATCH,):  # one number for each sample: a tensor of one
            index = index[:, None]
        if index.ndim == 0 or len(index) != BATCH:
            raise UnsupportedLayer(
                "does not keep the batch as its first dimension; leave it there, layers take any number of others"
            )
        if not self.is_batch_first(x):
            raise UnsupportedLayer("mixes the samples of a batch")
        first = index[0]
        if first.shape == shape and torch.equal(first.flatten(), 1 + torch.arange(size)):
            return Value(x.tensor, shape)
        reader, self.label = self.label, x.label or self.label
        settled = self.layer(Move(first - 1, size), Value(x.tensor, shape), shape=tuple(first.shape))
        self.label = reader
        return settled

    def batch_axis(self, x: Value) -> int | None:
        """The dimension of a whole batch that is its samples; None where these are mixed."""
        if x.index is None:
            return 0
        size = self.draft.size(x.tensor)
        for axis, n in enumerate(x.index.shape):
            if n == BATCH:
                first, second = x.index.unbind(axis)
                if torch.equal(torch.where(first > 0, first + size, 0), second) and int(first.max()) <= size:
                    return axis
        return None

    def is_batch_first(self, x: Value) -> bool:
        """Whether a whole batch has its samples along the first dimension, none of them mixed."""
        return self.batch_axis(x) == 0

    def _moved(self, x: Value, function: Any, args: Any, kwargs: Any) -> Any:
        """What an operation that only moves values makes of one: seen by what it does to their numbers."""
        index = x.index
        if index is None:
            index = 1 + torch.arange(BATCH * math.prod(x.shape), dtype=torch.float64).reshape(BATCH, *x.shape)
        numbers = index.contiguous()  # what it has to be for a view is of no concern
        args, kwargs = tree_map(lambda v: numbers if v is x else v, (args, kwargs))
        args, kwargs = tree_map(
            lambda v: torch.zeros(self.full_shape(v)) if isinstance(v, Value) else v, (args, kwargs)
        )
        return tree_map(
            lambda i: Value(x.tensor, tuple(i.shape[1:]), i, self.label) if isinstance(i, Tensor) else i,
            function(*args, **kwargs),
        )

    # names

    def _call_of(self, node: fx.Node) -> str:
        """The call of a module that an operation belongs to; none for what only picks one of its results."""
        if node.target is operator.getitem:
            return ""
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        return next(reversed(stack), "")

    def _labelled(self, node: fx.Node, name: str) -> Label:
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        path, cls = next(reversed(stack.values()), ("", ""))
        cls = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        kind = cls.rpartition(".")[2]
        is_module = cls.startswith("torch.nn.") and kind != "Sequential"
        if is_module:
            lone = self._calls[self._call_of(node)] == 1 or name.startswith(("linear", "conv", "gru", "lstm", "rnn"))
            own, raw = path, self._numbered(_word(path if lone else f"{path}.{name}"))
        else:
            kind = "interpolate" if name.startswith("upsample") else name
            own = raw = f"{path}.{self._numbered(kind)}".strip(".")
        named = f"layer {own!r} ({kind})" if own else kind
        return Label(own, kind, raw, f"model: {named}{place(node)}")

    def _numbered(self, function: str) -> str:
        """A function's name; where there is one such already, with a number."""
        name, n = function, 1
        while name in self._named:
            name, n = f"{function}_{n}", n + 1
        self._named.add(name)
        return name


@dataclass(frozen=True, eq=False)
class Finished:
    """An output behind a function that is left out.

    Attributes:
        value: before it.
        final: the function.
        shape: of one sample of its result.
    """

    value: Value
    final: Final
    shape: Shape


FINALS = frozenset(["softmax", "log_softmax", "argmax"])  # of which one may come after another
_ROWS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (  # of samples, apart and back
    (lambda i: i.unflatten(0, (BATCH, -1)), lambda i: i.flatten(0, 1)),  # sample after sample
    (lambda i: i.unflatten(0, (-1, BATCH)).movedim(1, 0), lambda i: i.movedim(0, 1).flatten(0, 1)),  # in turn
)
_RESHAPES = frozenset(["squeeze", "unsqueeze", "flatten", "unflatten", "view", "reshape", "ravel"])


def _is_of_rows(layer: nn.Module) -> bool:
    """Whether a layer does the same to each row of a sample."""
    if isinstance(layer, Affine):
        return layer.axis is not None
    return isinstance(layer, (nn.Linear, nn.LeakyReLU, *FORMATTED_LAYERS, *MERGING_LAYERS)) and not isinstance(
        layer, Concat
    )


def _is_returned(node: fx.Node) -> bool:
    return all(
        user.op == "output"
        or (user.op == "call_function" and _name_of(user.target)[0] in {"argmax", *_RESHAPES} and _is_returned(user))
        for user in node.users
    )


def _replaced(given: Any, old: object, new: object) -> Any:
    return tree_map(lambda v: new if v is old else v, given)


def _identifier(raw: str, layer: nn.Module, kind: str) -> str:
    """A C identifier close to the user's name."""
    name = _word(raw)
    return name if name[:1].isalpha() else f"{_kind(layer) or kind.lower()}_{name}"


def _word(raw: str) -> str:
    return re.sub(r"\W", "_", raw).strip("_")


def _kind(layer: nn.Module) -> str:
    """What a layer is called whose name is a number; empty where the user's word for it will do."""
    match layer:
        case Activation():
            return "relu"
        case MaxPool():
            return f"maxpool{len(layer.window)}d"
        case AvgPool() | Affine():
            return type(layer).__name__.lower()
        case _:
            return ""


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _name_of(target: Any) -> tuple[str, bool]:
    """Name of an operation without its overload, and whether it changes its first argument in place."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target)), False
    name = str(schema.name).partition("::")[2]
    mutates = bool(schema.is_mutable)
    return (name.rstrip("_") if mutates else name), mutates


def _computed(target: Any, args: Any, kwargs: Any) -> Any:
    """An operation on constants alone, in float64."""
    with torch.no_grad():
        return tree_map(lambda v: v.double() if _is_real(v) else v, target(*args, **kwargs))


def _bound(target: Any, given: Any, read: Read) -> dict[str, Any]:
    """An operation's arguments by name, as an entry of the table takes them; what it does not name must be as usual."""
    args, kwargs = given
    parameters = inspect.signature(read).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        name = "x" if argument.name in ("self", "input") else argument.name
        if name in parameters or takes_all:
            bound[name] = value
        elif value != argument.default_value and name not in ("inplace", "memory_format", "dtype", "cudnn_enabled"):
            raise UnsupportedLayer(f"its {argument.name}={value} is not supported")
    return bound


def require_constant(value: object, what: str) -> Tensor:
    """A constant tensor, such as a weight.

    Raises:
        UnsupportedLayer: where it depends on the input.
    """
    if isinstance(value, Value):
        raise UnsupportedLayer(f"its {what} depends on the input; a parameter or a constant is supported")
    return torch.as_tensor(value, dtype=torch.float64) if not isinstance(value, Tensor) else value
