"""Whether hls4ml can make a project of a network with the settings that were chosen."""

from __future__ import annotations

from importlib.util import find_spec
from typing import get_args

from hmq_fpga.deploy.settings import Hardware, HlsBackend, IoType, LayerSettings, Strategy
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import DepthwiseConv, Linear, Scale

ADDERS = "distributed_arithmetic"


def check_settings(net: QNet, hardware: Hardware) -> None:
    """Raise `InvalidInput` where a project cannot be made of a network with these settings.

    Only its ops count, not its numbers: one that is not trained yet will do.
    """
    strategies = [hardware.strategy, *(s.strategy for s in hardware.layers.values() if s.strategy)]
    chosen = ((hardware.backend, HlsBackend), (hardware.io_type, IoType), *((s, Strategy) for s in strategies))
    for value, choices in chosen:
        if value not in get_args(choices):
            raise InvalidInput(f"{value!r} is none of {', '.join(get_args(choices))}")
    if unknown := sorted(set(hardware.layers) - {op.name for op in net.linears}):
        names = ", ".join(op.name for op in net.linears)
        raise InvalidInput(f"layer {unknown[0]!r} has no reuse factor or strategy; these layers have: {names}")
    for op in net.linears:
        own = hardware.layers.get(op.name, LayerSettings())
        strategy, reuse_factor = own.strategy or hardware.strategy, own.reuse_factor or hardware.reuse_factor
        _check_strategy(op, strategy, reuse_factor, hardware.io_type)


def _check_strategy(op: Linear, strategy: Strategy, reuse_factor: int, io_type: IoType) -> None:
    """Refuse distributed arithmetic where it is not installed, and a strategy that hls4ml does not have for an op."""
    if isinstance(op, DepthwiseConv) and strategy == "Resource" and io_type == "io_parallel":  # computes nothing
        raise InvalidInput(
            f"op {op.name!r}: hls4ml's io_parallel has no Resource strategy of depthwise convolutions: set its "
            "strategy to Latency, or use io_stream"
        )
    if isinstance(op, Scale) or strategy != ADDERS:
        return
    if find_spec("da4ml") is None:
        raise InvalidInput(f"strategy {ADDERS!r} needs da4ml, which is not installed: pip install 'hmq-fpga[da]'")
    if reuse_factor != 1:
        raise InvalidInput(f"op {op.name!r}: {ADDERS} has no multipliers to reuse: set its reuse factor to 1")
    if isinstance(op, DepthwiseConv):
        raise InvalidInput(f"op {op.name!r}: hls4ml has no {ADDERS} of depthwise convolutions: set its strategy")
