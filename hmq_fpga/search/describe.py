"""What an instrumented model is made of, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hmq_fpga.search.graph import Node, QModel
from hmq_fpga.search.layers import LINEAR_LAYERS, Activation, Move


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of the user's model; what is not known or does not apply is None.

    Attributes:
        path: its name in the user's model.
        kind: its type.
        name: its name in the network and in the hardware.
        shape: of its result for one sample, channels first.
        parameters: weights and biases.
        weight_bits, weight_threshold_log2: of its weights' format; the mean where they have widths of their own.
        weight_share: its part of the weight memory, biases not counted; of layers that share a weight the first's.
        activation_bits, activation_threshold_log2: of its result's format, if the result has one.
    """

    path: str
    kind: str
    name: str
    shape: tuple[int, ...]
    parameters: int
    weight_bits: float | None
    weight_threshold_log2: int | None
    weight_share: float | None
    activation_bits: int | None
    activation_threshold_log2: int | None


def describe(model: QModel) -> list[LayerRow]:
    """The layers of an instrumented model in execution order, with formats where a scheme is set."""
    formats, weights = model.formats, {t.name: t for t in model.scheme.of_kind("weight")}
    memory = sum(t.bits for t in weights.values())

    def row(node: Node, layer: Any) -> LayerRow:
        weight = weights.get(model.weight_sites.get(node.name, ""))
        result = formats.get(node.name)
        return LayerRow(
            path=node.path,
            kind=_kind(layer),
            name=node.name,
            shape=node.shape,
            parameters=sum(p.numel() for p in layer.parameters()) if isinstance(layer, LINEAR_LAYERS) else 0,
            weight_bits=weight.mean_width if weight else None,
            weight_threshold_log2=weight.format.threshold_log2 if weight else None,
            weight_share=weight.bits / memory if weight and memory and weight.name == f"{node.name}.weight" else None,
            activation_bits=result.width if result else None,
            activation_threshold_log2=result.threshold_log2 if result else None,
        )

    return [row(node, layer) for node, layer in zip(model.nodes, model.layers, strict=True)]


def description(model: QModel) -> dict[str, Any]:
    """`{"layers": …, "notes": …}`: the rows of `describe`, and what was folded, removed or replaced."""
    return {"layers": [asdict(row) for row in describe(model)], "notes": list(model.notes)}


def _kind(layer: Any) -> str:
    if isinstance(layer, Activation):
        return "ReLU" if layer.relu else "quantizer"
    if isinstance(layer, Move) and layer.is_reshape:
        return "Flatten" if len(layer.shape) == 1 else "Reshape"
    return type(layer).__name__
