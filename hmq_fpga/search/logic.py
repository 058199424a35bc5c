"""Where a search starts that has a bound on the network's LUTs or EBOPs, and none on bit-widths."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from hmq_fpga.ir.cost import FLOAT_BITS, ebops
from hmq_fpga.ir.logic import luts
from hmq_fpga.search.calibrate import least_error_formats, max_thresholds_log2, scheme_of
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Task

STARTS = ((13.0, 4), (10.0, 5), (8.0, 6), (6.0, 8), (4.0, 8))  # R_w and bits of activations, by growing logic
ROOM = 1.2  # by which a start exceeds the bound, so that there is something to prune
ZEROS = 0.5  # that larger thresholds make before anything is pruned


def start(model: QModel, task: Task, target: Target) -> Target:
    """The target with rates whose network costs more than its bound on LUTs or EBOPs, if it gives none itself.

    Of `STARTS` the first with room enough, all weights at one bit-width and LUTs by the formula; else the last.
    """
    if target.bounded or not target.pruned:
        return target
    limits = max_thresholds_log2(model, task)
    for rate, activation_bits in STARTS:
        started = replace(
            target, weight_rate=rate, max_activation_bits=min(activation_bits, target.max_activation_bits)
        )
        bits = {**dict.fromkeys(model.weights, int(FLOAT_BITS / rate)), **started.activation_bits(model)}
        trial = copy.deepcopy(model)
        trial.set_scheme(scheme_of(trial, least_error_formats(model, task, bits, limits), {}))
        net = freeze(trial)
        if luts(net) > ROOM * (target.luts or math.inf) or ebops(net) > ROOM * (target.ebops or math.inf):
            break
    return started
