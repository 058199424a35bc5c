"""From the user's module to a `QModel`: read as PyTorch exports it, simplified, with a site at every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.graph import Node, QModel
from hmq_fpga.search.layers import LINEAR_LAYERS, Join, joined
from hmq_fpga.search.reading import sequences  # noqa: F401
from hmq_fpga.search.reading.draft import Draft
from hmq_fpga.search.reading.exported import BATCH, Exported, export, output_names
from hmq_fpga.search.reading.operations import MOVES
from hmq_fpga.search.reading.reader import Reader
from hmq_fpga.search.reading.simplify import simplify
from hmq_fpga.search.reading.sites import place_sites
from hmq_fpga.search.reading.table import ABOUT, TABLE

_TOLERANCE = 1e-4  # of a model in float64, whose folded weights are float32


def instrument(
    model: nn.Module,
    input_shape: Shape | Sequence[Shape] | Mapping[str, Shape],
    *,
    input_signed: bool = True,
    keep_final: bool = False,
) -> QModel:
    """Read a float model and put a quantizer site at every tensor that becomes a type in hardware.

    It is read as `torch.export` gives it, in evaluation mode: what depends on parameters and constants alone is
    computed, BatchNorm and constants are folded into the layer before or after them where that is exact, dropout and
    functions at the very end are left out. Every weight, the inputs, every ReLU, every function that becomes a table,
    and every other value that a layer with weights, a function or an operation on several tensors reads gets a site;
    the output stays an exact accumulator. The given model is left as it is. A layer that is used twice is one set of
    parameters with one format of its weight. What comes out computes what went in: both are run and compared in
    float64.

    Args:
        model: any module that torch.export can read and whose operations are supported.
        input_shape: shape of one sample, channels first; of several inputs one each, in order or by keyword.
        input_signed: whether inputs can be negative.
        keep_final: whether a final tanh, sigmoid or softmax is computed in hardware; else it is left out.

    Raises:
        UnsupportedLayer: naming the operation that is not supported, its module and the place in the user's code; or
            where the model computes something else than the operations that were read, as with hooks.
        InvalidInput: when the model cannot be copied or exported, holds NaN, or does not take `input_shape`.
    """
    exported = export(model, _shapes(input_shape), signed=input_signed)
    draft = Reader(exported, TABLE, MOVES, keep_final=keep_final).read()
    if not any(isinstance(layer, LINEAR_LAYERS) for layer in draft.layers.values()):
        raise UnsupportedLayer("model: no Linear and no convolution in it, so there is no weight to quantize")
    simplify(draft)
    sites = place_sites(draft, input_signed=input_signed)
    _end(draft, output_names(exported.program))
    read = QModel(draft.inputs, draft.layers, draft.nodes.values(), sites, draft.notes, draft.finals, draft.statistics)
    if draft.is_exact:
        _compare(read, exported)
    return read


def supported() -> dict[str, str]:
    """What becomes of each operation, by the names of those that share an entry."""
    without = {name for name, read in TABLE.items() if read.__name__ == "refuse"}
    moves = " ".join(f"`{name}`" for name in sorted(MOVES))
    return {
        **ABOUT,
        moves: "values of one sample at other places: no arithmetic and no logic, flattening goes into the weights",
        " ".join(f"`{name}`" for name in sorted(without)): "refused",
    }


def _shapes(given: Shape | Sequence[Shape] | Mapping[str, Shape]) -> Sequence[Shape] | Mapping[str, Shape]:
    if isinstance(given, Mapping):
        return given
    return (tuple(given),) if all(isinstance(n, int) for n in given) else tuple(given)  # type: ignore[arg-type]


def _end(draft: Draft, keys: Sequence[str]) -> None:
    """Close with the only output, or with several in a row."""
    if inside := [name for name in draft.outputs if draft.readers(name)]:
        path = draft.path(inside[0])
        raise UnsupportedLayer(f"model: its output {path!r} is also read inside; return tensors that nothing reads")
    if len(draft.outputs) == 1:
        (last,) = draft.outputs
        draft.add(draft.nodes.pop(last), draft.layers.pop(last))
        return
    size = sum(map(draft.size, draft.outputs))
    draft.add(Node(name=draft.free("outputs"), sources=tuple(draft.outputs), path="outputs", shape=(size,)), Join())
    named = [f"{name} ({key})" for name, key in zip(draft.outputs, keys, strict=True)] if keys else draft.outputs
    draft.notes.append(f"{len(draft.outputs)} outputs, each with a port of its own: {', '.join(named)}")


@torch.no_grad()
def _compare(read: QModel, exported: Exported) -> None:
    """Raise `UnsupportedLayer` unless a model gives what the user's does, but for roundings.

    Another size of batch than the one that was exported, so that nothing hangs on that.
    """
    examples = tuple(torch.cat([x, x[:1].flip(-1)]) for x in exported.examples)
    expected = _run(exported, examples)
    found = read.double()(joined([x.double() for x in examples]))
    read.float()
    tensors: list[Tensor] = tree_leaves(expected)
    given, wanted = read.finish(found), joined(tensors)
    if not wanted.isfinite().all():
        raise InvalidInput(
            "model: gives NaN or infinity for random inputs; keep what logarithms, roots and powers read above zero, "
            "as by clamp"
        )
    scale = max(1.0, float(wanted.abs().max()))
    if given.shape != wanted.shape or not torch.allclose(
        given.double(), wanted.double(), rtol=0, atol=_TOLERANCE * scale
    ):
        off = f", by {float((given - wanted).abs().max()):.3g}" if given.shape == wanted.shape else ""
        raise UnsupportedLayer(
            f"model: computes something else than its layers do{off}: take away hooks, what depends on the size of the "
            "batch, and in-place functions whose input is read elsewhere"
        )


def _run(exported: Exported, examples: Sequence[Tensor]) -> Any:
    """What the user's module returns: in float64, or where it makes something of float32 in its forward in that."""
    with suppress(RuntimeError):
        exported.module.double()
        return exported.run([x.double() for x in examples])
    exported.module.float()
    try:
        return exported.run(examples)
    except RuntimeError as error:
        raise InvalidInput(
            f"model: forward takes batches of {BATCH} and not of {BATCH + 1}; do not fix the batch's size in it"
        ) from error
