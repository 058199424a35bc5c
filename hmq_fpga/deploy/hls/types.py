"""The C++ type of every tensor and constant of a project, and where the project holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hmq_fpga.deploy.hls.lower import is_copy
from hmq_fpga.ir.errors import assert_never
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
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
    Quantize,
    Scale,
    Shape,
    Subtract,
    Table,
    Upsample,
)

Types = dict[str, dict[str, str]]  # C++ type by op name and role: result, and weight, bias, accum of a linear op


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """How the project holds one op's tensor.

    Attributes:
        op: the QNet's op that makes it.
        variable: the C++ variable.
        shape: without the batch.
        format: of its codes.
        typedefs: names in `firmware/defines.h` by role: `result`, and `weight`, `bias`, `accum` of a linear op (which
            has only its result's where its constants are shifts and additions in the code).
    """

    op: str
    variable: str
    shape: Shape
    format: Fixed
    typedefs: Mapping[str, str]


def expected_types(net: QNet, *, least_bits: int = 1) -> Types:
    """The C++ type of every op's result, and of the weight, bias and accumulator of a linear op.

    Activations and the input round half to even and saturate. Constants need no rounding, accumulators and
    linear results are exact, and whatever only moves values keeps its source's type.

    A linear result is wider than its accumulator only where it is far below the next quantizer's step, as when all
    weights are zero: `ap_fixed` reads the bit half a step below, and fails an assertion where that is none of its own.

    Args:
        net: a lowered network.
        least_bits: of an exact type; hls4ml makes two bits of one in `ac_fixed`, which adds one behind the others.
    """
    types: Types = {}
    for op in net.ops:
        if _moves(net, op):
            types[op.name] = {"result": types[op.reads[0]]["result"]}
        elif isinstance(op, Input | Quantize):
            types[op.name] = {"result": str(op.format)}
        else:
            exact = net.formats[op.name]
            result = replace(exact, width=max(exact.width, exact.frac - _next_frac(net, op)))
            types[op.name] = {"result": exact_type(result), **_inner_types(net, op)}
    if least_bits > 1:
        return {
            op: {role: kind.replace("fixed<1,", "fixed<2,") for role, kind in roles.items()}
            for op, roles in types.items()
        }
    return types


def precisions(net: QNet) -> Types:
    """The types in hls4ml's configuration, by op and under hls4ml's names of the roles."""
    types = expected_types(net)
    for op in net.ops:
        if isinstance(op, Scale) and not is_copy(net, op):
            types[op.name]["scale"] = types[op.name].pop("weight")
        elif isinstance(op, MaxPool):
            types[op.name]["accum"] = types[op.name]["result"]
    return types


def held_format(types: Types, op: str) -> Fixed:
    """The format of the C++ variable that holds an op's tensor."""
    kind, _, numbers = types[op]["result"].rstrip(">").partition("<")
    width, integer, *_ = numbers.split(",")
    return Fixed(signed=kind == "ap_fixed", width=int(width), frac=int(width) - int(integer))


def read_types(defines: str, tensors: tuple[Tensor, ...]) -> Types:
    """The types that the text of a `defines.h` gives to tensors."""
    typedefs = {name: _plain_type(kind) for kind, name in re.findall(r"typedef (.*) (\w+);", defines)}
    return {t.op: {role: typedefs[name] for role, name in t.typedefs.items()} for t in tensors}


def inner_roles(net: QNet, op: Op) -> list[str]:
    """The roles of types inside an op that is no copy."""
    return list(_inner_types(net, op))


def _moves(net: QNet, op: Op) -> bool:
    """Whether every value of an op is one of its source's, or zero."""
    if isinstance(op, Gather) and op.fill and op.index.min() < 0:  # its source's type may not have the code
        return False
    return isinstance(op, MaxPool | Pad | Upsample | Flatten | Gather) or is_copy(net, op)


def _inner_types(net: QNet, op: Op) -> dict[str, str]:
    """The types inside an op, by role."""
    exact = net.formats[op.name]
    match op:
        case Dense() | Conv() | DepthwiseConv() | Scale():
            constants = {"weight": exact_type(op.weight_format), "bias": exact_type(net.bias_format(op))}
            return constants if isinstance(op, Scale) else {**constants, "accum": exact_type(exact)}
        case AvgPool():  # the sum, before it is divided
            return {"accum": exact_type(replace(exact, width=exact.width + exact.frac - net.formats[op.source].frac))}
        case LeakyRelu():
            return {"param": exact_type(Fixed(signed=False, width=1, frac=op.shift))}
        case Table():
            return {"table": exact_type(op.format)}
        case Input() | Quantize() | MaxPool() | Pad() | Upsample() | Flatten() | Gather():
            return {}
        case Add() | Subtract() | Maximum() | Minimum() | Multiply() | Concat():
            return {}
        case _:
            assert_never(op)


def _next_frac(net: QNet, op: Op) -> int:
    """Fraction of the coarsest quantizer that reads an op's tensor, directly or after it was moved; else its own."""
    fracs = [net.formats[op.name].frac]
    for reader in net.ops:
        if op.name in reader.reads:
            if _moves(net, reader):
                fracs.append(_next_frac(net, reader))
            elif isinstance(reader, Quantize):
                fracs.append(reader.format.frac)
    return min(fracs)


def exact_type(format: Fixed) -> str:
    """The C++ type of values that need neither rounding nor saturation."""
    return f"{'ap_fixed' if format.signed else 'ap_ufixed'}<{format.width},{format.integer}>"


def _plain_type(text: str) -> str:
    """A type of `defines.h` without the array of a stream around it and without its count of saturation bits.

    An `ac_fixed`, which says by a word whether it is signed, is called by the name of the same `ap_fixed`.
    """
    if ac := re.search(r"ac_fixed<(\d+,-?\d+),(true|false)((?:,AC_\w+)*)>", text):  # of Intel's and Siemens's compilers
        return f"ap_{'fixed' if ac[2] == 'true' else 'ufixed'}<{ac[1]}{ac[3].replace('AC_', 'AP_')}>"
    match = re.search(r"(ap_u?(?:fixed|int)<\w+(?:,-?\d+)?)((?:,AP_\w+)*)(?:,0)?>", text)
    return f"{match[1]}{match[2]}>" if match else text
