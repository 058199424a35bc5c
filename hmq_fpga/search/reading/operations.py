"""Entries of the operation table for layers, arithmetic, functions, windows and sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.graph import Statistics
from hmq_fpga.search.layers import (
    Activation,
    Add,
    AvgPool,
    Bilinear,
    Concat,
    Function,
    Maximum,
    MaxPool,
    Minimum,
    Multiply,
    Pad,
    Subtract,
    Upsample,
    UserTable,
)
from hmq_fpga.search.reading.reader import Reader, Value, require_constant
from hmq_fpga.search.reading.table import entry, refused

MOVES = frozenset(
    [
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as"),
        *("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "matrix_H"),
        *("slice", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk"),
        *("unsafe_split", "unsafe_split_with_sizes", "index_select", "index", "gather", "take_along_dim", "diagonal"),
        *("expand", "expand_as", "repeat", "repeat_interleave", "tile", "flip", "fliplr", "flipud", "roll", "rot90"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold", "im2col"),
        *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
        *("hsplit", "vsplit", "atleast_1d", "atleast_2d", "atleast_3d"),
    ]
)


# --- nothing to do in evaluation -------------------------------------------------------------------------------------


@entry("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", about="left out, in evaluation")
def _dropout(r: Reader, x: Value, train: bool, p: float) -> Value:  # noqa: ARG001
    if train:
        raise UnsupportedLayer("acts in evaluation too; give it training=self.training")
    return r.nothing(x)


@entry("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "identity", "resolve_conj", about="left out")
def _same(r: Reader, x: Value, memory_format: Any = None) -> Value:  # noqa: ARG001
    return r.nothing(x)


@entry("to", "_to_copy", "type_as", "float", "double", "half", about="left out between float types")
def _converted(r: Reader, x: Value, dtype: torch.dtype | None = None, other: Any = None, **_ignored: Any) -> Value:  # noqa: ARG001
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedLayer(f"makes {str(dtype).removeprefix('torch.')} of its values; hardware rounds by itself")
    return x


# --- layers with weights ---------------------------------------------------------------------------------------------


def linear_layer(
    r: Reader, x: Value, weight: Tensor, bias: Tensor | None, shape: Shape | None = None, name: str = ""
) -> Value:
    """`x @ weight.T + bias` over the last dimension."""
    outputs, inputs = weight.shape
    if not weight.numel():
        raise UnsupportedLayer("makes no values: one of its sizes is zero")
    layer = nn.Linear(inputs, outputs, device="meta")
    _own(r, layer, weight, bias)
    return r.layer(layer, x, shape=shape, name=name)


def _own(r: Reader, layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = r.parameter(weight)
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    layer.bias = nn.Parameter(torch.zeros(outputs)) if bias is None else r.parameter(bias)


@entry(about="a dense layer over the last dimension, with a learned weight format and exact accumulators")
def _linear(r: Reader, x: Value, weight: Any, bias: Any = None) -> Value:
    bias = bias if bias is None else require_constant(bias, "bias")
    return linear_layer(r, x, require_constant(weight, "weight"), bias)


@entry(
    *("matmul", "mm", "bmm", "mv"),
    about="a dense layer, where one of the two is a constant matrix; else exact products and their exact sums",
)
def _matmul(r: Reader, x: Any, other: Any = None, mat2: Any = None, vec: Any = None) -> Value:
    other = next(v for v in (other, mat2, vec) if v is not None)
    if not isinstance(x, Value):  # constant @ value: over the last dimension but one
        constant, value = _matrix(require_constant(x, "matrix")), other
        if constant.ndim != 2 or len(r.full_shape(value)) < 2:
            raise UnsupportedLayer("multiplies by a constant of more than two dimensions")
        turned = r.moved(value, lambda i: i.transpose(-1, -2))
        made = linear_layer(r, turned, constant, None, (*turned.shape[:-1], len(constant)))
        return r.moved(made, lambda i: i.transpose(-1, -2))  # type: ignore[no-any-return]
    if isinstance(other, Value):
        return product_of_matrices(r, x, other)
    other = _matrix(other)
    if other.ndim == 1:
        made = linear_layer(r, x, other[None], None, (*x.shape[:-1], 1))
        return r.reshaped(made, r.shape)
    if other.ndim != 2:
        raise UnsupportedLayer("multiplies by a constant of more than two dimensions")
    return linear_layer(r, x, _turned(r, other), None)


def _matrix(constant: Tensor) -> Tensor:
    """Without dimensions of one before it."""
    return constant if constant.ndim < 3 or math.prod(constant.shape[:-2]) > 1 else constant.flatten(0, -2)


def _turned(r: Reader, matrix: Tensor) -> Tensor:
    """The same transposed tensor for the same matrix, so that what is shared stays shared."""
    return r.derived(matrix, "T", lambda: matrix.T.contiguous())


@entry(about="a dense layer, of a constant matrix")
def _addmm(r: Reader, x: Any, mat1: Any, mat2: Any) -> Value:
    if isinstance(mat1, Value) and not isinstance(mat2, Value) and not isinstance(x, Value):
        return linear_layer(r, mat1, _turned(r, mat2), x.expand(mat2.shape[1]))
    raise UnsupportedLayer("is supported as constant + value @ constant")


def product_of_matrices(r: Reader, x: Value, other: Value) -> Value:
    """`x @ other` of two values, `(…, n, k)` and `(…, k, m)`."""
    dims = len(r.full_shape(x))
    if dims != len(r.full_shape(other)) or dims < 3:
        raise UnsupportedLayer("multiplies matrices of two values: give both the same three or more dimensions")
    lead = torch.broadcast_shapes(r.full_shape(x)[:-2], r.full_shape(other)[:-2])
    both = [r.moved(v, lambda i: i.expand(*lead, *i.shape[-2:])) for v in (x, other)]
    (first, second), back, _ = r.turned(*both)
    labels = "abcdefgh"[: len(r.full_shape(first)) - 2]
    made = contracted(r, first, second, f"{labels}xy", f"{labels}yz", f"{labels}xz")
    return r.moved(made, back) if back else made


def contracted(r: Reader, x: Value, other: Value, ours: str, theirs: str, made: str) -> Value:
    """Products of two values, exactly, summed over the dimensions that the result has not; all by their letters.

    The batch is the first dimension of each.
    """
    if len({ours[0], theirs[0], made[0]}) > 1 or not r.is_batch_first(x) or not r.is_batch_first(other):
        raise UnsupportedLayer("multiplies and sums over the batch; keep it as the first dimension of all")
    sizes = dict(zip(ours + theirs, r.full_shape(x) + r.full_shape(other), strict=True))
    summed = [c for c in dict.fromkeys(ours + theirs) if c not in made]
    kept, values = math.prod(sizes[c] for c in made[1:]), math.prod(sizes[c] for c in summed)
    order = [*made, *summed]

    def spread(i: Tensor, letters: str) -> Tensor:
        i = i.permute([letters.index(c) for c in order if c in letters])
        for axis, c in enumerate(order):
            i = i if c in letters else i.unsqueeze(axis)
        return i.expand([sizes[c] for c in order]).reshape(len(i), kept, values)

    first, second = r.moved(x, lambda i: spread(i, ours)), r.moved(other, lambda i: spread(i, theirs))
    products = r.layer(Multiply(), first, second, shape=(kept, values), name="products")
    sums = r.layer(sum_of((values,)), products, shape=(kept, 1), name="sums") if values > 1 else products
    return r.reshaped(sums, tuple(sizes[c] for c in made[1:]))


@entry(about="a dense layer: of a value and a constant, summed over what both share; of two values as `matmul`")
def _einsum(r: Reader, equation: str, tensors: Sequence[Any]) -> Value:
    read, _, made = equation.replace(" ", "").partition("->")
    terms = read.split(",")
    values = [i for i, tensor in enumerate(tensors) if isinstance(tensor, Value)]
    if "." in equation or not made or len(terms) != 2 or any(len(set(c)) < len(c) for c in (*terms, made)):
        raise UnsupportedLayer(f"einsum {equation!r}: two tensors are supported, each dimension with a letter")
    if len(values) == 2:
        return contracted(r, tensors[0], tensors[1], terms[0], terms[1], made)
    x, constant = tensors[values[0]], require_constant(tensors[1 - values[0]], "second tensor")
    ours, theirs = terms[values[0]], terms[1 - values[0]]
    summed = [c for c in theirs if c in ours]
    kept, new = [c for c in ours if c not in summed], [c for c in theirs if c not in ours]
    if set(summed) & set(made) or set(made) != {*kept, *new} or made[0] != ours[0]:
        raise UnsupportedLayer(f"einsum {equation!r}: sums over what both tensors share are supported, the batch first")
    x = r.moved(x, lambda i: i.permute([ours.index(c) for c in (*kept, *summed)]).flatten(len(kept)))
    matrix = constant.permute([theirs.index(c) for c in (*new, *summed)])
    matrix = matrix.reshape(math.prod(matrix.shape[: len(new)]), -1)
    sizes = [n for c, n in zip(theirs, constant.shape, strict=True) if c in new]
    y = linear_layer(r, x, matrix, None, (*x.shape[:-1], len(matrix)))
    order = [*kept, *new]
    return r.moved(  # type: ignore[no-any-return]
        y, lambda i: i.reshape([*i.shape[:-1], *sizes]).permute([order.index(c) for c in made])
    )


@entry(about="exact products of two values, and a dense layer over them")
def _bilinear(r: Reader, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Value:
    if not (isinstance(input1, Value) and isinstance(input2, Value)):
        raise UnsupportedLayer("is supported where both tensors depend on the input")
    weight = require_constant(weight, "weight")
    outputs, n, m = weight.shape
    first = r.moved(input1, lambda i: i.unsqueeze(-1).expand(*i.shape, m).flatten(-2))
    second = r.moved(input2, lambda i: i.unsqueeze(-2).expand(*i.shape[:-1], n, i.shape[-1]).flatten(-2))
    product = r.layer(Multiply(), first, second, shape=(*input1.shape[:-1], n * m), name="product")
    return linear_layer(r, product, weight.reshape(outputs, -1), bias)


@entry("conv1d", "conv2d", about="a convolution; any stride, zero padding, dilation and groups, depthwise ones as such")
def _conv(r: Reader, x: Value, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Value:
    weight = require_constant(weight, "weight")
    dims = weight.ndim - 2
    if len(x.shape) != dims + 1:
        raise UnsupportedLayer(
            f"reads {x.shape} and takes (channels, {', '.join(('length',) if dims == 1 else ('height', 'width'))})"
        )
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    padding = padding if isinstance(padding, str) else _each(padding, dims)
    windows: dict[str, Any] = {"stride": _each(stride, dims), "padding": padding, "dilation": _each(dilation, dims)}
    layer = kind(
        weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), groups=groups, device="meta", **windows
    )
    _own(r, layer, weight, bias if bias is None else require_constant(bias, "bias"))
    return r.layer(layer, x)


@entry(
    "conv_transpose1d",
    "conv_transpose2d",
    about="a convolution with zeros between the values that it reads; all settings",
)
def _conv_transpose(
    r: Reader,
    x: Value,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Value:
    weight = require_constant(weight, "weight")
    dims = weight.ndim - 2
    kind = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose2d
    windows = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    each: dict[str, Any] = {name: _each(value, dims) for name, value in windows.items()}
    channels, outputs = len(weight), weight.shape[1] * groups
    layer = kind(channels, outputs, tuple(weight.shape[2:]), groups=groups, device="meta", **each)
    _own(r, layer, weight, bias if bias is None else require_constant(bias, "bias"))
    return r.layer(layer, x)


# --- constants -------------------------------------------------------------------------------------------------------


@entry(
    "batch_norm",
    about="folded into the layer before or after where that is exact, else a scale and an exact shift per channel",
)
def batch_norm(
    r: Reader,
    x: Value,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,  # noqa: ARG001
    eps: float,
) -> Value:
    """What is known of the training set takes the place of a sample's own statistics."""
    if training or running_mean is None:
        raise UnsupportedLayer("BatchNorm needs track_running_stats=True")
    scale = torch.rsqrt(running_var + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - running_mean * scale
    return r.normalized(x, scale, shift, Statistics(running_mean, running_var.sqrt()))


def scaled(r: Reader, x: Value, scale: Any, shift: Any) -> Value:
    """`x * scale + shift` for constants that fit its shape or widen it."""
    scale, shift = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.float64) for c in (scale, shift)))
    full = torch.broadcast_shapes(r.full_shape(x), scale.shape)
    if full != r.full_shape(x):
        x = r.moved(x, lambda i: i.expand(full))
    scale, shift = (c.reshape(*(1,) * (len(full) - c.ndim), *c.shape) for c in (scale, shift))
    if batch := r.batch_axis(x):
        first = r.moved(x, lambda i: i.movedim(batch, 0))
        made = scaled(r, first, scale.movedim(batch, 0), shift.movedim(batch, 0))
        return r.moved(made, lambda i: i.movedim(0, batch))  # type: ignore[no-any-return]
    scale, shift = _of_sample(scale), _of_sample(shift)
    if not (torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise UnsupportedLayer("by a constant that is not finite")
    scale, shift = torch.broadcast_tensors(scale[0], shift[0])
    sample = full[1:] or (1,)
    scale, shift = (c if c.ndim else c[None] for c in (scale, shift))
    along = [axis for axis, n in enumerate(scale.shape) if n > 1]
    if len(along) > 1:
        return r.affine(x, scale.expand(sample).flatten(), shift.expand(sample).flatten(), None)
    axis = along[0] if along else 0
    scale, shift = (c.flatten().expand(sample[axis]).clone() for c in (scale, shift))
    return r.affine(x, scale, shift, axis)


def _of_sample(constant: Tensor) -> Tensor:
    """What a constant holds for each sample, with a batch of one."""
    if len(constant) > 1 and not torch.equal(constant, constant[:1].expand_as(constant)):
        raise UnsupportedLayer("a constant with a value for each sample of a batch")
    return constant[:1]


def _merged(r: Reader, layer: nn.Module, x: Value, other: Value) -> Value:
    """Two values, the smaller one repeated."""
    full = torch.broadcast_shapes(r.full_shape(x), r.full_shape(other))
    both = [v if r.full_shape(v) == full else r.moved(v, lambda i: i.expand(full)) for v in (x, other)]
    return r.layer(layer, *both)


@entry(about="an exact sum; of a constant: folded as a BatchNorm is")
def _add(r: Reader, x: Any, other: Any, alpha: Any = 1) -> Value:
    if isinstance(x, Value) and isinstance(other, Value):
        if alpha != 1:
            other = scaled(r, other, alpha, 0)
        return _merged(r, Add(), x, other)
    return scaled(r, x, 1, alpha * other) if isinstance(x, Value) else scaled(r, other, alpha, x)


@entry("sub", "subtract", about="an exact difference; of a constant: folded as a BatchNorm is")
def _sub(r: Reader, x: Any, other: Any, alpha: Any = 1) -> Value:
    if isinstance(x, Value) and isinstance(other, Value):
        if alpha != 1:
            other = scaled(r, other, alpha, 0)
        return _merged(r, Subtract(), x, other)
    return scaled(r, x, 1, -alpha * other) if isinstance(x, Value) else scaled(r, other, -alpha, x)


@entry(about="an exact difference; of a constant: folded as a BatchNorm is")
def _rsub(r: Reader, x: Any, other: Any, alpha: Any = 1) -> Value:
    return _sub(r, other, x, alpha)  # type: ignore[no-any-return]


@entry("mul", "multiply", about="an exact product; of a constant: folded as a BatchNorm is")
def _mul(r: Reader, x: Any, other: Any) -> Value:
    if isinstance(x, Value) and isinstance(other, Value):
        return _merged(r, Multiply(), x, other)
    return scaled(r, x, other, 0) if isinstance(x, Value) else scaled(r, other, x, 0)


@entry(
    *("div", "divide", "true_divide"),
    about=(
        "by a constant: folded as a BatchNorm is; by a value: an exact product with a table of its reciprocal, or one "
        "table where both depend on one value alone"
    ),
)
def _div(r: Reader, x: Any, other: Any, rounding_mode: Any = None) -> Value:
    if rounding_mode is not None:
        raise UnsupportedLayer("rounds a value that depends on the input; hardware rounds by itself")
    if not isinstance(other, Value):
        return scaled(r, x, 1 / torch.as_tensor(other, dtype=torch.float64), 0)
    if alone := r.of_one_value():
        return alone
    inverse = r.layer(Function("reciprocal", torch.reciprocal), other, shape=other.shape, name="reciprocal")
    return _mul(r, x, inverse)  # type: ignore[no-any-return]


@entry("neg", "negative", about="folded as a BatchNorm is")
def _neg(r: Reader, x: Value) -> Value:
    return scaled(r, x, -1, 0)


@entry("square", about="an exact product of the value with itself")
def _square(r: Reader, x: Value) -> Value:
    return r.layer(Multiply(), x, x)


@entry("pow", about="to a constant: 2 is an exact product, others are a table")
def _pow(r: Reader, x: Any, exponent: Any) -> Value:
    if not isinstance(x, Value) or isinstance(exponent, Value):
        raise UnsupportedLayer("is supported for a constant exponent")
    exponent = float(exponent)
    if exponent == 1:
        return x
    return (
        _square(r, x) if exponent == 2 else r.layer(Function("pow", functools.partial(torch.pow, exponent=exponent)), x)
    )


# --- several values --------------------------------------------------------------------------------------------------


@entry("maximum", "max", about="exact, of two values or over dimensions; of a constant: as `clamp`")
def _maximum(r: Reader, x: Any, other: Any = None, dim: Any = None, keepdim: bool = False) -> Any:
    if other is None:
        return (reduced(r, x, dim, keepdim, largest), None)
    if isinstance(x, Value) and isinstance(other, Value):
        return _merged(r, Maximum(), x, other)
    return _clamp(r, x, min=_scalar(other)) if isinstance(x, Value) else _clamp(r, other, min=_scalar(x))


@entry("minimum", "min", about="exact, of two values or over dimensions; of a constant: as `clamp`")
def _minimum(r: Reader, x: Any, other: Any = None, dim: Any = None, keepdim: bool = False) -> Any:
    if other is None:
        return (_amin(r, x, dim, keepdim), None)
    if isinstance(x, Value) and isinstance(other, Value):
        return _merged(r, Minimum(), x, other)
    return _clamp(r, x, max=_scalar(other)) if isinstance(x, Value) else _clamp(r, other, max=_scalar(x))


@entry(about="a sum with a constant share of the difference")
def _lerp(r: Reader, x: Any, end: Any, weight: Any) -> Value:
    weight = require_constant(weight, "weight")
    return _add(r, _mul(r, x, 1 - weight), _mul(r, end, weight))  # type: ignore[no-any-return]


@entry(
    about=(
        "of one value alone, as in `torch.where(x > 0, x, 0.1 * x)`: a table; where a function of one value decides: "
        "exact products with a table of 0 and 1; by a constant: a scale and a shift, folded as a BatchNorm is"
    )
)
def _where(r: Reader, condition: Any, x: Any, other: Any) -> Value:
    if isinstance(condition, Value):  # other + condition * (x - other)
        if not isinstance(x, Value) and not isinstance(other, Value):
            return scaled(r, condition, x - other, other)
        return _add(r, other, _mul(r, condition, _sub(r, x, other)))  # type: ignore[no-any-return]
    chosen = condition.double()
    if isinstance(x, Value) and isinstance(other, Value):
        return _add(r, _mul(r, x, chosen), _mul(r, other, 1 - chosen))  # type: ignore[no-any-return]
    if isinstance(x, Value):
        return scaled(r, x, chosen, torch.where(condition, 0.0, other))
    return scaled(r, other, 1 - chosen, torch.where(condition, x, 0.0))


@entry(about="as `where`")
def _masked_fill(r: Reader, x: Any, mask: Any, value: Any) -> Value:
    return _where(r, mask, value, x)  # type: ignore[no-any-return]


@entry("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", about="a constant")
def _constant(r: Reader, x: Value, **_settings: Any) -> Tensor:  # noqa: ARG001
    return r.of_shape()


def _scalar(constant: Any) -> float:
    values = torch.as_tensor(constant, dtype=torch.float64).flatten()
    if len(set(values.tolist())) != 1:
        raise UnsupportedLayer("by constants that differ is not supported; use one number")
    return float(values[0])


@entry(
    "cat",
    "concat",
    "concatenate",
    about="of any number of values, along any dimension, on the finest of their grids; constants are a shift of zeros",
)
def cat(r: Reader, tensors: Sequence[Any], dim: int = 0) -> Value:
    """Values side by side along a dimension of the whole batch."""
    tensors = [v for v in tensors if not (isinstance(v, Tensor) and not v.numel())]
    values = [v for v in tensors if isinstance(v, Value)]
    axis = dim % len(r.full_shape(values[0]))
    if axis == 0:
        raise UnsupportedLayer("joins along the batch")
    shape = _without(r.full_shape(values[0]), (), False)
    sizes = [r.full_shape(v)[axis] for v in values]
    joined = (*shape[: axis - 1], sum(sizes), *shape[axis:])
    made = values[0] if len(values) == 1 else r.layer(Concat(axis - 1), *values, shape=joined)
    if len(values) == len(tensors):
        return made
    constants = [v if isinstance(v, Value) else _of_sample(v).double() for v in tensors]

    def among(parts: Sequence[Tensor]) -> Tensor:
        """Each of the values' parts in its place among zeros."""
        rest = iter(parts)
        batch = len(parts[0])
        return torch.cat(
            [
                next(rest) if isinstance(v, Value) else torch.zeros_like(v).expand(batch, *v.shape[1:])
                for v in constants
            ],
            axis,
        )

    placed = r.moved(made, lambda i: among(i.split(sizes, axis)))
    nothing = [torch.zeros(1, *r.full_shape(v)[1:], dtype=torch.float64) for v in values]
    shifts = [nothing.pop(0) if isinstance(v, Value) else v for v in constants]
    return scaled(r, placed, 1, torch.cat(shifts, axis)) if any(map(torch.any, shifts)) else placed


@entry(about="as `cat`")
def stack(r: Reader, tensors: Sequence[Any], dim: int = 0) -> Value:
    """Values side by side along a new dimension."""
    dims = len(next(r.full_shape(v) for v in tensors if isinstance(v, Value)))
    dim = dim % (dims + 1)
    along = dim or 1  # before the batch: behind it, and then the two change places
    parts = [r.moved(v, lambda i: i.unsqueeze(along)) if isinstance(v, Value) else v.unsqueeze(along) for v in tensors]
    made = cat(r, parts, along)
    return made if dim else r.moved(made, lambda i: i.transpose(0, 1))  # type: ignore[no-any-return]


# --- truth values ----------------------------------------------------------------------------------------------------


_COMPARISONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    **dict.fromkeys(["gt", "greater"], torch.gt),
    **dict.fromkeys(["lt", "less"], torch.lt),
    **dict.fromkeys(["ge", "greater_equal"], torch.ge),
    **dict.fromkeys(["le", "less_equal"], torch.le),
    "eq": torch.eq,
    **dict.fromkeys(["ne", "not_equal"], torch.ne),
}


