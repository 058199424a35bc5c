"""Where a search starts that has a bound on the network's LUTs or EBOPs, and none on bit-widths."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from hmq_fpga.ir.cost import FLOAT_BITS, ebops
from hmq_fpga.ir.logic import luts
from hmq_fpga.search.calibrate import least_error_format
from hmq_fpga.search.freeze import outline
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import least_threshold_log2
from hmq_fpga.search.target import Target, rate_bound

STARTS = ((13.0, 4), (10.0, 5), (8.0, 6), (6.0, 8), (4.0, 8))  # R_w and bits of activations, by growing logic
ROOM = 1.2  # by which a start exceeds the bound, so that there is something to prune
ZEROS = 0.5  # that larger thresholds make before anything is pruned


def start(model: QModel, target: Target) -> Target:
    """The target with rates whose network costs more than its bound on LUTs or EBOPs, if it gives none itself.

    Of `STARTS`, as far as the target's bit-widths reach, the first with room enough, with the float weights at one
    bit-width and LUTs by the formula; else the last. No data are read.
    """
    if target.bounded or not target.pruned:
        return target
    least, most = target.reach(model, rate_bound(model, 1.0))
    for wanted, activation_bits in STARTS:
        rate, bits = min(max(wanted, least), most), min(activation_bits, target.max_activation_bits)
        started = replace(target, weight_rate=rate, max_activation_bits=bits)
        weights = {
            name: least_error_format(
                weight,
                signed=True,
                bits=int(FLOAT_BITS / rate),
                max_threshold_log2=least_threshold_log2(float(weight.detach().abs().max())),
            )
            for name, weight in model.weights.items()
        }
        net = outline(copy.deepcopy(model), {**weights, **started.activation_bits(model)})
        if luts(net) > ROOM * (target.luts or math.inf) or ebops(net) > ROOM * (target.ebops or math.inf):
            break
    return started
