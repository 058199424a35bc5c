"""How much what weights multiply varies: a weight of what is always the same could as well be part of a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import Affine
from hmq_fpga.search.train import at_once

LEAST = 1e-6  # as a ratio, so that weights of constants are told from weights that are zero


@torch.no_grad()
def input_deviations(model: QModel, x: Tensor) -> dict[str, Tensor]:
    """Standard deviation over samples and positions of what each element of a weight multiplies, by the weight's site.

    It is a ratio to the root mean square of those of its layer, at least `LEAST`, and broadcasts with the weight.

    Args:
        model: with a scheme.
        x: samples.
    """
    layers = dict(zip((node.name for node in model.nodes), model.layers, strict=True))
    sums: dict[str, list[Tensor]] = {}
    for batch in x.split(min(at_once(x), 256)):
        values: dict[str, Tensor] = {}
        model(batch, follow=values.__setitem__)
        for name, site in model.weight_sites.items():
            columns = _columns(layers[name], values[model.multiplied[name]]).double()
            found = [columns.sum(0), columns.square().sum(0), columns.new_tensor(len(columns))]
            sums[site] = [a + b for a, b in zip(sums[site], found, strict=True)] if site in sums else found
    readers = {site: layers[name] for name, site in model.weight_sites.items()}
    return {site: _like_weight(readers[site], _ratios(*found)) for site, found in sums.items()}


def _ratios(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    deviations = (squares / count - (total / count).square()).clamp_min(0).sqrt()
    return (deviations / deviations.square().mean().sqrt()).nan_to_num(1.0).clamp_min(LEAST).float()


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads, in rows of what its weights tell apart: features of a dense layer, channels of others."""
    match layer:
        case nn.Linear():
            return x.flatten(0, -2)
        case Affine(axis=None):
            return x.flatten(1)
        case Affine(axis=int(axis)):
            return x.movedim(1 + axis, -1).flatten(0, -2)
        case _:
            return x.movedim(1, -1).flatten(0, -2)


def _like_weight(layer: nn.Module, of_input: Tensor) -> Tensor:
    match layer:
        case nn.Conv1d() | nn.Conv2d():
            of_group = of_input.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)
            return of_group.view(*of_group.shape, *(1,) * len(layer.kernel_size))
        case nn.ConvTranspose1d() | nn.ConvTranspose2d():
            return of_input.view(-1, 1, *(1,) * len(layer.kernel_size))
        case _:
            return of_input
