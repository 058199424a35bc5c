"""Bounds that only trained weights can tell: they are kept by pruning while fine-tuning."""

from __future__ import annotations

from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.ir.cost import ebops
from hmq_fpga.ir.logic import luts
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.pruning import NetworkCost, Pruning
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Task


def pruning(model: QModel, target: Target, task: Task) -> Pruning | None:
    """What keeps a target's bound on LUTs or EBOPs: the `shaping` of `finetune`. None where there is no such bound."""
    if target.luts is not None:
        return Pruning(model, NetworkCost("LUTs", target.luts, traced_luts, luts), task)
    if target.ebops is not None:
        return Pruning(model, NetworkCost("EBOPs", target.ebops, ebops, ebops), task)
    return None
