// Frames over a serial line (8 data bits, no parity, 1 stop bit) for a core with AXI4-Stream ports.
//
// Request: A5, sequence, length (2 bytes), payload, CRC-32 of sequence, length and payload (4 bytes).
// Answer: 5A and the same, but its CRC-32 goes on from the request's. So an answer fits one request only: to what
// arrived as something else no answer is right. Numbers have their lowest byte first.
//
// One request at a time: what arrives until the answer is sent is dropped. A frame with another length, a wrong CRC,
// a broken byte or a pause of IDLE_BITS inside is dropped without an answer, and the next A5 starts a new one.

`timescale 1 ns / 1 ps

module network_frames #(
    parameter IN_BYTES = 1,
    parameter OUT_BYTES = 1,
    parameter CLOCKS_PER_BIT = 217,
    parameter IDLE_BITS = 4096
) (
    input wire clk,
    input wire resetn,
    input wire rx,
    output wire tx,
    output wire [8*IN_BYTES-1:0] m_axis_tdata,
    output wire m_axis_tvalid,
    input wire m_axis_tready,
    input wire [8*OUT_BYTES-1:0] s_axis_tdata,
    input wire s_axis_tvalid,
    output wire s_axis_tready
);

    localparam HUNT = 0, HEAD = 1, BODY = 2, CHECK = 3, ASK = 4, COMPUTE = 5, ANSWER = 6;
    localparam MOST = IN_BYTES > OUT_BYTES + 8 ? IN_BYTES : OUT_BYTES + 8;
    localparam COUNT = $clog2(MOST + 1);
    localparam PAUSE = IDLE_BITS * CLOCKS_PER_BIT;
    localparam PAUSE_WIDTH = $clog2(PAUSE + 1);
    localparam [15:0] IN_LENGTH = IN_BYTES, OUT_LENGTH = OUT_BYTES;

    wire [7:0] received;
    wire arrived, broken;
    network_receiver #(.CLOCKS_PER_BIT(CLOCKS_PER_BIT)) receiver (
        .clk(clk), .resetn(resetn), .rx(rx), .data(received), .valid(arrived), .broken(broken)
    );

    reg [7:0] sent;
    wire send, sendable;
    network_sender #(.CLOCKS_PER_BIT(CLOCKS_PER_BIT)) sender (
        .clk(clk), .resetn(resetn), .tx(tx), .data(sent), .valid(send), .ready(sendable)
    );

    reg [2:0] state;
    reg [COUNT-1:0] count;
    reg [PAUSE_WIDTH-1:0] pause;
    reg [7:0] sequence_number;
    reg [31:0] crc;
    reg [8*IN_BYTES-1:0] sample;
    reg [8*OUT_BYTES-1:0] result;

    assign m_axis_tdata = sample;
    assign m_axis_tvalid = state == ASK;
    assign s_axis_tready = state == COMPUTE;
    assign send = state == ANSWER;

    function [31:0] next_crc(input [31:0] so_far, input [7:0] data);
        integer i;
        begin
            next_crc = so_far ^ {24'd0, data};
            for (i = 0; i < 8; i = i + 1)
                next_crc = next_crc[0] ? (next_crc >> 1) ^ 32'hEDB88320 : next_crc >> 1;
        end
    endfunction

    wire [8*IN_BYTES+7:0] samples = {received, sample};
    wire [8*OUT_BYTES+7:0] results = {8'd0, result};
    wire [31:0] check = ~crc;

    // The answer, byte by byte: head, payload, CRC
    localparam TAIL = 4 + OUT_BYTES;
    always @* begin
        case (count)
            0: sent = 8'h5A;
            1: sent = sequence_number;
            2: sent = OUT_LENGTH[7:0];
            3: sent = OUT_LENGTH[15:8];
            TAIL: sent = check[7:0];
            TAIL + 1: sent = check[15:8];
            TAIL + 2: sent = check[23:16];
            TAIL + 3: sent = check[31:24];
            default: sent = result[7:0];
        endcase
    end

    // The byte of the CRC that has to come next
    reg [7:0] due;
    always @* begin
        case (count[1:0])
            0: due = check[7:0];
            1: due = check[15:8];
            2: due = check[23:16];
            default: due = check[31:24];
        endcase
    end

    always @(posedge clk) begin
        pause <= arrived || state == HUNT ? 0 : pause + 1;
        if (!resetn) state <= HUNT;
        else case (state)
            HUNT: begin
                crc <= 32'hFFFFFFFF;
                count <= 0;
                if (arrived && received == 8'hA5) state <= HEAD;
            end
            HEAD: if (arrived) begin
                crc <= next_crc(crc, received);
                count <= count + 1;
                if (count == 0) sequence_number <= received;
                if (count == 1 && received != IN_LENGTH[7:0]) state <= HUNT;
                if (count == 2) begin
                    count <= 0;
                    state <= received == IN_LENGTH[15:8] ? BODY : HUNT;
                end
            end
            BODY: if (arrived) begin
                crc <= next_crc(crc, received);
                sample <= samples[8*IN_BYTES+7:8];
                count <= count + 1;
                if (count == IN_BYTES - 1) begin
                    count <= 0;
                    state <= CHECK;
                end
            end
            CHECK: if (arrived) begin
                count <= count + 1;
                if (received != due) state <= HUNT;
                else if (count == 3) state <= ASK;
            end
            ASK: if (m_axis_tready) state <= COMPUTE;
            COMPUTE: if (s_axis_tvalid) begin
                result <= s_axis_tdata;
                count <= 0;
                state <= ANSWER;
            end
            ANSWER: if (sendable) begin
                count <= count + 1;
                if (count > 0 && count < TAIL) crc <= next_crc(crc, sent);
                if (count > 3) result <= results[8*OUT_BYTES+7:8];
                if (count == TAIL + 3) state <= HUNT;
            end
            default: state <= HUNT;
        endcase
        if ((state == HEAD || state == BODY || state == CHECK) && (broken || pause == PAUSE)) state <= HUNT;
    end

endmodule


// Bytes from a line that is 1 when idle.
module network_receiver #(
    parameter CLOCKS_PER_BIT = 217
) (
    input wire clk,
    input wire resetn,
    input wire rx,
    output wire [7:0] data,
    output reg valid,  // for one clock
    output reg broken  // for one clock: there was no stop bit
);

    localparam WIDTH = $clog2(CLOCKS_PER_BIT + 1);

    reg [2:0] line;  // the last one tells what was before
    always @(posedge clk) line <= resetn ? {line[1:0], rx} : 3'b111;

    reg [WIDTH-1:0] wait_for;
    reg [3:0] left;  // bits to come, with start and stop; 0: none began
    reg [8:0] bits;
    assign data = bits[7:0];

    always @(posedge clk) begin
        valid <= 0;
        broken <= 0;
        if (!resetn) left <= 0;
        else if (left == 0) begin
            if (line[2:1] == 2'b10) begin
                left <= 10;
                wait_for <= (CLOCKS_PER_BIT - 1) / 2;
            end
        end else if (wait_for != 0) wait_for <= wait_for - 1;
        else begin
            wait_for <= CLOCKS_PER_BIT - 1;
            left <= left - 1;
            bits <= {line[1], bits[8:1]};
            if (left == 10 && line[1]) left <= 0;  // a spike, no start bit
            if (left == 1) begin
                valid <= line[1];
                broken <= !line[1];
                bits <= bits[8:1];
            end
        end
    end

endmodule


module network_sender #(
    parameter CLOCKS_PER_BIT = 217
) (
    input wire clk,
    input wire resetn,
    output wire tx,
    input wire [7:0] data,
    input wire valid,
    output wire ready
);

    localparam WIDTH = $clog2(CLOCKS_PER_BIT + 1);

    reg [WIDTH-1:0] wait_for;
    reg [3:0] left;  // bits to go, with start and stop
    reg [8:0] bits = 9'h1FF;
    assign tx = bits[0];
    assign ready = left == 0;

    always @(posedge clk) begin
        if (!resetn) begin
            left <= 0;
            bits <= 9'h1FF;
        end else if (left == 0) begin
            if (valid) begin
                bits <= {data, 1'b0};
                left <= 10;
                wait_for <= CLOCKS_PER_BIT - 1;
            end
        end else if (wait_for != 0) wait_for <= wait_for - 1;
        else begin
            wait_for <= CLOCKS_PER_BIT - 1;
            bits <= {1'b1, bits[8:1]};
            left <= left - 1;
        end
    end

endmodule
