"""Placed, routed and timed by open tools: Yosys for the family of the device, then nextpnr.

Every port of the Verilog but its clock begins or ends at a register, so nothing between a pad and a register is part of
the network. The ports are therefore made internal wires before placement: no pads are needed, however wide a network's
input is, each path of its logic is timed, and the clock has its pad and its global net. There is no bitstream;
`routed.json` is the routed netlist, with the ports again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl.devices import DEVICES, Device, Family
from hmq_fpga.deploy.rtl.yosys import require_yosys, run_script
from hmq_fpga.deploy.toolchain import Tool, ToolFailed, run
from hmq_fpga.ir.errors import InvalidInput

SCRIPT, SYNTHESIS_LOG, CELLS = "synth.ys", "yosys.log", "cells.json"
NETLIST = "netlist.json"  # by Yosys, with all ports
CORE = "core.json"  # the same with the clock as its only port
ROUTED = "routed.json"
CLOCK, INPUT, OUTPUT = "clk", "model_inp", "model_out"
FAR_ABOVE = 1.5  # the tracer's figure to what the device holds, where nothing is synthesized

_STEPS = {  # how a line of the log begins, and what it says to people
    "Info: Packing": "packing",
    "Info: Creating initial": "placing",
    "Info: Running simulated annealing": "refining the placement",
    "Info: Routing": "routing",
}
_CONSTANTS = {
    "GND": "0",
    "VCC": "1",
    "VLO": "0",
    "VHI": "1",
}  # cells of families that have such; nextpnr makes others of them
_USED = re.compile(r"Info:\s+(\w+):\s*(\d+)/\s*(\d+)\s+\d+%")
_STAGE = re.compile(r"\b(?:stage|(?:INTERNAL_|_inst_)logic)(\d+)")
# processes of their own bound the memory and can be stopped at any time; a WebAssembly machine reserves addresses of
# which it uses few, so what counts is written memory
_LIMIT = "import os, resource, sys\nresource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))\n"
_PACKAGE = _LIMIT + "from {module} import run_{function}\nsys.exit(run_{function}(sys.argv[2:]))\n"
_PROGRAM = _LIMIT + "os.execv(sys.argv[2], sys.argv[2:])\n"


class DoesNotFit(InvalidInput):
    """The network is larger than the device; the message has the numbers."""


@dataclass(frozen=True, kw_only=True)
class Nextpnr(Tool):
    """nextpnr of a family: from the variable, else the Python package, else PATH."""

    family: Family

    def find(self) -> str | None:
        """The program, or the module of the package that has it."""
        module = self._module()
        if importlib.util.find_spec(module) and not os.environ.get(self.variable):
            return module
        return super().find()

    def command(self, memory_limit_gb: float) -> list[str]:
        """What to run before its own arguments.

        Raises:
            ToolMissing: when it is not there.
        """
        found, limit = self.require(), str(int(memory_limit_gb * 1e9))
        if found != self._module():
            return [sys.executable, "-c", _PROGRAM, limit, found]
        return [sys.executable, "-c", _PACKAGE.format(module=found, function=self.function), limit]

    @property
    def function(self) -> str:
        """What the package calls it, behind `run_`."""
        return self._module().removeprefix("yowasp_")

    def version(self) -> str | None:
        """Of the package, or what the program says."""
        if (found := self.require()) == self._module():
            return version(self.family.package)
        told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False)
        match = re.search(r"Version ([^)\s]+)", told.stdout + told.stderr)
        return match[1] if match else None

    def _module(self) -> str:
        return self.family.package.replace("-", "_")


def tool(family: Family) -> Nextpnr:
    """The nextpnr of a family."""
    return Nextpnr(
        program=family.program,
        variable=f"HMQ_FPGA_{family.program.upper().replace('-', '_')}",
        purpose=f"place and route the Verilog on {family.name} devices",
        remedy="pip install 'hmq-fpga[route]'",
        family=family,
    )


TOOLS = tuple(tool(family) for family in {device.family.name: device.family for device in DEVICES.values()}.values())


def require_tools(device: Device) -> None:
    """Raise `ToolMissing` unless Yosys and the nextpnr of the device are there."""
    require_yosys()
    tool(device.family).require()


def synthesis_script(sources: Sequence[str], top: str, family: Family) -> str:
    """The Yosys script for a family."""
    return "\n".join(
        [
            f"read_verilog -sv -defer {' '.join(sources)}",
            f"{family.synthesis} -top {top}",
            f"write_json {NETLIST}",
            f"delete -port w:{INPUT} w:{OUTPUT}",
            *family.pads,
            f"write_json {CORE}",
            f"tee -q -o {CELLS} stat -json",
            "",
        ]
    )


def place_and_route(
    folder: Path,
    sources: Sequence[Path],
    top: str,
    device: Device,
    *,
    traced_luts: int,
    latency_cycles: int,
    clock_ns: float,
    layers: Mapping[str, Sequence[str]],
    tries: int = 1,
    time_limit_s: float = 3600,
    memory_limit_gb: float = 8,
    on_step: Callable[[str], None] | None = None,
) -> Resources:
    """Synthesize, place, route and time; the best of several placements is kept.

    Args:
        folder: for the script, logs, netlists and nextpnr's reports; made if need be.
        sources: the Verilog files.
        top: their top module, whose ports are `clk`, `model_inp` and `model_out`, all of which end at registers.
        device: where to place it.
        traced_luts: the tracer's figure, to refuse at once what is far too large.
        latency_cycles: clock cycles from input to output; not 0, since what has no register has no clock.
        clock_ns: clock period to aim for, in ns.
        layers: ops of the network that a file of the Verilog works on, by its name, as far as that is known.
        tries: placements, of seeds from 1 on.
        time_limit_s: wall-clock limit of the synthesis and of each placement, in seconds.
        memory_limit_gb: of the same, in GB.
        on_step: hears in words what begins.

    Returns:
        A record of stage `route`.

    Raises:
        ToolMissing: without pyosys or nextpnr.
        ToolFailed: when one fails or passes a limit; the message names its log.
        DoesNotFit: when the device is too small.
        InvalidInput: for combinational logic.
    """
    if latency_cycles == 0:
        raise InvalidInput("the Verilog has no registers, hence no clock to route for: give a latency cutoff above 0")
    if tries < 1:
        raise InvalidInput(f"tries {tries}: give at least 1")
    require_tools(device)
    say = on_step or (lambda _: None)
    if traced_luts > FAR_ABOVE * device.luts:
        raise _too_large(device, f"{traced_luts:,} LUT by the tracer's figure, before synthesis")
    folder.mkdir(parents=True, exist_ok=True)
    for old in (ROUTED, NETLIST, CORE):
        (folder / old).unlink(missing_ok=True)
    say(f"synthesizing for {device.family.name}")
    files = [os.path.relpath(path.resolve(), folder.resolve()) for path in sources]
    (folder / SCRIPT).write_text(synthesis_script(files, top, device.family))
    run_script(folder, SCRIPT, SYNTHESIS_LOG, CELLS, time_limit_s=time_limit_s, memory_limit_gb=memory_limit_gb)
    cells: dict[str, int] = json.loads((folder / CELLS).read_text())["design"]["num_cells_by_type"]

    def total(*prefixes: str) -> int:
        return sum(number for cell, number in cells.items() if cell.startswith(prefixes))

    flip_flops = total(device.family.flip_flops)
    luts = sum(weight * cells.get(cell, 0) for cell, weight in device.family.cells.items())
    if luts > device.luts or flip_flops > device.flip_flops:
        raise _too_large(device, f"{luts:,} LUT and {flip_flops:,} FF by Yosys, before placement")
    if device.constraints:
        (folder / device.constraints[0]).write_text(device.constraints[1])
    reports = []
    for seed in range(1, tries + 1):
        steps = _Steps(say, f", placement {seed} of {tries}" if tries > 1 else "")
        reports.append(_placed(folder, device, seed, clock_ns, time_limit_s, memory_limit_gb, steps.hear))
    best = max(range(tries), key=lambda i: reports[i].fmax_mhz)
    for seed in range(1, tries + 1):
        if seed == best + 1:
            _with_ports(folder, _routed(seed), top)
        (folder / _routed(seed)).unlink(missing_ok=True)
    path = reports[best].critical_path
    report = replace(reports[best], critical_path={**path, "layers": list(layers.get(path["file"], ()))})
    memories, units = device.family.bram
    return Resources(
        stage="route",
        tool="nextpnr",
        version=tool(device.family).version(),
        part=device.part,
        device=device.name,
        clock_ns=clock_ns,
        achieved_clock_ns=round(1e3 / report.fmax_mhz, 3),
        fmax_mhz=round(report.fmax_mhz, 2),
        latency_ns=round(1e3 * latency_cycles / report.fmax_mhz, 2),
        lut=sum(report.used[kind] for kind in device.family.logic_cells),
        ff=flip_flops,
        carry=cells.get(device.family.carry, 0),
        dsp=total(device.family.dsp),
        bram=math.ceil(units * total(*memories)),
        latency_cycles=latency_cycles,
        ii=1,
        critical_path=report.critical_path,
        notes=_notes(device, cells, report, [r.fmax_mhz for r in reports]),
    )


@dataclass
class _Steps:
    """Says each step of nextpnr once, from the lines of its log."""

    say: Callable[[str], None]
    which: str
    said: str = ""

    def hear(self, line: str) -> None:
        for begins, step in _STEPS.items():
            if line.startswith(begins) and step != self.said:
                self.said = step
                self.say(f"{step}{self.which}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What nextpnr says of one placement.

    Attributes:
        fmax_mhz: highest clock, in MHz.
        used: places that are taken, by their kind.
        critical_path: as in `Resources`.
    """

    fmax_mhz: float
    used: Mapping[str, int]
    critical_path: Mapping[str, Any]


