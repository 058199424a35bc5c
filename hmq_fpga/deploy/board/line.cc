// Drives the top level of a board by its serial line: bytes in, bytes out, clock by clock.

#include "Vtop.h"
#include <cstddef>
#include <cstdint>

double sc_time_stamp() { return 0; }

namespace {

struct Board {
    VerilatedContext context;
    Vtop top{&context};
    uint64_t random = 0x9E3779B97F4A7C15ULL;

    void clock() {
        top.clock = 1;
        top.eval();
        top.clock = 0;
        top.eval();
    }

    bool chance(double probability) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return static_cast<double>(random >> 11) < probability * 9007199254740992.0;
    }
};

}  // namespace

extern "C" void *power_up() {
    auto *board = new Board;
    board->top.rx = 1;
    board->top.clock = 0;
    board->top.eval();
    for (int i = 0; i < 1024; ++i) board->clock();
    return board;
}

extern "C" void power_down(void *handle) {
    auto *board = static_cast<Board *>(handle);
    board->top.final();
    delete board;
}

// Send bytes, and receive until nothing has happened for `quiet` bits; the number of bytes received. Each bit of both
// directions is flipped with the probability `flips`; `pause` bits lie between two bytes sent.
extern "C" size_t talk(void *handle, const uint8_t *in, size_t size, uint8_t *out, size_t room, size_t quiet,
                       size_t pause, double flips) {
    auto *board = static_cast<Board *>(handle);
    size_t received = 0, idle = 0;      // idle: bits
    size_t sent = 0, step = 0;          // step: bits of the byte that is being sent
    int shifted = 0, left = 0, to_middle = 0;
    bool last = true;
    while (sent < size || idle < quiet || left) {
        bool level = true;
        if (sent < size) {
            if (step >= 1 && step <= 8) level = in[sent] >> (step - 1) & 1;
            if (step == 0) level = false;
            if (++step == 10 + pause) step = 0, ++sent;
            idle = 0;
        } else {
            ++idle;
        }
        board->top.rx = level != board->chance(flips);
        const bool flip = board->chance(flips);
        for (int i = 0; i < CLOCKS_PER_BIT; ++i) {
            board->clock();
            if (!board->top.tx) idle = 0;
            const bool now = static_cast<bool>(board->top.tx) != flip;
            if (!left && last && !now) left = 10, to_middle = CLOCKS_PER_BIT / 2;
            else if (left && --to_middle == 0) {
                to_middle = CLOCKS_PER_BIT;
                if (left == 1 && now && received < room) out[received++] = static_cast<uint8_t>(shifted >> 1 & 0xFF);
                shifted = shifted >> 1 | now << 8;
                left = left == 10 && now ? 0 : left - 1;  // a spike is no start bit
            }
            last = now;
        }
    }
    return received;
}
