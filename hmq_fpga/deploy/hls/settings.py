"""Whether hls4ml can make a project of a network with the settings that were chosen."""

from __future__ import annotations

from importlib.util import find_spec
from typing import get_args

from hmq_fpga.deploy.hls.lower import lowered
from hmq_fpga.deploy.settings import Hardware, HlsBackend, IoType, LayerSettings, Strategy
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import AvgPool, DepthwiseConv, Gather, Input, Linear, Op, Quantize, Scale, Table

ADDERS = "distributed_arithmetic"
AMD = ("Vitis", "Vivado", "VivadoAccelerator")  # backends of one family of C++
_AXI_BITS = 24  # of the significand of the floats at its interface
_WITHOUT_GXX = {  # backends, and why there would be no C simulation to compare
    "oneAPI": "compiles its C++ by Intel's icpx and its libraries for SYCL",
    "Libero": "compiles its C++ by Microchip's SmartHLS",
}


def check_settings(net: QNet, hardware: Hardware) -> None:
    """Raise `InvalidInput` where a project cannot be made of a network with these settings.

    Only its ops count, not its numbers: one that is not trained yet will do.
    """
    strategies = [hardware.strategy, *(s.strategy for s in hardware.layers.values() if s.strategy)]
    chosen = ((hardware.backend, HlsBackend), (hardware.io_type, IoType), *((s, Strategy) for s in strategies))
    for value, choices in chosen:
        if value not in get_args(choices):
            raise InvalidInput(f"{value!r} is none of {', '.join(get_args(choices))}")
    check_backend(net, hardware)
    if unknown := sorted(set(hardware.layers) - {op.name for op in net.linears}):
        names = ", ".join(op.name for op in net.linears)
        raise InvalidInput(f"layer {unknown[0]!r} has no reuse factor or strategy; these layers have: {names}")
    for op in net.linears:
        own = hardware.layers.get(op.name, LayerSettings())
        strategy, reuse_factor = own.strategy or hardware.strategy, own.reuse_factor or hardware.reuse_factor
        _check_strategy(op, strategy, reuse_factor, hardware)


def check_backend(net: QNet, hardware: Hardware) -> None:
    """Refuse a backend that g++ does not compile, or that has no exact layer for what a network needs."""
    backend = hardware.backend
    if reason := _WITHOUT_GXX.get(backend):
        raise InvalidInput(
            f"backend {backend!r}: hls4ml {reason}, not by g++, so its integers cannot be compared here: "
            "choose another backend"
        )
    if backend == "VivadoAccelerator":
        if len(net.inputs) + len(net.outputs) > 2 or net.output_format.width > _AXI_BITS:
            raise InvalidInput(
                f"backend {backend!r}: its interface has one input and one output, which are floats of {_AXI_BITS} "
                "bits: choose Vitis or Vivado"
            )
    elif backend not in AMD:
        if hardware.io_type == "io_stream":
            raise InvalidInput(f"backend {backend!r}: is compared with io_parallel alone: choose that")
        for op in lowered(net, hardware.io_type).net.ops:
            if reason := _lacks(op):
                raise InvalidInput(f"op {op.name!r}: hls4ml's {backend} {reason}: choose Vitis or Vivado")


def _lacks(op: Op) -> str | None:
    """Why a backend for other compilers has no exact layer for an op of a lowered network; None where it has."""
    match op:
        case Table() | Gather():
            return f"has no {type(op).__name__}"
        case DepthwiseConv():
            return "has no exact depthwise convolution"
        case AvgPool():
            return "has a type of its own inside an AvgPool"
        case Input() | Quantize() if op.format.width == 1:
            return "makes two bits of one"
        case _:
            return None


def _check_strategy(op: Linear, strategy: Strategy, reuse_factor: int, hardware: Hardware) -> None:
    """Refuse distributed arithmetic where it is not installed, and a strategy that hls4ml does not have for an op."""
    if (
        isinstance(op, DepthwiseConv) and strategy == "Resource" and hardware.io_type == "io_parallel"
    ):  # computes nothing
        raise InvalidInput(
            f"op {op.name!r}: hls4ml's io_parallel has no Resource strategy of depthwise convolutions: set its "
            "strategy to Latency, or use io_stream"
        )
    if isinstance(op, Scale) or strategy != ADDERS:
        return
    if hardware.backend not in ("Vitis", "Vivado"):
        raise InvalidInput(f"strategy {ADDERS!r}: hls4ml's {hardware.backend} has it not: choose Vitis or Vivado")
    if find_spec("da4ml") is None:
        raise InvalidInput(f"strategy {ADDERS!r} needs da4ml, which is not installed: pip install 'hmq-fpga[da]'")
    if reuse_factor != 1:
        raise InvalidInput(f"op {op.name!r}: {ADDERS} has no multipliers to reuse: set its reuse factor to 1")
    if isinstance(op, DepthwiseConv):
        raise InvalidInput(f"op {op.name!r}: hls4ml has no {ADDERS} of depthwise convolutions: set its strategy")
