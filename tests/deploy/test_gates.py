"""The routed netlist in simulation, and its cells against those of Yosys."""

import json
import re
import subprocess
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from hmq_fpga import cli
from hmq_fpga.deploy import parity
from hmq_fpga.deploy.rtl.devices import find_device
from hmq_fpga.deploy.rtl.gates import CELLS, netlist_verilog
from hmq_fpga.deploy.rtl.project import TOP, RtlProject
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.run import hardware
from tests.deploy.networks import run_folder, small_mlp
from tests.outside import needs_nextpnr

# one instance of each of ours beside Yosys's, and the same random inputs for both
BENCH = """
module bench;
    reg [11:0] i = 0;
    reg clk = 0;
    reg [15:0] lcg = 1;
    integer wrong = 0;
    wire {wires};
    {instances}
    initial begin
        repeat ({steps}) begin
            #1;
            {checks}
            clk = 1;
            #1 clk = 0;
            #1;
            lcg = lcg * 16'd25173 + 16'd13849;
            i = i + 1;
            if ({random}) i = lcg[15:4];
        end
        $display("wrong %0d", wrong);
        $finish;
    end
endmodule
"""


def luts(number: int = 12) -> list[str]:
    return [f"16'h{value:04x}" for value in (0x8000, 0x0001, *np.random.default_rng(0).integers(0, 1 << 16, number))]