@entry(
    *_COMPARISONS, about="a table of 0 and 1, of the exact difference; of one value alone, one table with what reads it"
)
def _compared(r: Reader, x: Any, other: Any) -> Value:
    if len(r.pointwise.chain(r.node)) > 1:
        raise UnsupportedLayer("is true or false; make a number of it, as by .float() or torch.where")
    difference, (name, _) = _sub(r, x, other), r.function()
    truth = functools.partial(_truth, compare=_COMPARISONS[name])
    return r.layer(Function(name, truth), difference, shape=difference.shape)


def _truth(x: Tensor, compare: Callable[[Tensor, float], Tensor]) -> Tensor:
    return compare(x, 0).to(x.dtype)


@entry("logical_and", "bitwise_and", "__and__", about="a product of 0 and 1")
def _and(r: Reader, x: Value, other: Value) -> Value:
    return _mul(r, x, other)  # type: ignore[no-any-return]


@entry("logical_or", "bitwise_or", "__or__", about="the larger one of 0 and 1")
def _or(r: Reader, x: Value, other: Value) -> Value:
    return _maximum(r, x, other)  # type: ignore[no-any-return]


@entry(about="the largest of 0 and 1, over any dimensions but the batch's")
def _any(r: Reader, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(r, x, dim, keepdim, largest)


@entry(about="the smallest of 0 and 1, over any dimensions but the batch's")
def _all(r: Reader, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _amin(r, x, dim, keepdim)  # type: ignore[no-any-return]


@entry("logical_not", "bitwise_not", about="1 less 0 or 1")
def _not(r: Reader, x: Value) -> Value:
    return scaled(r, x, -1, 1)


# --- functions of one value ------------------------------------------------------------------------------------------


@entry(about="the learned format, which is unsigned")
def _relu(r: Reader, x: Value) -> Value:
    return r.layer(Activation(relu=True), x)


@entry(
    "clamp",
    "clip",
    about=(
        "from 0 or -c to c the saturation of the format: where c is no power of two, the weights before "
        "and after it are scaled so that it becomes one (where they cannot be, it clips at the next "
        "power of two, and the notes say so); others are a table"
    ),
)
def _clamp(r: Reader, x: Value, min: Any = None, max: Any = None) -> Value:
    low = None if min is None else _scalar(min)
    high = None if max is None else _scalar(max)
    if (low, high) == (0, None):
        return r.layer(Activation(relu=True), x)
    if high is not None and high > 0 and low in (0, -high):
        return r.layer(Clip(relu=low == 0, high=high), x)
    return r.layer(Function("clamp", functools.partial(torch.clamp, min=low, max=high)), x)


class Clip(nn.Module):
    """Clips to 0 … high or -high … high, until `simplify` makes it an `Activation`, whose limit is a power of two."""

    def __init__(self, *, relu: bool, high: float) -> None:
        super().__init__()
        self.relu, self.high = relu, high


@entry("clamp_min", about="as `clamp`")
def _clamp_min(r: Reader, x: Value, min: Any) -> Value:
    return _clamp(r, x, min=min)  # type: ignore[no-any-return]


@entry("clamp_max", about="as `clamp`")
def _clamp_max(r: Reader, x: Value, max: Any) -> Value:
    return _clamp(r, x, max=max)  # type: ignore[no-any-return]


@entry("hardtanh", about="as `clamp`")
def _hardtanh(r: Reader, x: Value, min_val: float = -1.0, max_val: float = 1.0) -> Value:
    return _clamp(r, x, min=min_val, max=max_val)  # type: ignore[no-any-return]


@entry(about="as `clamp`")
def _relu6(r: Reader, x: Value) -> Value:
    return _clamp(r, x, min=0.0, max=6.0)  # type: ignore[no-any-return]


@entry("leaky_relu", about="exact for a slope 2^-k, else a table")
def _leaky(r: Reader, x: Value, negative_slope: float = 0.01) -> Value:
    mantissa, exponent = math.frexp(negative_slope)
    if mantissa == 0.5 and -15 <= exponent <= 1:
        return r.layer(nn.LeakyReLU(negative_slope), x)
    leaky = functools.partial(nn.functional.leaky_relu, negative_slope=negative_slope)
    return r.layer(Function("leaky_relu", leaky), x)


@entry(about="as `leaky_relu`; with slopes per channel a scale of the negative part, added to the positive one")
def _prelu(r: Reader, x: Value, weight: Any) -> Value:
    slopes = require_constant(weight, "weight").flatten()
    r.draft.notes.append(f"{r.label.path}: its slopes stay as they are, search and fine-tuning do not change them")
    if len(set(slopes.tolist())) == 1:
        return _leaky(r, x, float(slopes[0]))  # type: ignore[no-any-return]
    positive = r.layer(Activation(relu=True), x)
    negative = r.layer(Function("negative_part", functools.partial(torch.clamp, max=0.0)), x, name="negative")
    return r.layer(Add(), positive, r.affine(negative, slopes, torch.zeros_like(slopes), 0), name="sum")


_FUNCTIONS = (
    *("tanh", "sigmoid", "gelu", "silu", "elu", "selu", "celu", "softplus", "mish", "hardsigmoid", "hardswish"),
    *("log_sigmoid", "hardshrink", "softshrink", "tanhshrink", "threshold", "abs", "absolute", "exp", "expm1", "erf"),
    *("sin", "cos", "atan", "sinh", "cosh", "sign", "sqrt", "log1p", "log", "rsqrt", "reciprocal", "rrelu"),
)
_FINAL = ("sigmoid", "tanh", "log_sigmoid")


@entry(
    *_FUNCTIONS,
    about=(
        "a table from each code of a value of at most 12 bits to a code of the learned format; a final "
        "sigmoid or tanh is left out, unless it is to be kept"
    ),
)
def _function(r: Reader, x: Value, **_numbers: Any) -> Any:
    """Any function of one value: its other arguments are numbers."""
    name, function = r.function()
    if r.is_last and name in _FINAL and not r.keep_final:
        return r.final(x, function)
    return r.layer(Function(name, function), x)


@entry("table", about="`hmq_fpga.table(function)`, any function of one value: a table of it")
def _table(r: Reader, x: Value) -> Value:
    module = r.module()
    assert isinstance(module, UserTable)
    return r.layer(Function(module.name, module.function), x)


# --- windows and sums ------------------------------------------------------------------------------------------------


@entry("max_pool1d", "max_pool2d", about="exact, with padding and ceil_mode")
def _max_pool(
    r: Reader,
    x: Value,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,  # noqa: ARG001
) -> Value:
    dims = len(x.shape) - 1
    window, steps, pads = _windows(dims, kernel_size, stride, padding)
    if set(_each(dilation, dims)) != {1}:
        raise UnsupportedLayer("max pooling is supported with dilation=1")
    sides = tuple(
        (p, max((made - 1) * s + k - n - p, 0))
        for n, made, k, s, p in zip(x.shape[1:], r.shape[1:], window, steps, pads, strict=True)
    )
    return r.layer(MaxPool(window, steps, sides), x)


@entry("max_pool1d_with_indices", "max_pool2d_with_indices", about="exact, without the indices")
def _max_pool_with_indices(
    r: Reader, x: Value, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    _no_indices(r)
    return (_max_pool(r, x, kernel_size, stride, padding, dilation, ceil_mode), None)


def _no_indices(r: Reader) -> None:
    if any(user.args[1:2] == (1,) and user.users for user in r.node.users):
        raise UnsupportedLayer("max pooling is supported with return_indices=False")


@entry(
    "avg_pool1d",
    "avg_pool2d",
    about=(
        "exact sums; where a window does not hold a power of two of values, the nearest weights take the rest of the "
        "divisor; where padding is not counted, a scale for each place"
    ),
)
def _avg_pool(
    r: Reader,
    x: Value,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: Any = None,
) -> Value:
    dims = len(x.shape) - 1
    window, steps, pads = _windows(dims, kernel_size, stride, padding)
    sizes = zip(x.shape[1:], r.shape[1:], window, steps, pads, strict=True)
    if ceil_mode and any((made - 1) * s + k > n + 2 * p for n, made, k, s, p in sizes):
        raise UnsupportedLayer(
            "average pooling whose windows reach beyond the edge is not supported; use ceil_mode=False"
        )
    divisor = divisor_override
    if any(pads) and not count_include_pad and not divisor:
        divisor = _counted(x.shape[1:], window, steps, pads)
    if any(pads):
        grown = tuple(n + 2 * p for n, p in zip(x.shape[1:], pads, strict=True))
        x = r.layer(Pad(tuple((p, p) for p in pads)), x, shape=(x.shape[0], *grown), name="padding")
    if divisor is None:
        return r.layer(AvgPool(window, steps), x)
    return scaled(r, r.layer(AvgPool(window, steps, 1), x), 1 / divisor, 0)


def _counted(size: Shape, window: Shape, steps: Shape, pads: Shape) -> Tensor:
    """How many values of an image each window covers, padding left out."""
    ones = nn.functional.pad(torch.ones(1, 1, *size), [p for p in reversed(pads) for _ in range(2)])
    sums: Tensor = AvgPool(window, steps, 1)(ones)[0]
    return sums


@entry("adaptive_avg_pool1d", "adaptive_avg_pool2d", about="as `avg_pool2d`, to sizes that divide")
def _adaptive_avg_pool(r: Reader, x: Value, output_size: Any) -> Value:  # noqa: ARG001
    window = _adaptive_window(x.shape, r.shape)
    return r.layer(AvgPool(window, window), x)


@entry("adaptive_max_pool1d", "adaptive_max_pool2d", about="exact, to sizes that divide")
def _adaptive_max_pool(r: Reader, x: Value, output_size: Any) -> Any:
    _no_indices(r)
    made = (x.shape[0], *_each(output_size, len(x.shape) - 1))
    window = _adaptive_window(x.shape, made)
    return (r.layer(MaxPool(window, window, ((0, 0),) * len(window)), x, shape=made), None)


def _adaptive_window(source: Shape, made: Shape) -> Shape:
    before, after = source[1:], made[1:]
    if any(n % m for n, m in zip(before, after, strict=True)):
        raise UnsupportedLayer(f"adaptive pooling of {before} to {after} has windows of unequal size")
    return tuple(n // m for n, m in zip(before, after, strict=True))


def _windows(dims: int, kernel_size: Any, stride: Any, padding: Any) -> tuple[Shape, Shape, Shape]:
    window = _each(kernel_size, dims)
    return window, _each(stride, dims) if stride else window, _each(padding, dims)


def largest(window: Shape) -> nn.Module:
    """For `reduced`."""
    return MaxPool(window, window, ((0, 0),) * len(window))


def mean_of(window: Shape) -> nn.Module:
    """For `reduced`."""
    return AvgPool(window, window)


def sum_of(window: Shape) -> nn.Module:
    """For `reduced`."""
    return AvgPool(window, window, 1)


def reduced(r: Reader, x: Value, dim: Any, keepdim: bool, pool: Callable[[Shape], nn.Module], name: str = "") -> Value:
    """One value for all along dimensions: a window over them."""
    full, batch = r.full_shape(x), r.batch_axis(x) or 0
    dims = sorted(d % len(full) for d in ((dim,) if isinstance(dim, int) else dim or range(len(full))))
    if batch in dims:
        raise UnsupportedLayer("is taken over the batch; name the other dimensions")
    if batch:
        first = r.moved(x, lambda i: i.movedim(batch, 0))
        made = reduced(r, first, [d + (d < batch) for d in dims], keepdim, pool, name)
        back = batch - (0 if keepdim else sum(d < batch for d in dims))
        return r.moved(made, lambda i: i.movedim(0, back))  # type: ignore[no-any-return]
    kept_shape = _without(full, dims, keepdim)
    if dims == list(range(2, len(full))) and len(full) in (3, 4):
        window, kept = full[2:], full[1]
        pooled = r.layer(pool(window), x, shape=(kept, *(1 for _ in window)), name=name)
    else:
        rest = [d for d in range(1, len(full)) if d not in dims]
        kept, values = math.prod(full[d] for d in rest), math.prod(full[d] for d in dims)
        rows = r.moved(x, lambda i: i.permute(0, *rest, *dims).reshape(len(i), kept, values))
        pooled = r.layer(pool((values,)), rows, shape=(kept, 1), name=name)
    return r.reshaped(pooled, kept_shape)


def _without(full: Shape, dims: Sequence[int], keepdim: bool) -> Shape:
    return tuple(1 if d in dims else n for d, n in enumerate(full) if d and (keepdim or d not in dims))


@entry(about="over any dimensions but the batch's, as `avg_pool2d`")
def _mean(r: Reader, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(r, x, dim, keepdim, mean_of)


@entry(about="over any dimensions but the batch's")
def _sum(r: Reader, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(r, x, dim, keepdim, sum_of)


@entry(about="a dense layer of ones and zeros")
def _cumsum(r: Reader, x: Value, dim: int) -> Value:
    last = r.moved(x, lambda i: i.transpose(dim, -1))
    size = last.shape[-1]
    made = linear_layer(r, last, torch.ones(size, size, dtype=torch.float64).tril(), None, last.shape)
    return r.moved(made, lambda i: i.transpose(dim, -1))  # type: ignore[no-any-return]


@entry(about="over any dimensions but the batch's")
def _amax(r: Reader, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(r, x, dim, keepdim, largest)


@entry(about="as the largest of the negative values")
def _amin(r: Reader, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _neg(r, reduced(r, _neg(r, x), dim, keepdim, largest))  # type: ignore[no-any-return]


@entry(about="an exact product with a table")
def _glu(r: Reader, x: Value, dim: int = -1) -> Value:
    value, gate = r.moved(x, lambda i: i.chunk(2, dim))
    return r.layer(Multiply(), value, r.layer(Function("sigmoid", torch.sigmoid), gate, shape=gate.shape, name="gate"))


# --- sizes -----------------------------------------------------------------------------------------------------------


@entry(
    "pad",
    "constant_pad_nd",
    "zero_pad",
    about="of zeros, or of values of the edge; of another number: a shift for each place",
)
def _pad(r: Reader, x: Value, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Value:
    dims, sides = len(x.shape) - 1, list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    if mode == "constant" and value:
        outside = 1 - nn.functional.pad(torch.ones(1, *x.shape, dtype=torch.float64), list(pad))
        return scaled(r, _pad(r, x, pad), 1, outside * value)
    if mode == "constant" and dims in (1, 2) and len(sides) <= dims and min(pad) >= 0:
        return r.layer(Pad((*((0, 0),) * (dims - len(sides)), *sides)), x)
    return r.moved(x, lambda i: nn.functional.pad(i, list(pad), mode))  # type: ignore[no-any-return]


@entry("upsample_nearest1d", "upsample_nearest2d", about="values repeated, by any factor")
def _upsample(r: Reader, x: Value, **_sizes: Any) -> Value:
    before, after = x.shape[1:], r.shape[1:]
    if any(m % n for n, m in zip(before, after, strict=True)):
        return r.moved(x, lambda i: nn.functional.interpolate(i, after, mode="nearest"))  # type: ignore[no-any-return]
    return r.layer(Upsample(tuple(m // n for n, m in zip(before, after, strict=True))), x)


@entry("upsample_linear1d", "upsample_bilinear2d", about="exact, by powers of two with align_corners=False")
def _upsample_linear(r: Reader, x: Value, align_corners: bool, **_sizes: Any) -> Value:
    before, after = x.shape[1:], r.shape[1:]
    factors = [m // n if m % n == 0 else 0 for n, m in zip(before, after, strict=True)]
    if align_corners or any(factor.bit_count() != 1 for factor in factors):
        raise UnsupportedLayer("linear upsampling is supported by powers of two, with align_corners=False")
    return r.layer(Bilinear(tuple(factors)), x)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


# --- what has no exact form ------------------------------------------------------------------------------------------


refused(
    "embedding",
    "embedding_bag",
    reason="looks rows up by a number; give their values as inputs, or one-hot inputs to a Linear",
)
refused(
    "conv3d",
    "conv_transpose3d",
    "max_pool3d",
    "avg_pool3d",
    reason="works on three dimensions; one or two are supported",
)
refused(
    *("fill", "copy", "index_put", "masked_scatter", "slice_scatter", "select_scatter"),
    reason="writes into a tensor; make a new one by torch.cat, torch.where or a product with a mask",
)