def read_report(text: str) -> Report:
    """Read the JSON that nextpnr writes with `--report`, of a design with one clock."""
    content = json.loads(text)
    (clock,) = content["fmax"].values()
    name = next(iter(content["fmax"]))
    path = next(p["path"] for p in content["critical_paths"] if p["from"] == p["to"] == f"posedge {name}")
    total = {True: 0.0, False: 0.0}
    for part in path:
        total[part["type"] == "routing"] += part["delay"]
    source, sink = path[0]["from"]["cell"], path[-1]["to"]["cell"]
    return Report(
        fmax_mhz=clock["achieved"],
        used={kind: places["used"] for kind, places in content["utilization"].items()},
        critical_path={
            "logic_ns": round(total[False], 3),
            "routing_ns": round(total[True], 3),
            "source": source,
            "sink": sink,
            "file": _file_of(source),
        },
    )


def _file_of(source: str) -> str | None:
    """The Verilog between the registers that begin a path and the next ones: `logicN.v` reads registers `stageN`."""
    if match := _STAGE.search(source):
        return f"src/logic{match[1]}.v"
    return "src/logic0.v" if INPUT in source else None


def _placed(
    folder: Path,
    device: Device,
    seed: int,
    clock_ns: float,
    time_limit_s: float,
    memory_limit_gb: float,
    on_line: Callable[[str], None],
) -> Report:
    log, report = folder / f"nextpnr-{seed}.log", folder / f"report-{seed}.json"
    report.unlink(missing_ok=True)
    # names without a folder: the package's programs see no absolute path below /tmp
    files = ("--json", CORE, "--write", _routed(seed), "--report", report.name)
    goal = ("--freq", f"{1e3 / clock_ns:.6g}", "--timing-allow-fail", "--seed", str(seed))
    command = [*tool(device.family).command(memory_limit_gb), *device.flags, *device.family.flags, *files, *goal]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:  # a package that is stopped leaves its own
        environment = {**os.environ, "TMPDIR": scratch}
        code = run(command, cwd=folder, log=log, time_limit_s=time_limit_s, env=environment, on_line=on_line)
    if code or not report.exists():
        told = log.read_text(errors="replace")
        if "no BELs remaining" in told and (counts := overflowing(told)):
            raise _too_large(device, counts)
        raise ToolFailed(
            f"{device.family.program} failed with exit code {code} (memory limit {memory_limit_gb:g} GB); "
            f"its log is {log}"
        )
    return read_report(report.read_text())


