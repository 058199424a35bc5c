"""An AXI4-Stream core around a network's Verilog: back-pressure for a pipeline that cannot wait."""

from __future__ import annotations

from hmq_fpga.deploy.rtl.verilator import Port

_PORTS = """\
// AXI4-Stream around {top}: the codes of one sample in, the codes of its outputs out, one sample per clock.
//
// s_axis_tdata: {inputs}
// m_axis_tdata: {outputs}
// The first field lies in the lowest bits; what is left of the last byte is ignored, and 0 in the answer.
// tlast goes with its sample. aresetn is synchronous and drops the samples inside.
//
// The pipeline of {latency} cycles has no enable: whatever enters it comes out. So a sample is taken only while the
// output FIFO has a place that is neither filled nor waited for. DEPTH places of latency + 2 keep the full rate; a
// smaller DEPTH, at least 1, is smaller and slower.

`timescale 1 ns / 1 ps

module {name} #(
    parameter DEPTH = {depth}
) (
    input wire aclk,
    input wire aresetn,
    // verilator lint_off UNUSEDSIGNAL
    input wire [{in_top}:0] s_axis_tdata,
    // verilator lint_on UNUSEDSIGNAL
    input wire s_axis_tvalid,
    output wire s_axis_tready,
    input wire s_axis_tlast,
    output wire [{out_top}:0] m_axis_tdata,
    output wire m_axis_tvalid,
    input wire m_axis_tready,
    output wire m_axis_tlast
);

    localparam LATENCY = {latency};
    localparam WIDTH = {width};  // of all outputs, in bits
    localparam COUNT = $clog2(DEPTH + 1);
    localparam PLACE = DEPTH > 1 ? $clog2(DEPTH) : 1;

    wire [WIDTH-1:0] result;
    {top} core (
{clock}        .model_inp(s_axis_tdata[{in_used}:0]),
        .model_out(result)
    );
"""

_BODY = """
    wire taken = s_axis_tvalid && s_axis_tready;
    wire given = m_axis_tvalid && m_axis_tready;

    // made: `result` is a sample's, the one whose tlast was `last`
    wire made, last;
    generate
        if (LATENCY == 0) begin : at_once
            assign made = taken;
            assign last = s_axis_tlast;
        end else begin : delayed
            reg [LATENCY-1:0] valids, lasts;
            always @(posedge aclk) begin
                valids <= aresetn ? {valids, taken} : 0;
                lasts <= {lasts, s_axis_tlast};
            end
            assign made = valids[LATENCY-1];
            assign last = lasts[LATENCY-1];
        end
    endgenerate

    reg [WIDTH:0] places [0:DEPTH-1];
    reg [PLACE-1:0] head, tail;
    reg [COUNT-1:0] unclaimed, filled;

    assign s_axis_tready = aresetn && unclaimed != 0;
    assign m_axis_tvalid = filled != 0;
    assign m_axis_tdata = places[head][WIDTH-1:0];
    assign m_axis_tlast = places[head][WIDTH];

    always @(posedge aclk) begin
        if (made) places[tail] <= {last, result};
        if (!aresetn) begin
            head <= 0;
            tail <= 0;
            unclaimed <= DEPTH;
            filled <= 0;
        end else begin
            if (made) tail <= tail == DEPTH - 1 ? 0 : tail + 1;
            if (given) head <= head == DEPTH - 1 ? 0 : head + 1;
            unclaimed <= unclaimed + given - taken;
            filled <= filled + made - given;
        end
    end

endmodule
"""


def stream_core(name: str, top: str, inputs: Port, outputs: Port, latency_cycles: int) -> str:
    """Verilog of a module with AXI4-Stream ports that holds a network's.

    Args:
        name: of the module.
        top: the network's module.
        inputs: layout of its port `model_inp`.
        outputs: layout of its port `model_out`.
        latency_cycles: of its pipeline; 0 for combinational logic, which has no `clk`.
    """
    ports = _PORTS.format(
        name=name,
        top=top,
        inputs=_fields(inputs),
        outputs=_fields(outputs),
        latency=latency_cycles,
        depth=latency_cycles + 2,
        in_top=8 * inputs.bytes - 1,
        out_top=8 * outputs.bytes - 1,
        in_used=inputs.bits - 1,
        width=outputs.bits,
        clock="        .clk(aclk),\n" if latency_cycles else "",
    )
    return ports + _BODY


def _fields(port: Port) -> str:
    kind = "signed" if port.signed else "unsigned"
    times = f", a code is the field times {1 << port.shift}" if port.shift else ""
    return f"{port.elements} {kind} fields of {port.width} bits{times}"
