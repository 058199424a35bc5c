"""RTL projects: a QNet as fully unrolled Verilog that takes one sample per clock cycle.

alkaid traces the network symbolically and turns each product with constant weights into shared shifts and
additions (distributed arithmetic), so there are no multipliers. This is the only module that imports it.

The hardware takes the input's *codes*: the encoding of real inputs (`QNet.encode`) belongs to whatever
comes before it, such as an ADC. Everything is traced in codes, hence in integers.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
from alkaid.codegen.rtl import RTLModel
from alkaid.stateful import Signal
from alkaid.trace import FVariable, FVArray, HWConfig
from alkaid.trace import trace as trace_program
from alkaid.trace.passes import (
    add_surrogate,
    canonical_sort,
    common_subexpr_elimin,
    dead_code_elimin,
    null_quant_elimin,
    topo_bandwidth_sort,
)
from alkaid.trace.passes.canon import canonicalize_outputs, const_propagation
from alkaid.types import CombLogic
from numpy.lib.stride_tricks import sliding_window_view

from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.rtl.estimate import signed_digits
from hmq_fpga.deploy.rtl.verilator import Port, VerilatorSimulator, compile_verilog
from hmq_fpga.deploy.rtl.yosys import synthesis_script, synthesize
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Input,
    LeakyRelu,
    MaxPool,
    Merge,
    Op,
    Outputs,
    Pad,
    Padding,
    QNet,
    Quantize,
    Scale,
    Upsample,
    Window,
    by_output,
    kernel_of,
)

SIZE_LIMIT = 50_000  # of `size_estimate`: minutes of tracing, up to some 250,000 LUTs
MAX_BITS = 28  # of a tensor: all that the tracer computes then fits 31-bit constants and 63-bit values
MAX_WEIGHT_BITS = 24  # the tracer holds weight matrices in float32

TOP = "network_wrapper"
_CORE = "network"
_HARDWARE = HWConfig(1, 1, -1)  # delays counted per bit of an adder and of its carry; no pipelining while tracing
_SOLVER = {
    "hard_dc": 5,  # levels of additions that a matrix product may use beyond the fewest possible
    "binary_lut": False,  # tables for sums of single bits: more LUTs, and wrong for signed bits
}


class NotUnrolled(InvalidInput):
    """The network cannot be had as RTL; the message says why."""


def size_estimate(net: QNet) -> int:
    """Operations of the unrolled network before any sharing, in milliseconds and without tracing.

    One for each nonzero signed digit of a weight at each output position, each quantized value and each
    value that a pooling window reads.
    """
    return sum(_operations(net, op) for op in net.ops)


def fits(net: QNet) -> bool:
    """Whether `RtlProject.create` takes the network."""
    return size_estimate(net) <= SIZE_LIMIT and not _too_wide(net)


@dataclass(frozen=True, kw_only=True, eq=False)
class RtlProject:
    """A folder with the Verilog of a network, and what is known about it.

    Module `network_wrapper` has the ports `clk` (unless combinational), `model_inp` and `model_out`: the
    codes of all elements side by side, channels last, the first in the lowest bits. There is no reset and
    no handshake: what is on `model_inp` at a clock edge makes `model_out` at the edge `latency_cycles` later.

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
        _require_fit(net)
        program = _trace(net)
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            model = RTLModel(
                program,
                new,
                _CORE,
                latency_cutoff=latency_cutoff or -1,
                print_latency=False,
                part_name=part,
                clock_period=clock_ns,
                ternary_fuse=False,  # only Vivado maps three-input adders
            )
            if _port(model.fsm.inp_signals[0]).width == 0:
                raise NotUnrolled("nothing to build: the network's output is the same for every input")
            model.write()
            shutil.rmtree(new / "sim")  # the tracer's own simulator; see `VerilatorSimulator`
            project = cls(
                net=net,
                folder=folder,
                latency_cycles=model.fsm.out_signals[0].schedule.bias,
                clock_ns=clock_ns,
                part=part,
                input_port=_port(model.fsm.inp_signals[0]),
                output_port=_port(model.fsm.out_signals[0]),
                lut=round(program.cost),
                register_bits=model.reg_bits,
            )
            (new / "synth.ys").write_text(synthesis_script(_sources(new), TOP))
            (new / "rtl.json").write_text(json.dumps(project._description(), indent=1) + "\n")
            new.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
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

    def interpreter(self) -> Interpreter:
        """The simulator that is there at once: the traced program, in integers; no clock, no Verilog."""
        return Interpreter(net=self.net, program=CombLogic.load(self.folder / "model" / "comb.json.gz"))

    def simulator(self, *, time_limit_s: float = 3600) -> VerilatorSimulator:
        """The simulator of the Verilog itself, clock edge by clock edge; compiled in `sim/` unless it is there.

        Args:
            time_limit_s: wall-clock limit in seconds of each of the two steps, translation and compilation.

        Raises:
            ToolMissing: without Verilator or a C++ compiler.
            ToolFailed: when a step fails or passes the limit.
        """
        library = compile_verilog(
            self.folder / "sim",
            self.sources,
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
        )

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

    def _description(self) -> dict[str, Any]:
        data = {key: value for key, value in vars(self).items() if key not in ("net", "folder")}
        ports = {key: asdict(data.pop(key)) for key in ("input_port", "output_port")}
        return {"network": self.net.digest, **data, **ports}