def overflowing(log: str) -> str:
    """The kinds of places of which a log says that more are needed than there are."""
    found = {kind: (int(used), int(there)) for kind, used, there in _USED.findall(log)}
    return " and ".join(f"{used:,} {kind} of {there:,}" for kind, (used, there) in found.items() if used > there)


def _too_large(device: Device, needs: str) -> DoesNotFit:
    larger = [other.name for other in DEVICES.values() if other.luts > device.luts]
    remedy = f"give a larger device ({', '.join(larger)}) or " if larger else "give "
    return DoesNotFit(
        f"does not fit {device.name}, which has {device.luts:,} LUT and {device.flip_flops:,} FF: {needs}; "
        f"{remedy}a network of fewer LUTs"
    )


def _notes(device: Device, cells: Mapping[str, int], report: Report, found: Sequence[float]) -> str:
    path, family = report.critical_path, device.family
    of = f" of {', '.join(path['layers'])}" if path["layers"] else ""
    place = f", in {path['file']}{of}" if path["file"] else ""
    places = " and ".join(family.logic_cells)
    counts = ", ".join(f"{cells.get(cell, 0):,} {cell}" for cell in dict.fromkeys([*family.cells, family.carry]))
    chosen = f"the best of {len(found)} placements ({min(found):.1f} … {max(found):.1f} MHz)" if len(found) > 1 else ""
    return "; ".join(
        line
        for line in (
            f"the core alone, without pads for its data; LUT are {places} in use, for {counts} by Yosys",
            chosen,
            f"critical path {path['logic_ns']:.1f} ns logic, {path['routing_ns']:.1f} ns routing{place}",
            f"figures of {device.name}, not to be quoted as another device's",
        )
        if line
    )


