"""A QNet traced symbolically, as alkaid's program of shared shifts and additions; the only importer of alkaid.

Each product with constant weights becomes distributed arithmetic, so there are no multipliers. Everything is traced in
codes, hence in integers.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from alkaid.codegen.rtl import RTLModel
from alkaid.stateful import Signal
from alkaid.trace import FVariable, FVArray, HWConfig
from alkaid.trace import trace as trace_program
from alkaid.trace.ops import reduce
from alkaid.trace.passes import (
    add_surrogate,
    canonical_sort,
    common_subexpr_elimin,
    dead_code_elimin,
    null_quant_elimin,
    topo_bandwidth_sort,
)
from alkaid.trace.passes.canon import canonicalize_outputs, const_propagation
from alkaid.trace.pipeline import to_pipeline
from alkaid.types import CombLogic
from numpy.lib.stride_tricks import sliding_window_view

from hmq_fpga.deploy.rtl.verilator import Port
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput, assert_never
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.logic import signed_digits
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Computed,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Elementwise,
    Flatten,
    Gather,
    Input,
    LeakyRelu,
    Maximum,
    MaxPool,
    Minimum,
    Multiply,
    Op,
    Pad,
    Padding,
    Quantize,
    Scale,
    Subtract,
    Table,
    Upsample,
    Window,
)

if TYPE_CHECKING:
    from hmq_fpga.deploy.proof.opened import OpenedProgram, Places

SIZE_LIMIT = 50_000  # of `size_estimate`: minutes of tracing, up to some 250,000 LUTs
MAX_BITS = 28  # of a tensor: all that the tracer computes then fits 31-bit constants and 63-bit values
MAX_CONSTANT_BITS = 24  # the tracer holds weight matrices and tables in float32

WORTH = 0.05
WITNESSES = 24  # random inputs for which two values are the same, if they are

_INPUT = -1  # opcode
_PROGRAM = Path("model", "comb.json.gz")
_HARDWARE = HWConfig(1, 1, -1)  # delays counted per bit of an adder and of its carry; no pipelining while tracing
SOLVER = {
    "hard_dc": 6,  # levels of additions that a matrix product may use beyond the fewest; 5 cost up to 11 % more LUTs
    "binary_lut": False,  # tables for sums of single bits: more LUTs, and wrong for signed bits
}


class NotUnrolled(InvalidInput):
    """The network cannot be had as RTL; the message says why."""


def size_estimate(net: QNet) -> int:
    """Operations of the unrolled network before any sharing, in milliseconds and without tracing.

    One for each nonzero signed digit of a weight at each output position, each quantized value, each value that a
    pooling window reads, each bit of a product's narrower factor, and each 64 entries of a table.
    """
    return sum(_operations(net, op) for op in net.ops)


@dataclass(frozen=True, kw_only=True, eq=False)
class Interpreter:
    """The traced program on integers: what the Verilog is written from, without clock and Verilog.

    Attributes:
        net: the network.
        program: traced of it.
        places: where the network's tensors are in it; by default they are looked for, when layers are asked for.
        name: its key in `parity.json`.
    """

    net: QNet
    program: CombLogic
    places: Places | None = None
    name: str = "trace"

    def predict(self, x: np.ndarray[Any, Any]) -> Codes:
        """Output codes `(batch, *output_shape)` for real inputs `(batch, *input_shape)`, channels last."""
        return self.run(self.net.encode(x).reshape(len(x), -1)).reshape(len(x), *self.net.output_shape)

    def run(self, codes: Codes) -> Codes:
        """Output codes in a row for input codes in a row, `(batch, values)`."""
        outputs = self.program.predict(codes.astype(np.float64)) if len(codes) else np.empty(0)
        return outputs.astype(np.int64).reshape(len(codes), math.prod(self.net.output_shape))

    def takes(self, codes: Mapping[str, Codes]) -> Mapping[str, Codes]:
        """The nearest codes that the program's words hold, of those tensors whose values are in it."""
        return self.opened.takes(codes) if self.opened.places else {}

    def layers(self, given: Mapping[str, Codes]) -> Mapping[str, Codes]:
        """What the program makes of given codes, of each tensor from those before it, and of the outputs."""
        return self.opened.layers(given)

    @cached_property
    def opened(self) -> OpenedProgram:
        """The program with its tensors laid open."""
        from hmq_fpga.deploy.proof.opened import OpenedProgram, find_places

        places = find_places(self.net, self.program) if self.places is None else self.places
        return OpenedProgram(self.net, self.program, places)


