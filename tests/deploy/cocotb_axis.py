"""Runs inside Icarus: an AXI4-Stream master and a slave that stall by plan, and what they saw."""

import json
import os
from pathlib import Path

import cocotb
from cocotb.triggers import FallingEdge, ReadOnly, RisingEdge, Timer

PLANS = json.loads(Path(os.environ["AXIS_PLANS"]).read_text())


async def clock(dut):
    while True:
        dut.aclk.value = 0
        await Timer(1, "ns")
        dut.aclk.value = 1
        await Timer(1, "ns")


@cocotb.test()
async def stream(dut):
    cocotb.start_soon(clock(dut))
    seen = {name: await follow(dut, plan) for name, plan in PLANS.items()}
    Path(os.environ["AXIS_OUTPUTS"]).write_text(json.dumps(seen))


async def follow(dut, plan):
    """Offer each word after the wait that the plan says, be ready in the cycles it says; note words and cycles."""
    await FallingEdge(dut.aclk)
    dut.aresetn.value = 0
    dut.s_axis_tvalid.value = 0
    dut.m_axis_tready.value = 0
    await RisingEdge(dut.aclk)
    taken, given, held, waited = [], [], None, 0
    for cycle in range(len(plan["ready"])):
        await FallingEdge(dut.aclk)  # what is set here, the next rising edge finds
        reset = cycle in plan["resets"]
        offered = not reset and len(taken) < len(plan["words"]) and waited >= plan["waits"][len(taken)]
        dut.aresetn.value = 0 if reset else 1
        dut.s_axis_tvalid.value = int(offered)
        if offered:
            dut.s_axis_tdata.value = plan["words"][len(taken)]
            dut.s_axis_tlast.value = len(taken) % 3 == 2
        dut.m_axis_tready.value = plan["ready"][cycle]
        await ReadOnly()
        if held is not None and not reset:  # AXI: valid stays, and so does the data, until the handshake
            assert dut.m_axis_tvalid.value == 1
            assert (int(dut.m_axis_tdata.value), int(dut.m_axis_tlast.value)) == held
        held, waited = None, waited + 1
        if reset:
            assert dut.s_axis_tready.value == 0
            continue
        if offered and dut.s_axis_tready.value == 1:
            taken.append(cycle)
            waited = 0
        if dut.m_axis_tvalid.value == 1:
            word = int(dut.m_axis_tdata.value), int(dut.m_axis_tlast.value)
            if plan["ready"][cycle]:
                given.append([cycle, *word])
            else:
                held = word
    return {"taken": taken, "given": given}
