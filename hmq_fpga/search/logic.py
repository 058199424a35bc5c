"""Where a search starts that has a bound on the network's LUTs or EBOPs, and none on bit-widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

from hmq_fpga.ir.cost import FLOAT_BITS, ebops
from hmq_fpga.ir.logic import luts
from hmq_fpga.search.calibrate import least_error_format, max_thresholds_log2, samples, scheme_of
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
    limits, values = max_thresholds_log2(model, task), samples(model, task)
    for rate, activation_bits in STARTS:
        started = replace(
            target, weight_rate=rate, max_activation_bits=min(activation_bits, target.max_activation_bits)
        )
        bits: Mapping[str, int] = started.activation_bits(model)
        trial = copy.deepcopy(model)
        formats = {
            site.name: least_error_format(
                values[site.name],
                signed=site.signed,
                bits=bits.get(site.name, int(FLOAT_BITS / rate)),
                max_threshold_log2=limits[site.name],
            )
            for site in model.sites
        }
        trial.set_scheme(scheme_of(trial, formats, {}))
        net = freeze(trial)
        if luts(net) > ROOM * (target.luts or math.inf) or ebops(net) > ROOM * (target.ebops or math.inf):
            break
    return started
