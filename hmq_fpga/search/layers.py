"""The layers of a `QModel` beside those of `torch.nn`.

Tensors are PyTorch's: the batch first, then for images the channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Padding, Shape

_LARGEST = 2.0**15  # stands for infinity in training
_WRAPPERS = ("_orig_mod", "module")  # where torch.compile, and DataParallel and its kin, keep what they wrap


# --- places where hardware rounds ------------------------------------------------------------------------------------


class Activation(nn.Module):
    """A place where hardware rounds and saturates, after a ReLU or by itself.

    Args:
        relu: whether negative values become zero.
        limit_log2: values are clipped to `2**limit_log2`, which no threshold may exceed.
    """

    def __init__(self, *, relu: bool, limit_log2: int | None = None) -> None:
        super().__init__()
        self.relu, self.limit_log2 = relu, limit_log2

    @property
    def signed(self) -> bool:
        """Whether its result can be negative."""
        return not self.relu

    def forward(self, x: Tensor) -> Tensor:
        """Tensor before its quantizer, of any shape."""
        if self.limit_log2 is not None:
            limit = 2.0**self.limit_log2
            return F.hardtanh(x, 0.0, limit) if self.relu else x.clamp(-limit, limit)  # zero has a ReLU's gradient
        return torch.relu(x) if self.relu else x


def _composed(x: Tensor, outer: Callable[[Tensor], Tensor], inner: Callable[[Tensor], Tensor]) -> Tensor:
    return outer(inner(x))


def _slopes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivatives of a function; zero where it has none to tell."""
    x = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            values = function(x)
            return torch.autograd.grad(values.sum(), x)[0] if values.requires_grad else torch.zeros_like(x)
    except RuntimeError:  # computed by something else than PyTorch
        return torch.zeros_like(x)


class Function(nn.Module):
    """A function of one value, in hardware a table from the codes that it reads to those of its own format.

    Args:
        name: of the function, such as `tanh`.
        function: of a tensor, element by element.
    """

    limit_log2 = None

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function
        swept = torch.cat([-torch.logspace(6, -6, 997), torch.zeros(1), torch.logspace(-6, 6, 997)])
        with torch.no_grad():
            values = function(swept)
        self.signed = bool((values < 0).any())
        self._is_finite = bool(values.isfinite().all() and _slopes(function, swept).isfinite().all())

    def of(self, function: Callable[[Tensor], Tensor]) -> Function:
        """The same function of what another one makes."""
        return Function(self.name, functools.partial(_composed, outer=self.function, inner=function))

    def then(self, function: Callable[[Tensor], Tensor]) -> Function:
        """Another function of what this one makes."""
        return Function(self.name, functools.partial(_composed, outer=function, inner=self.function))

    def forward(self, x: Tensor) -> Tensor:
        """Tensor before its quantizer, of any shape; where the function has no value, zero and no gradient."""
        if self._is_finite:
            return self.function(x)
        x = x.clone()  # for a hook on this use alone
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        return self.function(x).nan_to_num(0.0, _LARGEST, -_LARGEST)


@torch.library.custom_op("hmq_fpga::table", mutates_args=())
def _marked(x: Tensor) -> Tensor:
    """Stands for a user's function in an exported program, which `Reader` reads and nothing runs."""
    return x.clone()


