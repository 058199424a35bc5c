// What the cells of routed netlists compute: those of nextpnr, after packing, that the logic of a network is made of.

`timescale 1 ns / 1 ps

// ECP5: a look-up table, half of a carry cell (CCU2C), and the multiplexer behind them
module TRELLIS_COMB #(
    parameter MODE = "LOGIC",
    parameter [15:0] INITVAL = 0,
    parameter CCU2_INJECT1 = "NO",
    parameter WREMUX = "WRE",
    parameter [0:0] SECOND = 0  // its multiplexer has the outputs of two others, not of two look-up tables
) (
    input wire A, B, C, D, M, FCI, F1, FXA, FXB,
    output wire F, FCO, OFX
);
    wire lut4 = INITVAL[{D, C, B, A}];
    wire lut2 = INITVAL[{2'b00, B, A}];
    wire carry = MODE == "CCU2" && CCU2_INJECT1 != "YES";
    assign F = lut4 ^ (carry & FCI);
    assign FCO = lut4 ? FCI : carry & lut2;
    assign OFX = SECOND ? (M ? FXB : FXA) : (M ? F1 : F);
endmodule

module TRELLIS_FF #(
    parameter GSR = "ENABLED",
    parameter CEMUX = "1",
    parameter CLKMUX = "CLK",
    parameter LSRMUX = "LSR",
    parameter SD = "1",  // 1: from the look-up table beside it, 0: from elsewhere
    parameter SRMODE = "LSR_OVER_CE",
    parameter REGSET = "RESET"
) (
    input wire CLK, LSR, CE, DI, M,
    output reg Q
);
    wire clock = CLKMUX == "INV" ? !CLK : CLK;
    wire enable = CEMUX == "1" ? 1'b1 : CEMUX == "0" ? 1'b0 : CEMUX == "INV" ? !CE : CE;
    wire set = LSRMUX == "INV" ? !LSR : LSR;
    wire next = SD == "1" ? DI : M;
    initial Q = REGSET == "SET";
    always @(posedge clock)
        if (set && SRMODE == "LSR_OVER_CE") Q <= REGSET == "SET";
        else if (enable) Q <= set ? REGSET == "SET" : next;
endmodule

module DCCA (
    input wire CLKI, CE,
    output wire CLKO
);
    assign CLKO = CLKI;
endmodule

module TRELLIS_IO #(
    parameter DIR = "INPUT",
    parameter DATAMUX_MDDR = "PADDO",
    parameter DATAMUX_ODDR = "PADDO"
) (
    input wire B,
    output wire O
);
    assign O = B;
endmodule

module TRELLIS_IO_OUTPUT #(
    parameter DIR = "OUTPUT",
    parameter DATAMUX_MDDR = "PADDO",
    parameter DATAMUX_ODDR = "PADDO"
) (
    input wire I,
    output wire B
);
    assign B = I;
endmodule

// The clock it makes has no frequency here
module EHXPLLL (
    input wire CLKI,
    output wire CLKOP, LOCK
);
    assign CLKOP = CLKI;
    assign LOCK = 1;
endmodule

// iCE40
module ICESTORM_LC #(
    parameter [15:0] LUT_INIT = 0,
    parameter [0:0] CARRY_ENABLE = 0,
    parameter [0:0] CIN_CONST = 0,
    parameter [0:0] CIN_SET = 0,
    parameter [0:0] DFF_ENABLE = 0,
    parameter [0:0] NEG_CLK = 0,
    parameter [0:0] SET_NORESET = 0,
    parameter [0:0] ASYNC_SR = 0
) (
    input wire I0, I1, I2, I3, CIN, CLK, CEN, SR,
    output wire O, LO, COUT
);
    wire carry = CIN_CONST ? CIN_SET : CIN;
    assign COUT = (I1 & I2) | ((I1 | I2) & carry);
    assign LO = LUT_INIT[{I3, I2, I1, I0}];
    reg kept = 0;
    wire clock = CLK ^ NEG_CLK;
    always @(posedge clock) if (CEN) kept <= SR ? SET_NORESET : LO;
    assign O = DFF_ENABLE ? kept : LO;
endmodule

module SB_GB (
    input wire USER_SIGNAL_TO_GLOBAL_BUFFER,
    output wire GLOBAL_BUFFER_OUTPUT
);
    assign GLOBAL_BUFFER_OUTPUT = USER_SIGNAL_TO_GLOBAL_BUFFER;
endmodule

module SB_IO #(
    parameter IO_STANDARD = "SB_LVCMOS",
    parameter [0:0] NEG_TRIGGER = 0,
    parameter [0:0] PULLUP = 0,
    parameter [5:0] PIN_TYPE = 0
) (
    input wire PACKAGE_PIN,
    output wire D_IN_0
);
    assign D_IN_0 = PACKAGE_PIN;
endmodule

module SB_IO_OUTPUT #(
    parameter IO_STANDARD = "SB_LVCMOS",
    parameter [0:0] NEG_TRIGGER = 0,
    parameter [0:0] PULLUP = 0,
    parameter [5:0] PIN_TYPE = 0
) (
    input wire D_OUT_0,
    output wire PACKAGE_PIN
);
    assign PACKAGE_PIN = D_OUT_0;
endmodule