@dataclass(frozen=True, kw_only=True, eq=False)
class Interpreter:
    """The traced program on integers: what the Verilog is written from, without clock and Verilog."""

    net: QNet
    program: CombLogic
    name: str = "trace"

    def predict(self, x: np.ndarray[Any, Any]) -> Codes:
        """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`, channels last."""
        codes = self.net.encode(x).reshape(len(x), -1)
        outputs = self.program.predict(codes.astype(np.float64)) if len(x) else np.empty(0)
        return outputs.astype(np.int64).reshape(len(x), *self.net.shapes[self.net.output.name])


def _operations(net: QNet, op: Op) -> int:
    positions = int(np.prod(net.shapes[op.name][:-1], dtype=int))
    values = int(np.prod(net.shapes[op.name], dtype=int))
    match op:
        case Dense() | Conv() | DepthwiseConv() | Scale():
            return positions * int(signed_digits(op.weight).sum()) + values
        case Quantize() | LeakyRelu() | Add():
            return values
        case MaxPool() | AvgPool():
            return values * math.prod(op.window)
        case Input() | Pad() | Upsample() | Flatten() | Concat() | Outputs():
            return 0
        case _:
            assert_never(op)


def _too_wide(net: QNet) -> str | None:
    """What is too wide for the tracer to be exact."""
    for name, format_ in net.formats.items():
        if format_.width > MAX_BITS:
            return f"op {name!r}: its {format_.width} bits exceed the {MAX_BITS} that RTL supports"
    for op in net.linears:
        if op.weight_format.width > MAX_WEIGHT_BITS:
            return f"op {op.name!r}: its {op.weight_format.width}-bit weights exceed the {MAX_WEIGHT_BITS} bits of RTL"
    return None


def _require_fit(net: QNet) -> None:
    if (size := size_estimate(net)) > SIZE_LIMIT:
        raise NotUnrolled(
            f"too large to unroll: {size:,} operations, the limit is {SIZE_LIMIT:,}; "
            "use fewer bits, more zero weights or a smaller network, or the HLS project"
        )
    if message := _too_wide(net):
        raise NotUnrolled(f"{message}; use fewer bits, or the HLS project")


def _trace(net: QNet) -> CombLogic:
    tensors: dict[str, FVArray] = {}
    for op in net.ops:
        tensors[op.name] = _apply(net, op, tensors)
    return _simplify(trace_program(tensors[net.input.name], tensors[net.output.name], optimize=False))