@_marked.register_fake
def _of_its_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class UserTable(nn.Module):
    """A function of one value in a user's model; see `table`.

    Attributes:
        is_read: whether an export is to hold one operation in its place.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name, self.is_read = function, name, False

    def forward(self, x: Tensor) -> Tensor:
        """Tensor of any shape."""
        made: Tensor = _marked(x) if self.is_read else self.function(x)
        return made


def table(function: Callable[[Tensor], Tensor], name: str = "") -> nn.Module:
    """A layer for your model that is any function of one value: in hardware a table, whatever the function is made of.

    In training it is the function itself, and its derivative passes the gradient back.

    Args:
        function: of a tensor, element by element, without parameters.
        name: that notes and reports call it; by default the function's own.

    Raises:
        InvalidInput: where it has parameters, or its values are not of its input's shape or depend on their neighbours.
    """
    name = name or getattr(function, "__name__", type(function).__name__).strip("<>")
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        raise InvalidInput(f"table {name!r}: it has parameters, which a table cannot learn; leave them outside")
    x = torch.linspace(-4, 4, 64)
    with torch.no_grad():
        values, turned = function(x), function(x.flip(0).view(8, 8))
    if values.shape != x.shape or not torch.equal(turned.flatten().flip(0).nan_to_num(), values.nan_to_num()):
        raise InvalidInput(f"table {name!r}: it is no function of one value, element by element")
    return UserTable(function, name)


# --- linear layers ---------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """`x * weight + bias` along a dimension of a sample: a BatchNorm or constants that no neighbouring layer can take.

    Args:
        weight, bias: `(values,)`.
        axis: the dimension of a sample that they stand along; None: every value has its own, in order.
    """

    def __init__(self, weight: Tensor, bias: Tensor, axis: int | None = 0) -> None:
        super().__init__()
        self.weight, self.bias, self.axis = nn.Parameter(weight), nn.Parameter(bias), axis


# --- windows ---------------------------------------------------------------------------------------------------------


class MaxPool(nn.Module):
    """Largest value of each window; beyond the edges there is none."""

    def __init__(self, window: Shape, stride: Shape, padding: Padding) -> None:
        super().__init__()
        self.window, self.stride, self.padding = window, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, *spatial)` to the windows' figures."""
        if any(map(any, self.padding)):
            x = F.pad(x, [n for pair in reversed(self.padding) for n in pair], value=-math.inf)
        pool = F.max_pool1d if len(self.window) == 1 else F.max_pool2d
        return pool(x, self.window, self.stride)


class AvgPool(nn.Module):
    """Sums over windows divided by a power of two.

    The mean itself where a window holds so many values; else the mean times `values / divisor`, whose inverse the
    neighbouring layers have taken. With a divisor of one the sum.
    """

    def __init__(self, window: Shape, stride: Shape, divisor: int | None = None) -> None:
        super().__init__()
        self.window, self.stride = window, stride
        self.values = math.prod(window)
        self.is_mean = divisor is None
        self.divisor = divisor or 1 << (self.values.bit_length() - 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, *spatial)` to the windows' figures."""
        if len(self.window) == 1:
            sums = F.avg_pool2d(x.unsqueeze(2), (1, *self.window), (1, *self.stride), divisor_override=1).squeeze(2)
        else:
            sums = F.avg_pool2d(x, self.window, self.stride, divisor_override=1)
        return sums * (1 / self.divisor)


class Bilinear(nn.Module):
    """Bilinear (of sequences linear) upsampling by powers of two; edges are repeated."""

    def __init__(self, factor: Shape) -> None:
        super().__init__()
        self.factor = factor

    @property
    def step(self) -> float:
        """Of the result, as a multiple of the source's."""
        return math.prod(1 / (2 * factor) for factor in self.factor if factor > 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, *spatial)`, larger by `factor`."""
        mode = "linear" if len(self.factor) == 1 else "bilinear"
        return F.interpolate(x, scale_factor=[float(n) for n in self.factor], mode=mode)


# --- layers that move values -----------------------------------------------------------------------------------------


class Pad(nn.Module):
    """Zeros around every channel."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, *spatial)`, padded."""
        return F.pad(x, [n for pair in reversed(self.padding) for n in pair])


