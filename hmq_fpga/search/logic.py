"""Where a search starts that has a bound on the network's LUTs or EBOPs, and none on bit-widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from hmq_fpga.ir.cost import FLOAT_BITS, ebops
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.logic import luts
from hmq_fpga.search.calibrate import least_error_format
from hmq_fpga.search.freeze import outline
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import least_threshold_log2
from hmq_fpga.search.target import Target, rate_bound

STARTS = ((13.0, 4), (10.0, 4), (8.0, 4), (8.0, 5), (8.0, 6), (6.0, 8), (4.0, 8))  # R_w, bits of activations
TIGHT = 5.5  # times the bound: where even three bits cost more, activations get no more, and more weights are left
TIGHT_BITS = 3
ROOM = 1.7  # by which a start exceeds the bound: larger thresholds and training alone take out a third of the logic
FIRST_BITS = 3  # for which a start leaves room in weights of inputs: no later layer makes up for what two bits lose
FEW = 0.1  # of all weights: so many of outputs get the widest, which costs few bits, and fewer are pruned
ZEROS = 0.5  # that larger thresholds make before anything is pruned


def check_least(model: QModel, target: Target) -> None:
    """Raise `InvalidInput` when a bound on LUTs or EBOPs is below what a weight in each layer needs, by the formula."""
    if not target.pruned:
        return
    least = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in least.parameters():
            parameter.zero_()
        for weight in least.weights.values():
            weight.copy_(torch.arange(weight.numel()).view_as(weight) == 0)
    bits = {name: min(width, TIGHT_BITS) for name, width in target.activation_bits(model).items()}
    net = outline(least, {**dict.fromkeys(model.weights, 2), **bits})
    for name, most, of in (("LUTs", target.luts, luts), ("EBOPs", target.ebops, ebops)):
        if most is not None and most < (needed := of(net)):
            raise InvalidInput(
                f"{most:,.6g} {name} are out of reach: one weight in each layer alone needs about {needed:,.0f}"
            )


def start(model: QModel, target: Target, *, mixed: bool = True) -> Target:
    """The target with rates whose network costs more than its bound on LUTs or EBOPs, if it gives none itself.

    Of `STARTS`, as far as the target's bit-widths reach, the first with room enough, with the float weights at one
    bit-width and LUTs by the formula; else the last. Those come first that can give weights of inputs `FIRST_BITS`
    where all others have two; where the width of some weights is given, that rate itself is the first. Weights of
    outputs get the widest bit-width where they are few: each is worth more than one of an input, and pruning, which
    goes by steps, then leaves more of them. Where most will have to be pruned, activations get `TIGHT_BITS`. No data
    are read.

    Args:
        model: the instrumented network.
        target: what is asked for.
        mixed: whether weights may have different bit-widths.
    """
    if target.bounded or not target.pruned:
        return target
    if mixed and (few := _few_of_outputs(model)):
        widest = {name: bits[-1:] for name, bits in target.choices(model).items() if name in few}
        target = replace(target, tensor_bits={**widest, **target.tensor_bits})
    least, most = target.reach(model, rate_bound(model, 1.0))
    widths = {name: bits[0] for name, bits in target.choices(model).items() if len(bits) == 1}
    highest = _highest_rate(model, widths)
    starts = [s for s in STARTS if s[0] <= highest]
    if widths:
        starts = [(highest, STARTS[0][1]), *starts]
    tight = (starts[0][0], TIGHT_BITS, TIGHT)
    for wanted, activation_bits, room in [tight, *((*given, ROOM) for given in starts)]:
        rate, bits = min(max(wanted, least), most), min(activation_bits, target.max_activation_bits)
        started = replace(target, weight_rate=rate, max_activation_bits=bits)
        weights = {
            name: least_error_format(
                weight,
                signed=True,
                bits=widths.get(name, int(FLOAT_BITS / rate)),
                max_threshold_log2=least_threshold_log2(float(weight.detach().abs().max())),
            )
            for name, weight in model.weights.items()
        }
        net = outline(copy.deepcopy(model), {**weights, **started.activation_bits(model)})
        if luts(net) > room * (target.luts or math.inf) or ebops(net) > room * (target.ebops or math.inf):
            break
    return started


def _few_of_outputs(model: QModel) -> set[str]:
    """The weights that no other weight comes after, if they are `FEW` of all."""
    sources = {node.name: node.sources for node in model.nodes}
    found: set[str] = set()
    visited: set[str] = set()
    left = [model.nodes[-1].name]
    while left:
        if (name := left.pop()) in model.weight_sites:
            found.add(model.weight_sites[name])
        elif name not in visited:
            visited.add(name)
            left += sources.get(name, ())
    sizes = {name: weight.numel() for name, weight in model.weights.items()}
    return found if sum(sizes[name] for name in found) <= FEW * sum(sizes.values()) else set()


def _highest_rate(model: QModel, widths: Mapping[str, int]) -> float:
    """R_w with `FIRST_BITS` for weights of inputs and two bits for all others, but for those whose width is given."""
    weights = model.weights
    first = {
        model.weight_sites[name] for name, source in model.multiplied.items() if model.origin(source) in model.inputs
    }
    bits = sum(
        weight.numel() * widths.get(site, FIRST_BITS if site in first else 2) for site, weight in weights.items()
    )
    return FLOAT_BITS * sum(weight.numel() for weight in weights.values()) / bits