def _operations(net: QNet, op: Op) -> int:
    tensor = net.tensors[op.name]
    positions, values = tensor.positions, math.prod(tensor.shape)
    match op:
        case Dense() | Conv() | DepthwiseConv() | Scale():
            return positions * int(signed_digits(op.weight).sum()) + values
        case Quantize() | LeakyRelu() | Add() | Subtract() | Maximum() | Minimum():
            return values
        case Multiply():
            return values * min(net.formats[name].width for name in op.sources)
        case Table():
            return values * -(-len(op.values) // 64)
        case MaxPool() | AvgPool():
            return values * math.prod(op.window)
        case Input() | Pad() | Upsample() | Flatten() | Gather() | Concat():
            return 0
        case _:
            assert_never(op)


def _too_wide(net: QNet) -> str | None:
    """What is too wide for the tracer to be exact."""
    for name, format_ in {**net.formats, "outputs": net.output_format}.items():
        if format_.width > MAX_BITS:
            return f"op {name!r}: its {format_.width} bits exceed the {MAX_BITS} that RTL supports"
    for op in net.ops:
        match op:
            case Dense() | Conv() | DepthwiseConv() | Scale():
                constants, width = "weights", op.weight_format.width
            case Table():
                constants, width = "values", op.format.width
            case _:
                continue
        if width > MAX_CONSTANT_BITS:
            return f"op {op.name!r}: its {width}-bit {constants} exceed the {MAX_CONSTANT_BITS} bits of RTL"
    return None


def _require_fit(net: QNet) -> None:
    if (size := size_estimate(net)) > SIZE_LIMIT:
        raise NotUnrolled(
            f"too large to unroll: {size:,} operations, the limit is {SIZE_LIMIT:,}; "
            "use fewer bits, more zero weights or a smaller network, or the HLS project"
        )
    if message := _too_wide(net):
        raise NotUnrolled(f"{message}; use fewer bits, or the HLS project")


def trace(net: QNet) -> CombLogic:
    """The program of a network, from the codes of all its inputs to those of all its outputs.

    Raises:
        NotUnrolled: when the unrolled network is too large, or a tensor too wide.
    """
    _require_fit(net)
    inputs, tensors = _inputs(net)
    for op in net.ops:
        if not isinstance(op, Input):
            tensors[op.name] = _apply(net, op, tensors)
    outputs = _aligned(net, net.outputs, tensors)
    joined = outputs[0] if len(outputs) == 1 else _concatenated([x.reshape(-1) for x in outputs])
    return simplify(trace_program(inputs, joined, optimize=False))


def write_verilog(
    program: CombLogic, folder: Path, name: str, *, latency_cutoff: float | None, part: str, clock_ns: float
) -> tuple[Port, Port, int, int]:
    """Write the Verilog of a program and scripts for vendor tools; the wrapper's module is `<name>_wrapper`.

    Returns:
        the input's and the output's port, the latency in cycles, and the number of flip-flops.

    Raises:
        NotUnrolled: when the output is constant.
    """
    model = RTLModel(
        program,
        folder,
        name,
        latency_cutoff=latency_cutoff or -1,
        print_latency=False,
        part_name=part,
        clock_period=clock_ns,
        ternary_fuse=False,  # only Vivado maps three-input adders
    )
    inputs, outputs = model.fsm.inp_signals[0], model.fsm.out_signals[0]
    if _port(inputs).width == 0:
        raise NotUnrolled("nothing to build: the network's output is the same for every input")
    model.write()
    shutil.rmtree(folder / "sim")  # the tracer's own simulator; see `VerilatorSimulator`
    for path in (folder / "model").glob("*.gz"):  # without the time and the name that gzip adds
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=0))
    return _port(inputs), _port(outputs), outputs.schedule.bias, model.reg_bits


