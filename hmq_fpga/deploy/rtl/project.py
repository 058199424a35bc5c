"""RTL projects: a QNet as fully unrolled Verilog that takes one sample per clock cycle.

The hardware takes the input's *codes*: the encoding of real inputs (`QNet.encode`) belongs to whatever
comes before it, such as an ADC.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl.devices import Device
from hmq_fpga.deploy.rtl.gates import CELLS, netlist_verilog
from hmq_fpga.deploy.rtl.nextpnr import place_and_route
from hmq_fpga.deploy.rtl.stream import stream_core
from hmq_fpga.deploy.rtl.trace import (
    Interpreter,
    load_program,
    program_digest,
    stage_layers,
    trace,
    write_verilog,
)
from hmq_fpga.deploy.rtl.verilator import Port, VerilatorSimulator, compile_verilog
from hmq_fpga.deploy.rtl.yosys import synthesis_script, synthesize
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.files import replacing
from hmq_fpga.ir.network import QNet

CORE = "network"
TOP = f"{CORE}_wrapper"
STREAM = f"{CORE}_stream"


@dataclass(frozen=True, kw_only=True, eq=False)
class RtlProject:
    """A folder with the Verilog of a network, and what is known about it.

    Module `network_wrapper` has the ports `clk` (unless combinational), `model_inp` and `model_out`: the
    codes of all elements side by side, channels last, the first in the lowest bits. There is no reset and
    no handshake: what is on `model_inp` at a clock edge makes `model_out` at the edge `latency_cycles` later.
    Module `network_stream` puts AXI4-Stream ports with back-pressure around it.

    Attributes:
        net: the network.
        folder: where it was written.
        latency_cycles: clock edges from the one that takes an input to the one that finds its output; 0 for
            combinational logic.
        clock_ns: clock period in the constraint files, in ns.
        part: FPGA part in the scripts for vendor tools.
        input_port, output_port: the two ports.
        lut: look-up tables by the tracer's own cost model.
        register_bits: flip-flops in the Verilog.
        program: SHA-256 of the traced program; empty in a project of an earlier version.
        latency_cutoff: that it was made with; None: no registers, or a project of an earlier version.
    """

    net: QNet
    folder: Path
    latency_cycles: int
    clock_ns: float
    part: str
    input_port: Port
    output_port: Port
    lut: int
    register_bits: int
    program: str = ""
    latency_cutoff: float | None = None

    @classmethod
    def create(
        cls,
        net: QNet,
        folder: Path,
        *,
        latency_cutoff: float | None = 5.0,
        clock_ns: float = 5.0,
        part: str = "xcvu13p-flga2577-2-e",
    ) -> RtlProject:
        """Trace the network and write its project, replacing the folder in one step.

        Args:
            net: the network.
            folder: where to write.
            latency_cutoff: most delay between two registers, in ns of the tracer's own delay model (about
                one per level of logic); smaller means more pipeline stages. None: no registers at all.
            clock_ns: clock period for the constraint files, in ns.
            part: FPGA part for the vendor scripts.

        Raises:
            NotUnrolled: when the unrolled network is too large, a tensor too wide, or the output constant.
        """
        return cls._written(net, trace(net), folder, latency_cutoff, clock_ns, part)

    def written_again(self, folder: Path, *, latency_cutoff: float | None) -> RtlProject:
        """The same project, from the traced program in this one's folder."""
        return self._written(self.net, load_program(self.folder), folder, latency_cutoff, self.clock_ns, self.part)

    @classmethod
    def _written(
        cls, net: QNet, program: Any, folder: Path, latency_cutoff: float | None, clock_ns: float, part: str
    ) -> RtlProject:
        with replacing(folder) as new:
            inputs, outputs, latency_cycles, register_bits = write_verilog(
                program, new, CORE, latency_cutoff=latency_cutoff, part=part, clock_ns=clock_ns
            )
            project = cls(
                net=net,
                folder=folder,
                latency_cycles=latency_cycles,
                clock_ns=clock_ns,
                part=part,
                input_port=inputs,
                output_port=outputs,
                lut=round(program.cost),
                register_bits=register_bits,
                program=program_digest(new),
                latency_cutoff=latency_cutoff or None,
            )
            (new / "stream").mkdir()
            (new / "stream" / f"{STREAM}.v").write_text(project.stream_core())
            (new / "synth.ys").write_text(synthesis_script(_sources(new), TOP))
            (new / "rtl.json").write_text(json.dumps(project._description(), indent=1) + "\n")
        return project

    @classmethod
    def load(cls, net: QNet, folder: Path) -> RtlProject:
        """Open what `create` wrote for the same network.

        Raises:
            InvalidInput: when the folder is not a project, or one of another network.
        """
        try:
            data = json.loads((folder / "rtl.json").read_text())
            digest = data.pop("network")
            for key in ("input_port", "output_port"):
                data[key] = Port(**data[key])
            project = cls(net=net, folder=folder, **data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{folder}: not an RTL project, create it again: {error}") from error
        if digest != net.digest:
            raise InvalidInput(f"{folder}: is the RTL project of another network, create it again")
        return project

    @property
    def sources(self) -> tuple[Path, ...]:
        """The Verilog files."""
        return tuple(self.folder / path for path in _sources(self.folder))

    @property
    def stream_sources(self) -> tuple[Path, ...]:
        """The Verilog files of the AXI4-Stream core, module `network_stream`."""
        return (*self.sources, self.folder / "stream" / f"{STREAM}.v")

    def stream_core(self) -> str:
        """The Verilog of module `network_stream`."""
        return stream_core(STREAM, TOP, self.input_port, self.output_port, self.latency_cycles)

    def interpreter(self) -> Interpreter:
        """The simulator that is there at once: the traced program, in integers; no clock, no Verilog."""
        return Interpreter(net=self.net, program=load_program(self.folder))

    def simulator(self, *, time_limit_s: float = 3600) -> VerilatorSimulator:
        """The simulator of the Verilog itself, clock edge by clock edge; compiled in `sim/` unless it is there.

        Args:
            time_limit_s: wall-clock limit in seconds of each of the two steps, translation and compilation.

        Raises:
            ToolMissing: without Verilator or a C++ compiler.
            ToolFailed: when a step fails or passes the limit.
        """
        return self._simulator("rtl", self.folder / "sim", self.sources, time_limit_s)

    def gates(self, netlist: Path, folder: Path, *, time_limit_s: float = 3600) -> VerilatorSimulator:
        """The simulator of a routed netlist of this project, cell by cell, clock edge by clock edge.

        Args:
            netlist: the `routed.json` that `route` left.
            folder: for its Verilog and the library made of it, which is used again unless the netlist has changed.
            time_limit_s: wall-clock limit in seconds of each of the two steps, translation and compilation.

        Raises:
            InvalidInput: when it is no netlist, or has cells that are not simulated.
            ToolMissing: without Verilator or a C++ compiler.
            ToolFailed: when a step fails or passes the limit.
        """
        folder.mkdir(parents=True, exist_ok=True)
        verilog = folder / f"{CORE}_gates.v"
        verilog.write_text(netlist_verilog(netlist, TOP))
        return self._simulator("gates", folder, (verilog, CELLS), time_limit_s)

    def trace_resources(self) -> Resources:
        """The tracer's own estimate, at hand without synthesis."""
        return Resources(
            stage="trace",
            tool="alkaid",
            version=version("alkaid"),
            lut=self.lut,
            ff=self.register_bits,
            dsp=0,
            bram=0,
            latency_cycles=self.latency_cycles,
            ii=1,
            notes="the tracer's own cost model, before synthesis; fully unrolled distributed arithmetic",
        )

    def synthesize(
        self,
        *,
        time_limit_s: float = 3600,
        memory_limit_gb: float = 8,
        on_line: Callable[[str], None] | None = None,
    ) -> Resources:
        """Synthesize with Yosys; see `yosys.synthesize`."""
        counts = synthesize(self.folder, time_limit_s=time_limit_s, memory_limit_gb=memory_limit_gb, on_line=on_line)
        return replace(counts, latency_cycles=self.latency_cycles, ii=1)

    def route(
        self,
        folder: Path,
        device: Device,
        *,
        clock_ns: float | None = None,
        tries: int = 1,
        time_limit_s: float = 3600,
        memory_limit_gb: float = 8,
        on_step: Callable[[str], None] | None = None,
    ) -> Resources:
        """Place and route with nextpnr, in a folder for what that leaves; see `nextpnr.place_and_route`.

        `clock_ns` is the period to aim for, by default the project's own.
        """
        layers: list[list[str]] = []
        if self.latency_cutoff:
            layers = stage_layers(self.net, load_program(self.folder), self.latency_cutoff)
        return place_and_route(
            folder,
            self.sources,
            TOP,
            device,
            traced_luts=self.lut,
            latency_cycles=self.latency_cycles,
            clock_ns=self.clock_ns if clock_ns is None else clock_ns,
            layers={f"src/logic{number}.v": names for number, names in enumerate(layers)},
            tries=tries,
            time_limit_s=time_limit_s,
            memory_limit_gb=memory_limit_gb,
            on_step=on_step,
        )

    def _simulator(self, name: str, folder: Path, sources: Sequence[Path], time_limit_s: float) -> VerilatorSimulator:
        library = compile_verilog(
            folder,
            sources,
            TOP,
            self.input_port,
            self.output_port,
            clocked=self.latency_cycles > 0,
            time_limit_s=time_limit_s,
        )
        return VerilatorSimulator(
            net=self.net,
            library=library,
            input_port=self.input_port,
            output_port=self.output_port,
            latency_cycles=self.latency_cycles,
            name=name,
        )

    def _description(self) -> dict[str, Any]:
        data = {key: value for key, value in vars(self).items() if key not in ("net", "folder")}
        ports = {key: asdict(data.pop(key)) for key in ("input_port", "output_port")}
        return {"network": self.net.digest, **data, **ports}


def _sources(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in (folder / "src").rglob("*.v"))