def _routed(seed: int) -> str:
    return f"routed-{seed}.json"


def _with_ports(folder: Path, routed: str, top: str) -> None:
    """Write `routed.json`: a routed netlist under the name of its top module, with the ports that Yosys has."""
    synthesized = json.loads((folder / NETLIST).read_text())["modules"][top]
    ports = synthesized["ports"]
    constants = {
        bit: _CONSTANTS[cell["type"]]
        for cell in synthesized["cells"].values()
        if cell["type"] in _CONSTANTS
        for (bit,) in cell["connections"].values()
    }
    netlist = json.loads((folder / routed).read_text())
    (module,) = netlist["modules"].values()
    bits = {name: net["bits"][0] for name, net in module["netnames"].items() if len(net["bits"]) == 1}
    unused = 1 + max(bit for bit in bits.values() if isinstance(bit, int))
    restored: dict[str, Any] = {}
    for name in (INPUT, OUTPUT):
        own = ports[name]["bits"]
        nets = [f"{name}[{i}]" for i in range(len(own))] if len(own) > 1 else [name]
        net_of = constants | {bit: bits[net] for bit, net in zip(own, nets, strict=True) if net in bits}
        places = []
        for bit in own:
            if isinstance(bit, int) and bit not in net_of:
                if name == OUTPUT:
                    raise ToolFailed(f"{folder / routed}: the net of a bit of {name} is not found in it")
                net_of[bit], unused = unused, unused + 1  # nothing reads it
            places.append(net_of.get(bit, bit))
        restored[name] = {"direction": ports[name]["direction"], "bits": places}
    module["ports"] |= restored
    netlist["modules"] = {top: module}
    new = folder / f".{ROUTED}.new"
    new.write_text(json.dumps(netlist))
    new.replace(folder / ROUTED)
