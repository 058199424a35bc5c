"""What a user chooses about hardware: one record, read by every back end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

HlsBackend = Literal["Vitis", "Vivado", "VivadoAccelerator", "Quartus", "Catapult", "oneAPI", "Libero"]
IoType = Literal["io_parallel", "io_stream"]
Strategy = Literal["Latency", "Resource", "distributed_arithmetic"]
Estimate = Literal["trace", "model", "rtl", "route", "none"]

DEFAULT_PART = "xcvu13p-flga2577-2-e"


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What one layer does differently from the project; None is the project's.

    Attributes:
        reuse_factor: multiplications per multiplier.
        strategy: hls4ml's for matrix products; `distributed_arithmetic` needs da4ml and a reuse factor of 1.
    """

    reuse_factor: int | None = None
    strategy: Strategy | None = None


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """How a network is to be built.

    Attributes:
        backend: whose C++ hls4ml writes; that of oneAPI and Libero is refused, since no g++ compiles it.
        io_type: arrays or streams between the layers of the HLS project.
        part: FPGA part; the default is for the backends of AMD, and hls4ml's own takes its place in others.
        clock_ns: clock period in ns.
        reuse_factor: multiplications per multiplier of the HLS project, or what is nearest to it in a layer.
        strategy: hls4ml's for matrix products.
        layers: reuse factor and strategy of single linear ops, by name.
        latency_cutoff: of the Verilog: most delay between two registers, in ns of the tracer's own delay model; 0: no
            registers.
        estimate: how much to find out without vendor tools: `trace`, Verilog and its tracer's figures; `rtl`, also
            simulated by Verilator and synthesized by Yosys; `route`, placed and routed by nextpnr in place of these;
            `model`, a fitted formula alone; `none`.
        route_device: what the estimate `route` places on; None: the default of `rtl.devices`.
    """

    backend: HlsBackend = "Vitis"
    io_type: IoType = "io_parallel"
    part: str = DEFAULT_PART
    clock_ns: float = 5.0
    reuse_factor: int = 1
    strategy: Strategy = "Latency"
    layers: Mapping[str, LayerSettings] = field(default_factory=dict)
    latency_cutoff: float = 5.0
    estimate: Estimate = "trace"
    route_device: str | None = None