def stage_layers(net: QNet, program: CombLogic, latency_cutoff: float) -> list[list[str]]:
    """Which ops of the network each pipeline stage of its Verilog works on, `logic0.v` and so on, in their order.

    A value of a stage is a tensor's if it has that tensor's codes for `WITNESSES` random inputs, but for a power of
    two. What is none's is part of the sums and functions that lead to the first of those that are. An op that less
    than `WORTH` of a stage's values belong to is left out; one that the tracer made a single function of with what
    reads it, as it does of sums and their rounding, is named with that.

    Args:
        net: the network.
        program: traced of it.
        latency_cutoff: as for `write_verilog`, not 0.
    """
    stages = list(to_pipeline(program, latency_cutoff=latency_cutoff, verbose=False).logic.values())
    rng = np.random.default_rng(0)
    parts = [
        rng.integers(op.format.lo, op.format.hi, (WITNESSES, math.prod(op.shape)), endpoint=True) * op.format.step
        for op in net.inputs
    ]
    x = np.concatenate(parts, axis=1)
    x = (x * (rng.random(x.shape) < rng.random((WITNESSES, 1)))).reshape(WITNESSES, *net.input_shape)
    tensors: dict[tuple[int, ...], str] = {}
    for name, codes in reference.trace(net, x).items():
        for column in codes.reshape(WITNESSES, -1).T:
            tensors.setdefault(_odd(column), name)
    tensors.pop((), None)  # constants

    values, found = net.encode(x).reshape(WITNESSES, -1).astype(np.float64), []
    for stage in stages:
        held = np.array([stage(row, quantize=False, dump=True) for row in values], np.float64)
        found.append([tensors.get(_odd(column)) for column in held.T])
        at, scale = np.array(stage.out_idxs), np.where(stage.out_negs, -1.0, 1.0) * 2.0 ** np.array(stage.out_shifts)
        values = np.where(at >= 0, held[:, at], 0) * scale

    order = {op.name: number for number, op in enumerate(net.ops)}
    layers: list[list[str]] = []
    leading: list[set[str]] = [set() for _ in stages[-1].out_idxs]  # to which tensors the outputs of a stage lead
    for stage, known in zip(reversed(stages), reversed(found), strict=True):
        of_values: list[set[str]] = [set() for _ in stage.ops]
        for index, names in zip(stage.out_idxs, leading, strict=True):
            if index >= 0:
                of_values[index] |= names
        leading = [set() for _ in stage.inp_shifts]
        worked: Counter[str] = Counter()
        for op, known_as, names in zip(reversed(stage.ops), reversed(known), reversed(of_values), strict=True):
            if op.opcode == _INPUT:
                leading[op.data[0]] |= names
                continue
            own = known_as or min(names, key=order.__getitem__, default=None)
            if own is None:  # nothing reads it
                continue
            worked[own] += 1
            for source in op.addr:
                of_values[source].add(own)
        least = WORTH * len(stage.ops)
        layers.append(sorted((name for name, values in worked.items() if values >= least), key=order.__getitem__))
    alone = set().union(*layers)
    fused = {name: [s for s in net[name].reads if s not in alone and not isinstance(net[s], Input)] for name in alone}
    return [[part for name in names for part in (*fused[name], name)] for names in layers[::-1]]


def _odd(values: npt.NDArray[Any]) -> tuple[int, ...]:
    """Dyadic numbers, divided by the power of two that leaves whole numbers, not all even; nothing of a constant."""
    if (values == values[0]).all():
        return ()
    mantissas, exponents = np.frexp(values[values != 0].astype(np.float64))
    whole = (mantissas * 2.0**53).astype(np.int64)
    least = np.min(exponents - 53 + np.log2(whole & -whole).astype(np.int64))
    return tuple((values * 2.0**-least).astype(np.int64).tolist())