class Upsample(nn.Module):
    """Every value repeated along each spatial dimension."""

    def __init__(self, factor: Shape) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, *spatial)`, larger by `factor`."""
        for dim, factor in enumerate(self.factor, 2):
            x = x.repeat_interleave(factor, dim)
        return x


class Move(nn.Module):
    """Values of a sample at other places: reshaped, permuted, sliced, repeated.

    Args:
        index: of the result's shape; which of the source's values, counted in a row, stands there; -1: zero.
        size: how many values the source has.
    """

    index: Tensor

    def __init__(self, index: Tensor, size: int) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.shape = tuple(index.shape)
        self.strides = _strides(index)
        natural = (0, torch.empty(self.shape, device="meta").stride())
        self.is_reshape = index.numel() == size and self.strides == natural

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, *source shape)` to `(batch, *index shape)`."""
        x = x.flatten(1)
        if self.is_reshape:
            return x.view(len(x), *self.shape)
        if self.strides:
            offset, strides = self.strides
            x = x.contiguous()
            return x.as_strided((len(x), *self.shape), (x.stride(0), *strides), x.storage_offset() + offset)
        index = self.index.flatten()
        moved = x.index_select(1, index.clamp(min=0))
        return (moved * (index >= 0) if bool((index < 0).any()) else moved).view(len(x), *self.shape)


def _strides(index: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """First place and steps along each dimension, where these make an index; None where they do not."""
    offset = int(index.flatten()[0])
    dims = [n - 1 for n in index.shape]
    steps = [int(index[tuple(int(d == i) for i in range(index.ndim))]) - offset if n else 0 for d, n in enumerate(dims)]
    if offset < 0 or min(steps, default=0) < 0:
        return None
    made = torch.full_like(index, offset)
    for d, (n, step) in enumerate(zip(index.shape, steps, strict=True)):
        made += (torch.arange(n) * step).view(-1, *(1,) * (index.ndim - 1 - d))
    if not torch.equal(made, index):
        return None
    natural = torch.empty(tuple(index.shape), device="meta").stride()
    return offset, tuple(t if n == 0 else step for n, step, t in zip(dims, steps, natural, strict=True))


# --- layers that read several tensors --------------------------------------------------------------------------------


class _Elementwise(nn.Module):
    """Of two tensors of one shape, value by value.

    Args:
        quantized: whether what it reads gets a format first, where it has none; else sums are read as they are.
    """

    def __init__(self, *, quantized: bool = True) -> None:
        super().__init__()
        self.quantized = quantized


class Add(_Elementwise):
    """The sum of two tensors of one shape."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both of one shape."""
        return first + second


class Subtract(_Elementwise):
    """The difference of two tensors of one shape."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both of one shape."""
        return first - second


class Multiply(_Elementwise):
    """The product of two tensors of one shape, value by value."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both of one shape."""
        return first * second


class Maximum(_Elementwise):
    """The larger of two tensors of one shape, value by value."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both of one shape."""
        return torch.maximum(first, second)


class Minimum(_Elementwise):
    """The smaller of two tensors of one shape, value by value."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both of one shape."""
        return torch.minimum(first, second)


class Below(nn.Module):
    """How far values of a format are below the largest of them, exactly: as many bits hold it without a sign."""

    def forward(self, x: Tensor, largest: Tensor) -> Tensor:
        """Both of one shape."""
        return largest - x


class Concat(nn.Module):
    """Tensors side by side along a dimension of a sample."""

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *tensors: Tensor) -> Tensor:
        """Each `(batch, …)`, of one shape but for that dimension."""
        return torch.cat(tensors, self.axis + 1)


class Join(nn.Module):
    """Several outputs as one tensor; see `joined`."""

    def forward(self, *outputs: Tensor) -> Tensor:
        """Each `(batch, …)`."""
        return joined(outputs)


LINEAR_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, Affine)
MOVING_LAYERS = (MaxPool, Pad, Upsample, Move)
MERGING_LAYERS = (Add, Subtract, Multiply, Maximum, Minimum, Below, Concat)
FORMATTED_LAYERS = (Activation, Function)


def joined(outputs: object) -> Tensor:
    """What a model returns as one tensor: its only output, or all values of several in a row, `(batch, values)`.

    Each of several is flattened with its channels last, as hardware has them. They may stand in tuples, lists and
    dictionaries.
    """
    tensors: list[Tensor] = tree_leaves(outputs)
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.movedim(1, -1).flatten(1) if t.ndim > 1 else t[:, None] for t in tensors], 1)


def parted(tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors `(batch, *shape)` that `joined` made one of; that one itself where there is at most one shape."""
    if len(shapes) <= 1:
        return [tensor]
    parts = tensor.split([math.prod(shape) for shape in shapes], 1)
    return [part.unflatten(1, (*shape[1:], shape[0])).movedim(-1, 1) for part, shape in zip(parts, shapes, strict=True)]


def unwrapped(module: nn.Module) -> nn.Module:
    """What DataParallel and its kin, or torch.compile, were given."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = next(getattr(module, name) for name in _WRAPPERS if hasattr(module, name))
    return module
