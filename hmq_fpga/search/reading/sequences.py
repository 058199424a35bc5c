"""Entries of the operation table for softmax, attention and recurrent layers: made of layers that are exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.layers import Activation, Add, Below, Function, Multiply, Subtract
from hmq_fpga.search.reading.exported import BATCH
from hmq_fpga.search.reading.operations import (
    batch_norm,
    cat,
    largest,
    linear_layer,
    mean_of,
    product_of_matrices,
    reduced,
    scaled,
    stack,
    sum_of,
)
from hmq_fpga.search.reading.reader import Finished, Reader, Value, require_constant
from hmq_fpga.search.reading.table import entry

_FLOOR = 0.5  # of a softmax's sum, whose largest term is one


# --- softmax and attention -------------------------------------------------------------------------------------------


def _falling(x: Tensor, scale: float) -> Tensor:
    """`exp(-scale * x)` of what is never negative."""
    return torch.exp(-scale * x.clamp(min=0))


def _inverse(x: Tensor) -> Tensor:
    return x.clamp(min=_FLOOR).reciprocal()


def _softmax_over(r: Reader, x: Value, dim: int, scale: float = 1.0, allowed: Tensor | None = None) -> Value:
    """Softmax of `scale * x`, over a dimension of the whole batch.

    The distance to the largest is exact, so that of two codes the larger one never gets less; then a table of the
    exponential function, their exact sum, a table of its reciprocal, and the exact product of both in a format. Where
    only some values of a row are allowed, one of these stands for the others until their terms are zero.
    """
    (x,), back, _ = r.turned(r.moved(x, lambda i: i.movedim(dim, -1)))
    x = r.formatted(x)
    shape = x.shape
    if allowed is not None:
        allowed = _of_each_row(allowed, shape)
        own, first = torch.arange(shape[-1]), allowed.int().argmax(-1, keepdim=True)
        chosen = torch.where(allowed, own, first)
        x = r.moved(x, lambda i: i.gather(-1, chosen.expand(len(i), *shape)))

    def repeated(one: Value) -> Value:
        spread: Value = r.moved(one, lambda i: i.expand(len(i), *shape))
        return spread

    below = r.layer(Below(), x, repeated(reduced(r, x, -1, True, largest, "largest")), shape=shape, name="below")
    terms = r.layer(Function("exp", functools.partial(_falling, scale=scale)), below, shape=shape, name="exp")
    if allowed is not None:
        terms = r.moved(terms, lambda i: i * allowed)
    total = reduced(r, terms, -1, True, sum_of, "total")
    total = r.layer(Activation(relu=True), total, shape=total.shape, name="sum")
    inverse = r.layer(Function("reciprocal", _inverse), total, shape=total.shape, name="reciprocal")
    shares = r.layer(Multiply(), terms, repeated(inverse), shape=shape, name="shares")
    made = r.layer(Activation(relu=True), shares, shape=shape)
    if back:
        made = r.moved(made, back)
    return r.moved(made, lambda i: i.movedim(-1, dim))  # type: ignore[no-any-return]


@entry(
    *("softmax", "_softmax"),
    about=(
        "the exact distance to the largest value, a table of the exponential function, an exact sum, a table of the "
        "reciprocal and an exact product; at the very end left out, unless it is to be kept"
    ),
)
def _softmax(r: Reader, x: Value | Finished, dim: Any = None, **_settings: Any) -> Any:
    _check_dimension(r, x, dim)
    if isinstance(x, Finished) or (r.is_last and not r.keep_final):
        return r.final(x, r.function()[1])
    return _softmax_over(r, x, dim % len(r.full_shape(x)))


@entry(
    *("log_softmax", "_log_softmax", "argmax"),
    about="at the very end only, where it is left out: the hardware gives the values before it",
)
def _log_softmax(r: Reader, x: Value | Finished, dim: Any = None, **_settings: Any) -> Finished:
    _check_dimension(r, x, dim)
    if not r.is_last:
        raise UnsupportedLayer("is supported at the very end only, where it is removed; use softmax here")
    if r.keep_final:
        raise UnsupportedLayer("is no value that hardware could keep; use softmax, or do not ask for the final one")
    return r.final(x, r.function()[1])


def _check_dimension(r: Reader, x: Value | Finished, dim: Any) -> None:
    shape, batch = (r.full_shape(x), r.batch_axis(x)) if isinstance(x, Value) else ((0, *x.shape), 0)
    if dim is not None and dim % len(shape) == batch:
        raise UnsupportedLayer("is taken over the batch; give the dimension of the scores, such as dim=1")


@entry(
    "scaled_dot_product_attention",
    about="exact products and their exact sums, and between them a softmax, whose table holds the scale",
)
def _attention(
    r: Reader,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Value:
    if not all(isinstance(v, Value) for v in (query, key, value)):
        raise UnsupportedLayer("is supported where queries, keys and values depend on the input")
    if dropout_p:
        raise UnsupportedLayer("drops values in evaluation too; give it dropout_p=0.0 there")
    allowed = None if attn_mask is None else _allowed(require_constant(attn_mask, "mask"))
    if is_causal:
        allowed = torch.ones(r.full_shape(query)[-2], r.full_shape(key)[-2], dtype=torch.bool).tril()
    if allowed is not None and not r.is_batch_first(query):
        raise UnsupportedLayer("is supported with a mask where the batch is the first dimension")
    scores = product_of_matrices(r, query, r.moved(key, lambda i: i.transpose(-1, -2)))
    scale = 1 / math.sqrt(r.full_shape(query)[-1]) if scale is None else float(scale)
    if scale <= 0:
        raise UnsupportedLayer(f"its scale={scale:g} is not positive")
    weights = _softmax_over(r, scores, len(r.full_shape(scores)) - 1, scale, allowed)
    return product_of_matrices(r, weights, value)


def _allowed(mask: Tensor) -> Tensor:
    """Where a mask, of truth values or added to the scores, lets a position see another."""
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == -math.inf)).all()):
        raise UnsupportedLayer("adds a mask to its scores whose values are others than 0 and -inf")
    return mask == 0


def _of_each_row(allowed: Tensor, shape: Shape) -> Tensor:
    whole = allowed.expand(BATCH, *shape)
    if not torch.equal(whole[0], whole[-1]) or not bool(whole.any(-1).all()):
        raise UnsupportedLayer("its mask differs between samples, or leaves a position nothing to see")
    return whole[0]


# --- normalisation ---------------------------------------------------------------------------------------------------


def _inverse_root(x: Tensor, eps: float, values: int) -> Tensor:
    """Of a mean, or of a sum of so many values."""
    return torch.rsqrt(x.clamp(min=0) / values + eps)


def _repeated(r: Reader, one: Value, shape: Shape) -> Value:
    spread: Value = r.moved(one, lambda i: i.expand(len(i), *shape))
    return spread


def _squared(r: Reader, x: Value, dims: Any, keepdim: bool, pool: Callable[[Shape], nn.Module], name: str) -> Value:
    """Exact squares, and what a pooling over dimensions makes of them."""
    squares = r.layer(Multiply(), x, x, shape=x.shape, name="squares")
    return reduced(r, squares, dims, keepdim, pool, name)


def _by_root_mean_square(r: Reader, x: Value, dims: Sequence[int], eps: float) -> Value:
    """`x / sqrt(mean(x^2) + eps)`, of what has a format: exact squares, their exact mean or sum, a table, a product."""
    shape, values = x.shape, math.prod(x.shape[d] for d in dims)
    is_exact = values.bit_count() == 1
    variance = _squared(r, x, dims, True, mean_of if is_exact else sum_of, "squares_mean")
    variance = r.layer(Activation(relu=True), variance, shape=variance.shape, name="variance")
    root = Function("reciprocal root", functools.partial(_inverse_root, eps=eps, values=1 if is_exact else values))
    inverse = _repeated(r, r.layer(root, variance, shape=variance.shape, name="inverse"), shape)
    return r.layer(Multiply(), x, inverse, shape=shape, name="normalized")


def _centred(r: Reader, x: Value, dims: Sequence[int]) -> Value:
    """`x - mean(x)` in a format, of samples along the first dimension."""
    shape, values = x.shape, math.prod(x.shape[d] for d in dims)
    if values.bit_count() != 1:
        raise UnsupportedLayer(f"takes means of {values} values, exact for a power of two of them only; use BatchNorm")
    x = r.formatted(x)
    mean = _repeated(r, reduced(r, x, dims, True, mean_of, "mean"), shape)
    centred = r.layer(Subtract(quantized=False), x, mean, shape=shape, name="difference")
    return r.layer(Activation(relu=False), centred, shape=shape, name="centred")


def _standardized(r: Reader, x: Value, dims: Sequence[int], eps: float) -> Value:
    """`(x - mean(x)) / sqrt(var(x) + eps)`, of samples along the first dimension."""
    return _by_root_mean_square(r, _centred(r, x, dims), dims, eps)


def _with_weight(r: Reader, x: Value, weight: Any, bias: Any = None) -> Value:
    if weight is None and bias is None:
        return x
    return scaled(r, x, 1 if weight is None else weight, 0 if bias is None else bias)


@entry(
    *("layer_norm", "native_layer_norm"),
    about=(
        "over a power of two of values: exact means of values and squares, a table of the reciprocal root and an exact "
        "product; weight and bias as a BatchNorm's"
    ),
)
def _layer_norm(
    r: Reader,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Value:
    (x,), back, _ = r.turned(x)
    made = _standardized(r, x, [-1 - n for n in range(len(normalized_shape))], eps)
    made = _with_weight(r, made, weight, bias)
    return r.moved(made, back) if back else made


@entry(about="as `layer_norm`, without the mean, over any number of values")
def _rms_norm(
    r: Reader, x: Value, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Value:
    (x,), back, _ = r.turned(x)
    least = torch.finfo(torch.float32).eps if eps is None else eps
    made = _by_root_mean_square(r, r.formatted(x), [-1 - n for n in range(len(normalized_shape))], least)
    made = _with_weight(r, made, weight)
    return r.moved(made, back) if back else made


@entry(about="as `layer_norm`, of the channels of each group")
def _group_norm(
    r: Reader,
    x: Value,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Value:
    shape = x.shape
    groups = r.moved(x, lambda i: i.reshape(len(i), num_groups, -1))
    made = r.reshaped(_standardized(r, groups, [-1], eps), shape)
    weight, bias = (c if c is None else c.reshape(-1, *(1 for _ in shape[1:])) for c in (weight, bias))
    return _with_weight(r, made, weight, bias)


@entry(about="as `group_norm`, of each channel; with statistics of its own as a BatchNorm")
def _instance_norm(
    r: Reader,
    x: Value,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001
) -> Value:
    if not use_input_stats:
        return batch_norm(r, x, weight, bias, running_mean, running_var, False, momentum, eps)  # type: ignore[no-any-return]
    return _group_norm(r, x, x.shape[0], weight, bias, eps)  # type: ignore[no-any-return]


@entry(about="over a power of two of values: exact means of values and squares")
def _var(
    r: Reader,
    x: Value,
    dim: Any = None,
    unbiased: bool = True,
    correction: float | None = None,
    keepdim: bool = False,
) -> Value:
    if not r.is_batch_first(x):
        raise UnsupportedLayer("is supported with the batch as the first dimension")
    full = r.full_shape(x)
    dims = [d % len(full) - len(full) for d in ((dim,) if isinstance(dim, int) else dim or range(1, len(full)))]
    centred, values = _centred(r, r.settled(x), dims), math.prod(full[d] for d in dims)
    mean = _squared(r, centred, dims, keepdim, mean_of, "squares_mean")
    return scaled(r, mean, values / (values - (int(unbiased) if correction is None else correction)), 0)


@entry(about="a table of the root of `var`")
def _std(r: Reader, **given: Any) -> Value:
    variance = _var(r, **given)
    return r.layer(Function("root", _root), variance, shape=variance.shape)


@entry("linalg_vector_norm", about="of order 2: exact squares, their exact sum, a table of the root")
def _vector_norm(r: Reader, x: Value, ord: float = 2, dim: Any = None, keepdim: bool = False) -> Value:
    if ord != 2:
        raise UnsupportedLayer("is supported for order 2")
    sums = _squared(r, x, dim, keepdim, sum_of, "sums")
    return r.layer(Function("root", _root), sums, shape=sums.shape)


def _root(x: Tensor) -> Tensor:
    return x.clamp(min=0).sqrt()


# --- recurrent layers, unrolled --------------------------------------------------------------------------------------

State = tuple[Value, ...]
Step = Callable[[Reader, Value, State, Tensor, Tensor | None], State]  # of what the inputs and the last state give


def _table(r: Reader, function: Callable[[Tensor], Tensor], x: Value, name: str) -> Value:
    return r.layer(Function(name, function), x, shape=x.shape, name=name)


def _part(r: Reader, x: Value, number: int, size: int) -> Value:
    """One of the parts of this size that a row of values is made of."""
    part: Value = r.moved(x, lambda i: i[:, number * size : (number + 1) * size])
    return part


def _sum(r: Reader, x: Value, other: Value, name: str) -> Value:
    """Exact, of sums and products as they are."""
    return r.layer(Add(quantized=False), x, other, shape=x.shape, name=name)


def _gates(r: Reader, made: Value, hidden: Value, weight: Tensor, bias: Tensor | None) -> Value:
    """What the inputs give and what the last state gives, added before anything is rounded."""
    return _sum(r, made, linear_layer(r, hidden, weight, bias, made.shape, "hidden"), "gates")


def _rnn_step(function: str) -> Step:
    def step(r: Reader, made: Value, state: State, weight: Tensor, bias: Tensor | None) -> State:
        gates = _gates(r, made, state[0], weight, bias)
        if function == "relu":
            return (r.layer(Activation(relu=True), gates, shape=gates.shape, name="state"),)
        return (_table(r, torch.tanh, gates, "tanh"),)

    return step


def _lstm_step(r: Reader, made: Value, state: State, weight: Tensor, bias: Tensor | None) -> State:
    hidden, cell = state
    size = hidden.shape[0]
    gates = _gates(r, made, hidden, weight, bias)
    opened = r.moved(gates, lambda i: torch.cat([i[:, : 2 * size], i[:, 3 * size :]], 1))
    opened = _table(r, torch.sigmoid, opened, "sigmoid")
    new = _table(r, torch.tanh, _part(r, gates, 2, size), "tanh")
    enter, forget, leave = (_part(r, opened, n, size) for n in range(3))
    kept = r.layer(Multiply(), forget, cell, shape=hidden.shape, name="kept")
    added = r.layer(Multiply(), enter, new, shape=hidden.shape, name="added")
    cell = r.layer(Activation(relu=False), _sum(r, kept, added, "sum"), shape=hidden.shape, name="cell")
    shown = r.layer(Multiply(), leave, _table(r, torch.tanh, cell, "tanh"), shape=hidden.shape, name="shown")
    return r.layer(Activation(relu=False), shown, shape=hidden.shape, name="state"), cell


def _gru_step(r: Reader, made: Value, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """`n + z * (h - n)`, which is `(1 - z) * n + z * h` with one product."""
    (hidden,) = state
    size, shape = hidden.shape[0], hidden.shape
    recurrent = linear_layer(r, hidden, weight, bias, made.shape, "hidden")
    both = [r.moved(v, lambda i: i[:, : 2 * size]) for v in (made, recurrent)]
    gates = _table(r, torch.sigmoid, _sum(r, both[0], both[1], "gates"), "sigmoid")
    reset, update = (_part(r, gates, n, size) for n in range(2))
    past = r.layer(Multiply(), reset, _part(r, recurrent, 2, size), shape=shape, name="past")
    new = _table(r, torch.tanh, _sum(r, _part(r, made, 2, size), past, "sum"), "tanh")
    rest = r.layer(Subtract(quantized=False), hidden, new, shape=shape, name="rest")
    kept = r.layer(Multiply(quantized=False), update, rest, shape=shape, name="kept")
    return (r.layer(Activation(relu=False), _sum(r, new, kept, "mix"), shape=shape, name="state"),)


def _initial(r: Reader, x: Value, given: Any) -> Value:
    """A state `(batch, size)` before the first step, where there is a value `x` that has a format."""
    if isinstance(given, Value):
        return r.formatted(given)
    nothing = r.moved(x, lambda i: i.new_zeros(len(i), given.shape[-1]))
    return r.formatted(scaled(r, nothing, 1, given)) if given.any() else nothing


def _picked(r: Reader, x: Any, dim: int, n: int) -> Any:
    return r.moved(x, lambda i: i.select(dim, n)) if isinstance(x, Value) else x.select(dim, n)


def _unrolled(
    r: Reader,
    step: Step,
    x: Value,
    states: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, list[Value]]:
    """All steps of all layers: the last layer's states, and every layer's last states as PyTorch returns them."""
    each, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    if len(params) != num_layers * directions * each:
        raise UnsupportedLayer("recurrent layers are supported without proj_size")
    x = x if batch_first else r.moved(x, lambda i: i.transpose(0, 1))
    if not r.is_batch_first(x) or len(x.shape) != 2:
        raise UnsupportedLayer("recurrent layers are supported for samples of (steps, features)")
    steps = x.shape[0]
    lasts: list[State] = []
    for first in range(0, num_layers * directions, directions):
        x, ways = r.formatted(x), []
        for n in range(first, first + directions):
            weights = [require_constant(p, "weight") for p in params[n * each : (n + 1) * each]]
            bias, hidden_bias = weights[2:] if has_biases else (None, None)
            state = tuple(_initial(r, x, _picked(r, s, 0, n)) for s in states)
            made = linear_layer(r, x, weights[0], bias, (steps, len(weights[0])), "input")
            backwards, found = n > first, {}
            for t in reversed(range(steps)) if backwards else range(steps):
                state = step(r, _picked(r, made, 1, t), state, weights[1], hidden_bias)
                found[t] = state[0]
            ways.append(stack(r, [found[t] for t in range(steps)], 1))
            lasts.append(state)
        x = ways[0] if len(ways) == 1 else cat(r, ways, -1)
    out = x if batch_first else r.moved(x, lambda i: i.transpose(0, 1))
    return out, [stack(r, of_layers, 0) for of_layers in zip(*lasts, strict=True)]


def _recurrent(names: Sequence[str], cell: str, step: Step) -> None:
    """Register a recurrent layer and its cell."""

    def layer(
        r: Reader,
        x: Any = None,
        hx: Any = None,
        params: Sequence[Any] = (),
        has_biases: bool = True,
        num_layers: int = 1,
        dropout: float = 0.0,
        train: bool = False,
        bidirectional: bool = False,
        batch_first: bool = False,
        batch_sizes: Any = None,
    ) -> Any:
        if batch_sizes is not None:
            raise UnsupportedLayer("packed sequences have any number of steps; give all of them the same")
        if train and dropout:
            raise UnsupportedLayer("drops values in evaluation too; call eval() or leave dropout out")
        states = hx if isinstance(hx, (list, tuple)) else [hx]
        out, lasts = _unrolled(r, step, x, states, params, has_biases, num_layers, bidirectional, batch_first)
        return out, *lasts

    def one_step(r: Reader, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        x = r.formatted(x)
        bias, hidden_bias = (b if b is None else require_constant(b, "bias") for b in (b_ih, b_hh))
        state = tuple(_initial(r, x, s) for s in (hx if isinstance(hx, (list, tuple)) else [hx]))
        made = linear_layer(r, x, require_constant(w_ih, "weight"), bias, (len(w_ih),), "input")
        found = step(r, made, state, require_constant(w_hh, "weight"), hidden_bias)
        return found if len(found) > 1 else found[0]

    entry(
        *names, about="unrolled: every step a layer of the same weights; one direction or both, all steps or the last"
    )(layer)
    entry(cell, about="one step of its layer")(one_step)


_recurrent(["gru"], "gru_cell", _gru_step)
_recurrent(["lstm"], "lstm_cell", _lstm_step)
_recurrent(["rnn_tanh"], "rnn_tanh_cell", _rnn_step("tanh"))
_recurrent(["rnn_relu"], "rnn_relu_cell", _rnn_step("relu"))