def load_program(folder: Path) -> CombLogic:
    """The program that `write_verilog` left beside the Verilog."""
    return CombLogic.load(folder / _PROGRAM)


def program_digest(folder: Path) -> str:
    """SHA-256 of the program that `write_verilog` left beside the Verilog."""
    return hashlib.sha256(gzip.decompress((folder / _PROGRAM).read_bytes())).hexdigest()


def simplify(program: CombLogic) -> CombLogic:
    """The passes of alkaid's `optimize` but `canonicalize_msb_wraps`.

    That one, in 0.8.2, takes some single bits of a scaled value for its top bit.
    """
    for simplify in (const_propagation, canonicalize_outputs, common_subexpr_elimin, null_quant_elimin):
        program = dead_code_elimin(simplify(program), keep_dead_inputs=True)
    return topo_bandwidth_sort(canonical_sort(add_surrogate(canonical_sort(program))))


def _inputs(net: QNet) -> tuple[FVArray, dict[str, FVArray]]:
    """Symbolic codes of all inputs in a row, and of each by its name, in its shape."""
    sizes = [math.prod(op.shape) for op in net.inputs]
    signed = np.repeat([op.format.signed for op in net.inputs], sizes)
    integer = np.repeat([op.format.width - op.format.signed for op in net.inputs], sizes)
    codes = FVArray.from_kif(signed, integer, np.zeros_like(integer), _HARDWARE, solver_options=SOLVER)
    parts = np.split(np.asarray(codes), np.cumsum(sizes)[:-1])
    return codes, {op.name: _like(codes, part.reshape(op.shape)) for op, part in zip(net.inputs, parts, strict=True)}


def _apply(net: QNet, op: Computed, tensors: Mapping[str, FVArray]) -> FVArray:
    """One op on symbolic codes, as `ops` does it on numbers."""
    if isinstance(op, Elementwise):
        return _merge(net, op, tensors)
    if isinstance(op, Concat):
        return _concatenated(_aligned(net, op.sources, tensors))
    x = tensors[op.source]
    match op:
        case Quantize():
            source = net.formats[op.source]
            return _elementwise(lambda v: _requantize(v, source, op.format), x)
        case Dense():
            return _product(x, op.weight, op.bias)
        case Conv():
            columns = _columns(_pad(x, op.padding), op)
            return _product(columns.reshape(*columns.shape[:-2], -1), op.matrix, op.bias)
        case DepthwiseConv():
            return _products(_columns(_pad(x, op.padding), op), op.matrix, op.bias)
        case Scale():
            return _products(x.reshape(*x.shape[:-1], 1, -1), op.matrix, op.bias)
        case MaxPool():
            return reduce(_larger, _columns(x, op), axis=-2)
        case AvgPool():
            shape = math.prod(op.window), x.shape[-1]
            return _products(_columns(x, op), np.ones(shape, np.int64), np.zeros(shape[-1], np.int64))
        case LeakyRelu():
            return _elementwise(lambda v: _larger(v * 2.0**op.shift, v), x)
        case Table():
            return _elementwise(lambda v: _lookup(v, op, net.formats[op.source]), x)
        case Pad():
            return _pad(x, op.padding)
        case Upsample():
            values = np.asarray(x)
            for axis, factor in enumerate(op.factor):
                values = values.repeat(factor, axis)
            return _like(x, values)
        case Flatten():
            return x.reshape(-1)
        case Gather():
            fill = FVariable.from_const(op.fill, x.hwconf)
            return _like(x, np.append(np.asarray(x), fill)[op.index])  # -1 is the last one
        case _:
            assert_never(op)