def _simplify(program: CombLogic) -> CombLogic:
    """The passes of alkaid's `optimize` but `canonicalize_msb_wraps`.

    That one, in 0.8.2, takes some single bits of a scaled value for its top bit.
    """
    for simplify in (const_propagation, canonicalize_outputs, common_subexpr_elimin, null_quant_elimin):
        program = dead_code_elimin(simplify(program), keep_dead_inputs=True)
    return topo_bandwidth_sort(canonical_sort(add_surrogate(canonical_sort(program))))


def _apply(net: QNet, op: Op, tensors: Mapping[str, FVArray]) -> FVArray:
    """One op on symbolic codes, as `ir.reference` does it on numbers."""
    if isinstance(op, Input):
        signed = np.full(op.shape, op.format.signed)
        integer = np.full(op.shape, op.format.width - op.format.signed)
        return FVArray.from_kif(signed, integer, np.zeros_like(integer), _HARDWARE, solver_options=_SOLVER)
    if isinstance(op, Add | Concat | Outputs):
        return _merge(net, op, tensors)
    x = tensors[op.source]
    match op:
        case Quantize():
            source = net.formats[op.source]
            return _elementwise(lambda v: _requantize(v, source, op.format), x)
        case Dense():
            return _product(x, op.weight, op.bias)
        case Conv():
            columns = _columns(_pad(x, op.padding), op)
            return _product(columns.reshape(*columns.shape[:-2], -1), by_output(op), op.bias)
        case DepthwiseConv():
            return _products(_columns(_pad(x, op.padding), op), by_output(op), op.bias)
        case Scale():
            return _products(x.reshape(*x.shape[:-1], 1, -1), by_output(op), op.bias)
        case MaxPool():
            return np.max(_columns(x, op), axis=-2)
        case AvgPool():
            shape = math.prod(op.window), x.shape[-1]
            return _products(_columns(x, op), np.ones(shape, np.int64), np.zeros(shape[-1], np.int64))
        case LeakyRelu():
            return _elementwise(lambda v: _leaky(v, op.shift), x)
        case Pad():
            return _pad(x, op.padding)
        case Upsample():
            values = np.asarray(x)
            for axis, factor in enumerate(op.factor):
                values = values.repeat(factor, axis)
            return _like(x, values)
        case Flatten():
            return x.reshape(-1)
        case _:
            assert_never(op)


def _merge(net: QNet, op: Merge | Outputs, tensors: Mapping[str, FVArray]) -> FVArray:
    frac = net.formats[op.name].frac
    sources = [tensors[name] * 2.0 ** (frac - net.formats[name].frac) for name in op.sources]
    if isinstance(op, Add):
        return sources[0] + sources[1]
    values = [np.asarray(x.reshape(-1) if isinstance(op, Outputs) else x) for x in sources]
    return _like(sources[0], np.concatenate(values, axis=-1))


def _products(columns: FVArray, weight: Codes, bias: Codes) -> FVArray:
    """`(…, k, c)` times `(k, c)`, summed over k, plus bias: each channel for itself."""
    values = np.asarray(columns)
    channels = [
        np.asarray(_product(_like(columns, values[..., c]), weight[:, [c]], bias[[c]])) for c in range(len(bias))
    ]
    return _like(columns, np.concatenate(channels, axis=-1))


def _product(x: FVArray, weight: Codes, bias: Codes) -> FVArray:
    """`(…, n) @ weight + bias`; what is known to be constant, such as padding, is computed here."""
    rows = []
    for row in np.asarray(x).reshape(-1, len(weight)):
        varies = np.array([v.low != v.high for v in row])
        sums = np.array([v.low for v in row[~varies]]) @ weight[~varies] + bias
        if weight[varies].any():
            sums = np.asarray(_like(x, row[varies]) @ weight[varies].astype(np.float64) + sums)
        rows.append(sums)
    return _like(x, np.array(rows, dtype=object).reshape(*x.shape[:-1], -1))


