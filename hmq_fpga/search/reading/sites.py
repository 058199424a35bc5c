"""Quantizer sites: every tensor of a draft that becomes a type in hardware."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from hmq_fpga.search.graph import Node, Site, weight_sites_of
from hmq_fpga.search.layers import (
    FORMATTED_LAYERS,
    LINEAR_LAYERS,
    MERGING_LAYERS,
    MOVING_LAYERS,
    Activation,
    Below,
    Function,
)
from hmq_fpga.search.reading.draft import Draft


def place_sites(draft: Draft, *, input_signed: bool) -> list[Site]:
    """Put a quantizer before everything that reads values of a format, where there is none yet.

    Such are layers with weights, functions, and what reads several tensors. Layers that share a weight share its site.
    The sites come in network order: inputs, then weights and activations.
    """
    sites = [
        Site(name=name, kind="input", size=math.prod(shape), signed=input_signed)
        for name, shape in draft.inputs.items()
    ]
    nodes, layers = dict(draft.nodes), dict(draft.layers)
    weights = weight_sites_of(layers)
    draft.nodes.clear()
    draft.layers.clear()
    taken = {*draft.inputs, *nodes}
    quantizers: dict[str, str] = {}

    def add(node: Node, layer: nn.Module) -> None:
        if isinstance(layer, LINEAR_LAYERS) and weights[node.name] == f"{node.name}.weight":
            sites.append(Site(name=weights[node.name], kind="weight", size=layer.weight.numel(), signed=True))
        if isinstance(layer, Activation | Function):
            sites.append(Site(name=node.name, kind="activation", size=math.prod(node.shape), signed=layer.signed))
        draft.add(node, layer)

    def quantized(tensor: str) -> str:
        origin = tensor
        while origin in layers and isinstance(layers[origin], MOVING_LAYERS):
            (origin,) = nodes[origin].sources
        if origin in draft.inputs or isinstance(layers[origin], (*FORMATTED_LAYERS, Below)):
            return tensor
        if tensor not in quantizers:
            name, n = f"{tensor}_quant", 1
            while name in taken:
                name, n = f"{tensor}_quant_{n}", n + 1
            taken.add(name)
            quantizers[tensor] = name
            path = f"after {nodes[tensor].path}"
            add(Node(name=name, sources=(tensor,), path=path, shape=nodes[tensor].shape), Activation(relu=False))
        return quantizers[tensor]

    for node in nodes.values():
        layer = layers[node.name]
        if isinstance(layer, (*LINEAR_LAYERS, *MERGING_LAYERS, Function)) and getattr(layer, "quantized", True):
            node = replace(node, sources=tuple(map(quantized, node.sources)))
        add(node, layer)
    return sites