def _merge(net: QNet, op: Elementwise, tensors: Mapping[str, FVArray]) -> FVArray:
    if isinstance(op, Multiply):
        first, second = (tensors[name] for name in op.sources)
        return _elementwise(lambda a, b: a * b, first, second)
    first, second = _aligned(net, op.sources, tensors)
    match op:
        case Add():
            return first + second
        case Subtract():
            return _elementwise(_difference, first, second)
        case Maximum():
            return _elementwise(_larger, first, second)
        case Minimum():
            return _elementwise(_smaller, first, second)
        case _:
            assert_never(op)


def _aligned(net: QNet, names: Sequence[str], tensors: Mapping[str, FVArray]) -> list[FVArray]:
    """Tensors on the finest of their grids."""
    frac = max(net.formats[name].frac for name in names)
    return [tensors[name] * 2.0 ** (frac - net.formats[name].frac) for name in names]


def _concatenated(tensors: Sequence[FVArray]) -> FVArray:
    return _like(tensors[0], np.concatenate([np.asarray(x) for x in tensors], axis=-1))


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


def _difference(first: FVariable, second: FVariable) -> FVariable:
    difference = first - second
    return difference if difference.low < difference.high else FVariable.from_const(difference.low, first.hwconf)


def _larger(first: FVariable, second: FVariable) -> FVariable:
    """Maximum. alkaid 0.8.2 gets one wrong where the difference has no sign, as where it is known."""
    difference = first - second
    if difference.low >= 0:
        return first
    return second if difference.high <= 0 else first.max_of(second)


def _smaller(first: FVariable, second: FVariable) -> FVariable:
    """Minimum, see `_larger`."""
    difference = first - second
    if difference.low >= 0:
        return second
    return first if difference.high <= 0 else first.min_of(second)


def _lookup(value: FVariable, op: Table, source: Fixed) -> FVariable:
    """The table's value at a code, for the codes that the tracer takes for possible."""
    codes = np.arange(value.low, value.high + 1, value.step if value.low < value.high else 1).astype(np.int64)
    found = op.values[np.clip(codes, source.lo, source.hi) - source.lo].astype(np.float64)
    return FVariable.from_const(found[0], value.hwconf) if np.ptp(found) == 0 else value.lookup(found)


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
    if floor.kif[2] < 0:  # never odd
        return floor
    if floor.low == floor.high:  # always odd
        return half_up.bits[-frac:].unary_bit_op("any") + (floor.low - 1)
    even, odd = floor.bits[:-1], floor.bits[-1:]
    if frac <= 0:  # always a tie
        return even
    no_tie = half_up.bits[-frac:].unary_bit_op("any")
    return even + (odd & no_tie)


def _elementwise(function: Callable[..., FVariable], x: FVArray, *others: FVArray) -> FVArray:
    rows = zip(*(np.asarray(tensor).ravel() for tensor in (x, *others)), strict=True)
    values = np.array([function(*row) for row in rows], dtype=object)
    return _like(x, values.reshape(x.shape))


def _pad(x: FVArray, padding: Padding) -> FVArray:
    return _like(x, np.pad(np.asarray(x), (*padding, (0, 0)), constant_values=0.0))


def _columns(x: FVArray, op: Window) -> FVArray:
    """The windows of an op: `(*spatial, c)` to `(*positions, values of a window, c)`."""
    window = op.kernel
    views = sliding_window_view(np.asarray(x), window, tuple(range(len(window))))  # type: ignore[call-overload]
    views = np.moveaxis(views[tuple(slice(None, None, stride) for stride in op.stride)], len(window), -1)
    return _like(x, views.reshape(*views.shape[: len(window)], math.prod(window), x.shape[-1]))


def _like(x: FVArray, values: npt.NDArray[np.object_]) -> FVArray:
    return FVArray(values, x.solver_options, x.hwconf)


def _port(signal: Signal) -> Port:
    """The wrapper gives every element of a port the precision that covers them all."""
    signed, integer, frac = (int(v) for v in np.max(signal.precisions, axis=0))
    return Port(elements=signal.size, width=signed + integer + frac, signed=bool(signed), shift=-frac)