def _leaky(value: FVariable, shift: int) -> FVariable:
    """Code of a leaky ReLU. alkaid 0.8.2 gets a maximum wrong where the difference has no sign: above zero here."""
    scaled = value * 2.0**shift
    return scaled if value.low >= 0 else scaled.max_of(value)


def _requantize(value: FVariable, source: Fixed, target: Fixed) -> FVariable:
    """Round a code of `source` half to even, then saturate it to `target`.

    Rounding comes first, so that its constant merges with the bias; and a value too large for an unsigned
    format shows in the bits above it, which saves a comparison.
    """
    # past these shifts every code rounds to zero or saturates; clamping keeps the values narrow
    shift = min(max(source.frac - target.frac, -target.width - 1), source.width + 1)
    value = value * 2.0**-shift
    lo, hi = (float(code) for code in target.encode(np.array([value.low, value.high]) * target.step))
    if lo == hi:
        return FVariable.from_const(lo, value.hwconf)
    low, high = round(value.low), round(value.high)  # half to even
    if value.kif[2] > 0:
        value = _round_half_even(value)
    if not target.signed:
        value = value.relu()
        if high > target.hi:
            above = value.kif[1] - target.width
            too_large = value.bits[:above].unary_bit_op("any")
            return too_large.msb_mux(hi, value.bits[above:], (0.0, hi, 1.0))
    elif low < target.lo or high > target.hi:
        return value.max_of(lo).min_of(hi)
    known = Fixed.enclosing(int(lo), int(hi), 0)  # the tracer takes the rounded value for one larger than it can be
    return value.quantize(known.signed, known.width - known.signed, 0)


def _round_half_even(value: FVariable) -> FVariable:
    """To an integer. Written out because alkaid 0.8.2 gets values wrong whose fraction is known to be one half."""
    half_up = value + 0.5
    signed, integer, frac = half_up.kif
    floor = half_up.quantize(signed, max(integer, 0), 0)
    if floor.low == floor.high or floor.kif[2] < 0:  # never odd
        return floor
    even, odd = floor.bits[:-1], floor.bits[-1:]
    if frac <= 0:  # always a tie
        return even
    no_tie = half_up.bits[-frac:].unary_bit_op("any")
    return even + (odd & no_tie)


def _elementwise(function: Callable[[FVariable], FVariable], x: FVArray) -> FVArray:
    values = np.array([function(v) for v in np.asarray(x).ravel()], dtype=object)
    return _like(x, values.reshape(x.shape))


def _pad(x: FVArray, padding: Padding) -> FVArray:
    return _like(x, np.pad(np.asarray(x), (*padding, (0, 0)), constant_values=0.0))


def _columns(x: FVArray, op: Window) -> FVArray:
    """The windows of an op: `(*spatial, c)` to `(*positions, values of a window, c)`."""
    window = kernel_of(op)
    views = sliding_window_view(np.asarray(x), window, tuple(range(len(window))))  # type: ignore[call-overload]
    views = np.moveaxis(views[tuple(slice(None, None, stride) for stride in op.stride)], len(window), -1)
    return _like(x, views.reshape(*views.shape[: len(window)], math.prod(window), x.shape[-1]))


def _like(x: FVArray, values: npt.NDArray[np.object_]) -> FVArray:
    return FVArray(values, x.solver_options, x.hwconf)


def _port(signal: Signal) -> Port:
    """The wrapper gives every element of a port the precision that covers them all."""
    signed, integer, frac = (int(v) for v in np.max(signal.precisions, axis=0))
    return Port(elements=signal.size, width=signed + integer + frac, signed=bool(signed), shift=-frac)


def _sources(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in (folder / "src").rglob("*.v"))
