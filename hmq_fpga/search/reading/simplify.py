"""Rules that make a draft simpler and leave what it computes as it is, but for where a note says otherwise.

Each is a function of the draft. They change weights by giving a layer new ones, since several layers may share one
parameter: what is changed for one of them is its own from then on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.search.layers import (
    LINEAR_LAYERS,
    MOVING_LAYERS,
    Activation,
    Add,
    Affine,
    AvgPool,
    Concat,
    Function,
    Maximum,
    Minimum,
    Move,
    Subtract,
)
from hmq_fpga.search.reading.draft import Draft
from hmq_fpga.search.reading.operations import Clip

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_LINEAR_MERGES = (Add, Subtract, Maximum, Minimum, Concat)  # a positive factor of all they read passes through
_FOLDABLE = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


def simplify(draft: Draft) -> None:
    """All rules, in an order in which each is needed once.

    Raises:
        UnsupportedLayer: for a mean whose divisor no layer can take.
    """
    pick_parts(draft)
    drop_unread(draft)
    fold_affines(draft)
    join_tables(draft)
    settle_clips(draft)
    settle_means(draft)


# --- what is not read ------------------------------------------------------------------------------------------------


def pick_parts(draft: Draft) -> None:
    """Let what takes values of a single one of joined tensors read that one, as the last of all states."""
    for name, layer in list(draft.layers.items()):
        joined = draft.layers.get(draft.nodes[name].sources[0])
        if not isinstance(layer, Move) or not isinstance(joined, Concat):
            continue
        parts = draft.nodes[draft.nodes[name].sources[0]].sources
        sizes = [draft.size(part) for part in parts]
        starts = [sum(sizes[:n]) for n in range(len(parts))]
        places = torch.cat(
            [
                start + torch.arange(size).view(draft.shape(p))
                for p, start, size in zip(parts, starts, sizes, strict=True)
            ],
            joined.axis,
        )
        index = torch.where(layer.index < 0, -1, places.flatten()[layer.index.clamp(min=0)])
        n = max(n for n, start in enumerate(starts) if start <= int(index.max()))
        within = index - starts[n]
        if bool(((within >= 0) | (index < 0)).all()):
            draft.layers[name] = Move(torch.where(index < 0, -1, within), sizes[n])
            draft.nodes[name] = replace(draft.nodes[name], sources=(parts[n],))


def drop_unread(draft: Draft) -> None:
    """Take out layers whose results nothing reads."""
    for name in reversed(list(draft.nodes)):
        if name not in draft.outputs and not draft.readers(name):
            del draft.nodes[name], draft.layers[name]
            draft.statistics.pop(name, None)


# --- scales and shifts -----------------------------------------------------------------------------------------------


def fold_affines(draft: Draft) -> None:
    """Let neighbouring layers take scales and shifts: the one before, else the one after; join what is in a row."""
    for name in _affines(draft):
        if isinstance(draft.layers.get(draft.nodes[name].sources[0]), Affine):
            fold_into_maker(draft, name)
    for name in _affines(draft):
        path = draft.nodes[name].path
        into = fold_into_maker(draft, name) or fold_into_reader(draft, name) or fold_into_table(draft, name)
        if into:
            draft.notes.append(f"{path} folded into {into}")
        else:
            draft.notes.append(f"{path} kept as a scale and a shift per channel: no neighbouring layer can take it")


def _affines(draft: Draft) -> list[str]:
    return [name for name, layer in draft.layers.items() if isinstance(layer, Affine)]


def fold_into_maker(draft: Draft, name: str) -> str | None:
    """Let the layer before take a scale and a shift, if nothing else reads its result; its path, or None."""
    (source,) = draft.nodes[name].sources
    layer, affine = draft.layers.get(source), draft.layers[name]
    assert isinstance(affine, Affine)
    if not isinstance(layer, (*_FOLDABLE, Affine)) or draft.reader(source) != name:
        return None
    outputs = len(draft.shape(source)) - 1 if isinstance(layer, nn.Linear) else 0
    if isinstance(layer, Affine):
        outputs = -1 if layer.axis is None else layer.axis
    if (-1 if affine.axis is None else affine.axis) != outputs:
        return None
    scale, shift = affine.weight.detach().double(), affine.bias.detach().double()
    weight, bias = layer.weight.detach().double(), _bias(layer)
    along = _along_outputs(layer, scale)
    _set(layer, weight * along, bias * scale + shift)
    if name in draft.statistics:
        draft.statistics[source] = draft.statistics[name]
    elif source in draft.statistics:
        draft.statistics[source] = draft.statistics[source].scaled(scale, shift)
    draft.remove(name)
    return draft.path(source)


def fold_into_reader(draft: Draft, name: str) -> str | None:
    """Let the layer after take a scale and a shift, if it alone reads them; its path, or None.

    A convolution takes no shift across zeros around it. Moves in between are passed by.
    """
    affine = draft.layers[name]
    assert isinstance(affine, Affine)
    shape = draft.shape(name)
    along = [-1 if d == affine.axis else 1 for d in range(len(shape))]
    scale, shift = (
        values.detach().double().view(shape if affine.axis is None else along).expand(shape)
        for values in (affine.weight, affine.bias)
    )
    tensor = name
    while reader := draft.reader(tensor):
        layer = draft.layers[reader]
        if isinstance(layer, Move):
            if bool((layer.index < 0).any()) and bool(shift.any()):
                return None
            scale, shift = (values.flatten()[layer.index.clamp(min=0)] for values in (scale, shift))
            tensor = reader
            continue
        if not _take(layer, scale, shift):
            return None
        draft.remove(name)
        return draft.path(reader)
    return None


def fold_into_table(draft: Draft, name: str) -> str | None:
    """Let the table before or after take a scale and a shift that are the same for all values; its path, or None."""
    (source,) = draft.nodes[name].sources
    affine, maker, reader = draft.layers[name], draft.layers.get(source), draft.reader(name)
    assert isinstance(affine, Affine)
    numbers = [values.detach().double().unique().tolist() for values in (affine.weight, affine.bias)]
    if any(len(different) > 1 for different in numbers):
        return None
    function = functools.partial(_line, scale=numbers[0][0], shift=numbers[1][0])
    if isinstance(maker, Function) and draft.reader(source) == name:
        draft.layers[source] = maker.then(function)
        into = source
    elif reader and isinstance(layer := draft.layers[reader], Function):
        draft.layers[reader] = layer.of(function)
        into = reader
    else:
        return None
    draft.remove(name)
    return draft.path(into)


def _line(x: Tensor, *, scale: float, shift: float) -> Tensor:
    return x * scale + shift


def join_tables(draft: Draft) -> None:
    """Let a table that alone reads another one do what both do."""
    for name in list(draft.nodes):
        (source, *_), layer = draft.nodes[name].sources, draft.layers[name]
        inner = draft.layers.get(source)
        if isinstance(layer, Function) and isinstance(inner, Function) and draft.reader(source) == name:
            draft.layers[name] = layer.of(inner.function)
            draft.remove(source)


def _take(layer: nn.Module, scale: Tensor, shift: Tensor) -> bool:
    """Let a layer that reads `x` compute what it computed of `x * scale + shift`, if it can."""
    if isinstance(layer, nn.Linear):
        rows = [values.reshape(-1, values.shape[-1]) for values in (scale, shift)]
        if any((row != row[0]).any() for row in rows):  # not the same at all positions
            return False
        scale, shift = (row[0] for row in rows)
        weight = layer.weight.detach().double()
        _set(layer, weight * scale, _bias(layer) + weight @ shift)
        return True
    if not isinstance(layer, _CONVOLUTIONS):
        return False
    flat = [values.flatten(1) for values in (scale, shift)]
    if any((values != values[:, :1]).any() for values in flat):
        return False
    scale, shift = (values[:, 0] for values in flat)
    if bool(shift.any()) and not _is_valid(layer):
        return False
    weight = layer.weight.detach().double()
    groups, dims = layer.groups, weight.ndim - 2
    by_output = [v.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1) for v in (scale, shift)]
    added = (weight.flatten(2).sum(2) * by_output[1]).sum(1)
    _set(layer, weight * by_output[0].view(*by_output[0].shape, *(1,) * dims), _bias(layer) + added)
    return True


def _is_valid(layer: nn.Conv1d | nn.Conv2d) -> bool:
    """Without padding, at whose zeros a shift would be missing."""
    return layer.padding == "valid" or (layer.padding != "same" and not any(layer.padding))


def _bias(layer: Any) -> Tensor:
    bias: Tensor = layer.bias.detach().double()
    return bias


def _along_outputs(layer: nn.Module, scale: Tensor) -> Tensor:
    """Factors of the outputs as they stand along a weight."""
    if isinstance(layer, Affine):
        return scale
    if isinstance(layer, _TRANSPOSED):  # (inputs, outputs of a group, *kernel)
        inputs = layer.in_channels // layer.groups
        factors = scale.view(layer.groups, 1, -1).expand(-1, inputs, -1).flatten(0, 1)
        return factors.view(*factors.shape, *(1,) * len(layer.kernel_size))
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    return scale.view(-1, *(1,) * (layer.weight.ndim - 1))


def _set(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight, layer.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())


# --- clips and means whose factor is no power of two: neighbouring layers take the rest -------------------------------


def settle_clips(draft: Draft) -> None:
    """Let every clip be at a power of two; where the weights around it can be scaled, nothing changes by that."""
    for name, layer in list(draft.layers.items()):
        if not isinstance(layer, Clip):
            continue
        path, high, limit_log2 = draft.nodes[name].path, layer.high, math.ceil(math.log2(layer.high))
        limit = 2.0**limit_log2
        draft.layers[name] = Activation(relu=layer.relu, limit_log2=limit_log2)
        if limit == high:
            continue
        makers, takers = _makers(draft, draft.nodes[name].sources[0]), _takers(draft, name)
        if makers is None or takers is None:
            draft.notes.append(f"{path} clips at {limit:g} instead of {high:g}")
            draft.is_exact = False
            continue
        _scale_makers(draft, makers, limit / high)
        _scale_takers(draft, name, takers, high / limit)
        draft.notes.append(f"{path} clips at {limit:g} instead of {high:g}: the weights before and after are scaled")


def settle_means(draft: Draft) -> None:
    """Let every mean divide by a power of two, by scaling the weights after or before it.

    Raises:
        UnsupportedLayer: where there are no such weights.
    """
    for name, layer in draft.layers.items():
        if not isinstance(layer, AvgPool) or not layer.is_mean or layer.values == layer.divisor:
            continue
        rest, path = layer.divisor / layer.values, draft.nodes[name].path
        takers, makers = _takers(draft, name), _makers(draft, draft.nodes[name].sources[0])
        if takers is not None:
            _scale_takers(draft, name, takers, rest)
        elif makers is not None:
            _scale_makers(draft, makers, rest)
        else:
            raise UnsupportedLayer(
                f"model: layer {path!r}: a mean over {layer.values} values, no power of two, and no layer before or "
                "after it that could take the rest of the divisor; pool a power of two of values"
            )
        draft.notes.append(f"{path} divides by {layer.divisor} instead of {layer.values}: nearby weights take the rest")


def _takers(draft: Draft, name: str) -> list[str] | None:
    """The layers with weights that read `name` in the end, and those on the way, if nothing else does."""
    found: list[str] = []
    readers = draft.readers(name)
    if not readers or name in draft.outputs:
        return None
    for reader in readers:
        layer = draft.layers[reader]
        found.append(reader)
        if isinstance(layer, LINEAR_LAYERS):
            continue
        further = _takers(draft, reader) if _is_homogeneous(layer) else None
        if further is None:
            return None
        found += further
    return found


def _makers(draft: Draft, name: str) -> list[str] | None:
    """The layers with weights that make `name` in the end, and those on the way, if it is all they are read for."""
    if name in draft.inputs or draft.reader(name) is None:
        return None
    layer = draft.layers[name]
    if isinstance(layer, LINEAR_LAYERS):
        return [name]
    if not (_is_homogeneous(layer) or isinstance(layer, _LINEAR_MERGES)):
        return None
    further = [_makers(draft, source) for source in draft.nodes[name].sources]
    return None if None in further else [name, *(maker for makers in further if makers for maker in makers)]


def _is_homogeneous(layer: nn.Module) -> bool:
    """Whether a positive factor passes through a layer, as long as its quantizer's threshold follows."""
    if isinstance(layer, Activation):
        return layer.limit_log2 is None
    return isinstance(layer, (*MOVING_LAYERS, nn.LeakyReLU, AvgPool))


def _scale_makers(draft: Draft, makers: list[str], factor: float) -> None:
    """Let what `_makers` found make `factor` times as much."""
    for name in makers:
        layer: Any = draft.layers[name]
        if isinstance(layer, LINEAR_LAYERS):
            _set(layer, layer.weight.detach().double() * factor, _bias(layer) * factor)
    _scale_statistics(draft, makers, factor)


def _scale_takers(draft: Draft, tensor: str, takers: list[str], factor: float) -> None:
    """Let what `_takers` found of a tensor take `factor` times what they read, which became less by that."""
    for name in takers:
        layer: Any = draft.layers[name]
        if isinstance(layer, LINEAR_LAYERS):
            _set(layer, layer.weight.detach().double() * factor, _bias(layer))
    between = [name for name in takers if not isinstance(draft.layers[name], LINEAR_LAYERS)]
    _scale_statistics(draft, [tensor, *between], 1 / factor)


def _scale_statistics(draft: Draft, tensors: list[str], factor: float) -> None:
    for name in tensors:
        if name in draft.statistics:
            draft.statistics[name] = draft.statistics[name].scaled(factor)
