"""What is known to stop Vivado HLS or Vitis HLS, told from a network and its settings before either runs.

hls4ml's scripts let an array have 4,096 registers (`config_array_partition -maximum_size 4096`). Beyond, Vivado HLS
ends with

    ERROR: [XFORM 203-103] Array 'mult.V' (…/nnet_dense.h:60): partitioned elements number (4096) has exeeded the
    threshold (1024), which may cause long run-time.

and for loops with more operations than that, which hls4ml unrolls, with

    ERROR: [XFORM 203-504] Stop unrolling loop 'MultLoop' (…/nnet_dense_resource.h:52) … because it may cause large
    runtime and excessive memory usage due to increase in code size.

(github.com/fastmachinelearning/hls4ml, issues 79, 134, 903, 904, 1013 and 1157.) Vitis HLS has that option no more
(pull request 86 there), and no number at which it stops is known to us; the arrays and loops that it is given are the
same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hmq_fpga.deploy.hls.lower import View, lowered, makers
from hmq_fpga.deploy.hls.settings import ADDERS, AMD
from hmq_fpga.deploy.settings import Hardware, LayerSettings, Strategy
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Flatten, Input, Linear, Scale

REGISTERS = 4096  # elements of an array, and operations of a loop


def limits(net: QNet, hardware: Hardware, reuse_factors: Mapping[str, int]) -> list[str]:
    """One line for each thing in an hls4ml project that is known to stop HLS, with the setting that avoids it.

    And one for each reuse factor that hls4ml changed.

    Args:
        net: the network.
        hardware: how its project was made; of what stops a back end that is not AMD's nothing is known here.
        reuse_factors: that hls4ml took, by op.
    """
    amd = hardware.backend in AMD
    made = lowered(net, hardware.io_type).net
    made_by = makers(made)
    lines = []
    for op in made.ops:
        if made_by[op.name] != op.name or isinstance(op, Input | Flatten | View):
            continue  # no array of its own
        if amd and hardware.io_type == "io_parallel" and (values := math.prod(made.shapes[op.name])) > REGISTERS:
            lines.append(
                f"{op.name}: an array of {values:,} values in registers, and above {REGISTERS:,} HLS may stop or take "
                "hours: --io-type io_stream"
            )
        if isinstance(op, Linear) and not isinstance(op, Scale):
            own = hardware.layers.get(op.name, LayerSettings())
            wished = own.reuse_factor or hardware.reuse_factor
            if (taken := reuse_factors.get(op.name, wished)) != wished:
                lines.append(f"{op.name}: reuse factor {taken}, the nearest to {wished} that divides its work")
            if amd:
                lines += _of_products(op, own.strategy or hardware.strategy, taken)
    return lines


def _of_products(op: Linear, strategy: Strategy, reuse_factor: int) -> list[str]:
    """What is known of the multiplications of one position of an op, all of which strategy Latency unrolls."""
    if strategy == ADDERS:
        return []
    products = op.weight.size
    unrolled = products if strategy == "Latency" else -(-products // reuse_factor)
    if unrolled <= REGISTERS:
        return []
    outputs = op.weight.shape[-1]
    least = next(f for f in valid_reuse_factors(products // outputs, outputs) if products <= f * REGISTERS)
    return [
        f"{op.name}: {unrolled:,} multiplications of one unrolled loop by strategy {strategy}, and above {REGISTERS:,} "
        f"HLS may stop or take hours: strategy Resource with a reuse factor of {least} or more"
    ]


def valid_reuse_factors(inputs: int, outputs: int) -> list[int]:
    """The reuse factors that hls4ml's strategy Resource has for a product of a vector and a matrix, ascending."""
    products = inputs * outputs
    divisors = [factor for factor in range(1, products + 1) if products % factor == 0]
    return [factor for factor in divisors if (inputs % factor == 0 if factor < inputs else factor % inputs == 0)]
