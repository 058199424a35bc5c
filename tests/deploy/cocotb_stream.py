"""Runs inside Icarus: one clock edge at a time, with nothing but the two ports to look at."""

import json
import os
from pathlib import Path

import cocotb
from cocotb.triggers import Timer
from cocotb.types import LogicArray

PLAN = json.loads(Path(os.environ["STREAM_PLAN"]).read_text())


@cocotb.test()
async def stream(dut):
    """For each word of the plan (None is a bubble: all X) set the input, read the output, then raise the clock."""
    width = len(dut.model_inp)
    outputs = []
    for word in PLAN:
        dut.model_inp.value = LogicArray("X" * width) if word is None else word
        await Timer(2, "ns")
        value = dut.model_out.value
        outputs.append(value.to_unsigned() if value.is_resolvable else None)
        dut.clk.value = 1
        await Timer(2, "ns")
        dut.clk.value = 0
        await Timer(1, "ns")
    Path(os.environ["STREAM_OUTPUTS"]).write_text(json.dumps(outputs))