def bench(folder: Path, instances: list[str], pairs: list[tuple[str, str]], *, random: int, steps: int = 4096) -> str:
    """What a simulation of ours and theirs says; `pairs` are nets that must be equal."""
    share = Path(find_spec("pyosys").origin).parent / "share"
    ours = CELLS.read_text().replace("\nmodule ", "\nmodule our_")
    checks = "\n".join(f"if ({a} !== {b}) wrong = wrong + 1;" for a, b in pairs)
    wires = ", ".join(sorted({net for pair in pairs for net in pair}))
    text = BENCH.format(wires=wires, instances="\n".join(instances), checks=checks, random=random, steps=steps)
    files = ("lattice/common_sim.vh", "lattice/ccu2c_sim.vh", "ice40/cells_sim.v")
    theirs = "\n".join((share / file).read_text() for file in files)
    wanted = "LUT2|LUT4|PFUMX|L6MUX21|TRELLIS_FF|CCU2C|ICESTORM_LC"
    modules = "\n".join(found[0] for found in re.finditer(rf"^module ({wanted}) ?\(.*?^endmodule", theirs, re.S | re.M))
    modules = re.sub(r"\(\*.*?\*\)|\bspecify\b.*?\bendspecify\b", "", modules, flags=re.S)
    (folder / "bench.v").write_text(f"{modules}\n{ours}\n{text}")
    out = folder / "bench"
    command = ["iverilog", "-g2012", "-s", "bench", "-o", out, folder / "bench.v"]
    subprocess.run(command, check=True, timeout=60)
    return subprocess.run(["vvp", out], check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_logic_cells_of_ecp5_are_those_of_yosys(tmp_path):
    instances, pairs = [], []
    inputs = ".A(i[0]), .B(i[1]), .C(i[2]), .D(i[3])"
    for k, init in enumerate(luts()):
        instances += [
            f"our_TRELLIS_COMB #(.INITVAL({init})) a{k} ({inputs}, .M(i[4]), .F1(i[5]), .F(f{k}), .OFX(x{k}));",
            f"LUT4 #(.INIT({init})) b{k} ({inputs}, .Z(g{k}));",
            f"PFUMX c{k} (.ALUT(i[5]), .BLUT(g{k}), .C0(i[4]), .Z(y{k}));",
            f"our_TRELLIS_COMB #(.SECOND(1)) d{k} (.FXA(i[6]), .FXB(i[7]), .M(i[{k % 6}]), .OFX(u{k}));",
            f"L6MUX21 e{k} (.D0(i[6]), .D1(i[7]), .SD(i[{k % 6}]), .Z(v{k}));",
        ]
        pairs += [(f"f{k}", f"g{k}"), (f"x{k}", f"y{k}"), (f"u{k}", f"v{k}")]
    assert "wrong 0" in bench(tmp_path, instances, pairs, random=0, steps=512)


def test_the_carry_cells_of_ecp5_are_those_of_yosys(tmp_path):
    instances, pairs = [], []
    for k, (init, (first, second)) in enumerate(zip(luts(), list(product(("YES", "NO"), repeat=2)) * 4, strict=False)):
        low, high = (", ".join(f".{p}{{}}(i[{n + o}])" for n, p in enumerate("ABCD")) for o in (0, 4))
        mode = '.MODE("CCU2"), .CCU2_INJECT1'
        other = "16'h96aa"
        instances += [
            f'our_TRELLIS_COMB #({mode}("{first}"), .INITVAL({init})) a{k} ({low.format(*[""] * 4)}, .FCI(i[8]), '
            f".F(s{k}), .FCO(m{k}));",
            f'our_TRELLIS_COMB #({mode}("{second}"), .INITVAL({other})) b{k} ({high.format(*[""] * 4)}, .FCI(m{k}), '
            f".F(t{k}), .FCO(o{k}));",
            f'CCU2C #(.INIT0({init}), .INIT1({other}), .INJECT1_0("{first}"), .INJECT1_1("{second}")) c{k} '
            f"({low.format(*'0000')}, {high.format(*'1111')}, .CIN(i[8]), .S0(p{k}), .S1(q{k}), .COUT(r{k}));",
        ]
        pairs += [(f"s{k}", f"p{k}"), (f"t{k}", f"q{k}"), (f"o{k}", f"r{k}")]
    assert "wrong 0" in bench(tmp_path, [f"wire m{k};" for k in range(len(luts()))] + instances, pairs, random=0)


def test_the_registers_are_those_of_yosys(tmp_path):
    instances, pairs = [], []
    choices = product(("1", "0", "CE", "INV"), ("LSR", "INV"), ("SET", "RESET"), ("LSR_OVER_CE", "CE_OVER_LSR"))
    for k, (enable, mux, value, mode) in enumerate(choices):
        if mode == "CE_OVER_LSR":
            continue  # Yosys's model has no such mode
        common = f'.CEMUX("{enable}"), .LSRMUX("{mux}"), .REGSET("{value}"), .SRMODE("{mode}")'
        ports = ".CLK(clk), .CE(i[0]), .LSR(i[1])"
        instances += [
            f"our_TRELLIS_FF #({common}) a{k} ({ports}, .DI(i[2]), .M(i[3]), .Q(f{k}));",
            f'our_TRELLIS_FF #({common}, .SD("0")) b{k} ({ports}, .DI(i[3]), .M(i[2]), .Q(g{k}));',
            f"TRELLIS_FF #({common}) c{k} ({ports}, .DI(i[2]), .M(1'b0), .Q(h{k}));",
        ]
        pairs += [(f"f{k}", f"h{k}"), (f"g{k}", f"h{k}")]
    assert "wrong 0" in bench(tmp_path, instances, pairs, random=1)


def test_the_cells_of_ice40_are_those_of_yosys(tmp_path):
    instances, pairs = [], []
    ports = ".I0(i[0]), .I1(i[1]), .I2(i[2]), .I3(i[3]), .CIN(i[4]), .CLK(clk), .CEN(i[5]), .SR(i[6])"
    flags = ("CIN_CONST", "CIN_SET", "DFF_ENABLE", "NEG_CLK", "SET_NORESET")
    for k, values in enumerate(product((0, 1), repeat=len(flags))):
        set_to = ", ".join(f".{flag}({value})" for flag, value in zip(flags, values, strict=True))
        common = f"#(.LUT_INIT({luts(40)[k]}), .CARRY_ENABLE(1), {set_to})"
        for who, (o, lo, co) in {"our_ICESTORM_LC": "fgh", "ICESTORM_LC": "pqr"}.items():
            instances.append(f"{who} {common} {o}_{k} ({ports}, .O({o}{k}), .LO({lo}{k}), .COUT({co}{k}));")
        pairs += [(f"f{k}", f"p{k}"), (f"g{k}", f"q{k}"), (f"h{k}", f"r{k}")]
    assert "wrong 0" in bench(tmp_path, instances, pairs, random=1)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> RtlProject:
    return RtlProject.create(small_mlp(), tmp_path_factory.mktemp("gates") / "rtl", latency_cutoff=4.0)


def flip_a_table(netlist: Path) -> None:
    """Turn round what one look-up table with as many inputs as can be computes."""
    content = json.loads(netlist.read_text())
    cells = content["modules"][TOP]["cells"].values()
    busiest = max(cells, key=lambda cell: sum(bool(bits) for bits in cell["connections"].values()))["parameters"]
    name = "INITVAL" if "INITVAL" in busiest else "LUT_INIT"
    busiest[name] = "".join("10"[int(bit)] for bit in busiest[name])
    netlist.write_text(json.dumps(content))


@needs_nextpnr
def test_the_routed_netlist_computes_the_network_and_a_wrong_table_in_it_is_caught(project, tmp_path, samples):
    project.route(tmp_path, find_device("ecp5-25k"), time_limit_s=300)
    x, netlist = samples(project.net), tmp_path / "routed.json"
    result = parity.check(project.net, [project.gates(netlist, tmp_path / "gates")], x)
    result.raise_for_mismatch()
    assert list(result.simulators) == ["gates"]
    flip_a_table(netlist)
    with pytest.raises(parity.ParityError, match="gates: "):
        parity.check(project.net, [project.gates(netlist, tmp_path / "gates")], x).raise_for_mismatch()


@needs_nextpnr
def test_the_command_compares_the_gates(project, tmp_path, samples, monkeypatch, capsys):
    run = run_folder(project, tmp_path / "run")
    monkeypatch.setattr("hmq_fpga.study.run.pipeline.samples_of", lambda folder: samples(project.net))
    options = ("--tool", "nextpnr", "--device", "ice40-up5k", "--gates", "--json")
    assert cli.app(["synth", str(run), *options], standalone_mode=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert [record["stage"] for record in found["resources"]] == ["trace", "route"]
    assert found["parity"]["passed"] and found["parity"]["simulators"]["gates"]["mismatches"] == 0
    assert found["parity"]["made"]["samples"] > 0
    made = run / "synth" / "nextpnr"
    assert json.loads((made / "parity.json").read_text()) == found["parity"]
    flip_a_table(made / "routed.json")
    assert not hardware.compare_gates(run, time_limit_s=None, said=lambda step: None).passed
    assert not json.loads((made / "parity.json").read_text())["passed"]


def netlist(folder: Path, kind: str, parameters: dict, connections: dict) -> Path:
    cell = {"type": kind, "parameters": parameters, "connections": connections}
    path = folder / "routed.json"
    path.write_text(json.dumps({"modules": {TOP: {"ports": {}, "cells": {"odd": cell}}}}))
    return path


def test_cells_that_are_not_simulated_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="'odd' is a MULT18X18D, which is not simulated"):
        netlist_verilog(netlist(tmp_path, "MULT18X18D", {}, {}), TOP)
    with pytest.raises(InvalidInput, match="TRELLIS_COMB with MODE DPRAM"):
        netlist_verilog(netlist(tmp_path, "TRELLIS_COMB", {"MODE": "DPRAM"}, {}), TOP)
    with pytest.raises(InvalidInput, match="port WD of TRELLIS_COMB"):
        netlist_verilog(netlist(tmp_path, "TRELLIS_COMB", {}, {"WD": [2]}), TOP)
    with pytest.raises(InvalidInput, match="not a routed netlist"):
        netlist_verilog(tmp_path / "nothing.json", TOP)


def test_inputs_without_a_net_are_what_the_device_makes_of_them(tmp_path):
    comb = netlist_verilog(netlist(tmp_path, "TRELLIS_COMB", {"INITVAL": "01"}, {"A": [5], "B": ["0"], "C": []}), TOP)
    assert "TRELLIS_COMB #(.INITVAL(2'b01)) c0 (.A(n5), .B(1'b0), .C(1'b1), .D(1'b1), .M(1'b0)," in comb
    assert '.CEMUX("1")' in netlist_verilog(netlist(tmp_path, "TRELLIS_FF", {"CEMUX": "1 "}, {}), TOP)
