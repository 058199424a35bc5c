"""The reference against plain loops over Python integers and fractions."""

import operator
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hmq_fpga.ir import ops, reference
from hmq_fpga.ir.errors import InvalidInput
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
    Linear,
    Maximum,
    MaxPool,
    Minimum,
    Multiply,
    Op,
    Pad,
    Padding,
    Quantize,
    Ranges,
    Scale,
    Subtract,
    Table,
    TensorType,
    Upsample,
)
from tests.strategies import SEEDS, inputs, qnets

Values = dict[tuple[int, ...], Fraction]  # one sample's values by position


def rounded(value: Fraction, format_: Fixed) -> Fraction:
    """Half to even, saturating."""
    step = 1 / Fraction(2) ** format_.frac
    bits = format_.width - format_.signed
    return step * min(max(round(value / step), -(2**bits) if format_.signed else 0), 2**bits - 1)


ELEMENTWISE = {Add: operator.add, Subtract: operator.sub, Maximum: max, Minimum: min, Multiply: operator.mul}


def codes_of(format_: Fixed) -> range:
    half = 2 ** (format_.width - 1)
    return range(-half, half) if format_.signed else range(2 * half)


def slowly(op: Op, xs: list[Values], shape: tuple[int, ...], frac: int, held: Fixed) -> Values:
    """One op on exact values; `shape` is its output's, `frac` its bias's, `held` the format of what it reads."""
    positions = list(product(*map(range, shape)))
    x = xs[0]

    def bias(j: int) -> Fraction:
        return Fraction(int(op.bias[j])) / Fraction(2) ** frac

    def window(p: tuple[int, ...], padding: Padding) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Positions in the kernel and in the source that the output at `p` reads."""
        dims = len(op.stride)
        inside = product(*map(range, op.weight.shape[:dims] if isinstance(op, Conv | DepthwiseConv) else op.window))
        apart = getattr(op, "dilation", ()) or (1,) * dims
        geometry = [(d, zip(p, op.stride, d, apart, padding, strict=True)) for d in inside]
        return [(d, tuple(i * s + k * a - before for i, s, k, a, (before, _) in along)) for d, along in geometry]

    match op:
        case Quantize():
            return {p: rounded(x[p], op.format) for p in positions}
        case LeakyRelu():
            return {p: x[p] if x[p] > 0 else x[p] / 2**op.shift for p in positions}
        case Dense():
            return {
                (*p, j): bias(j) + sum(x[(*p, i)] * weight(op, (i, j)) for i in range(len(op.weight)))
                for *p, j in positions
            }
        case Scale():
            return {(*p, j): bias(j) + x[(*p, j)] * weight(op, (j,)) for *p, j in positions}
        case Conv():
            channels, members = op.weight.shape[-2], op.weight.shape[-1] // op.groups
            return {
                (*p, j): bias(j)
                + sum(
                    x.get((*at, j // members * channels + i), Fraction(0)) * weight(op, (*d, i, j))
                    for d, at in window(tuple(p), op.padding)
                    for i in range(channels)
                )
                for *p, j in positions
            }
        case DepthwiseConv():
            return {
                (*p, j): bias(j)
                + sum(x.get((*at, j), Fraction(0)) * weight(op, (*d, j)) for d, at in window(tuple(p), op.padding))
                for *p, j in positions
            }
        case MaxPool() | AvgPool():
            none = tuple((0, 0) for _ in op.window)
            read = {(*p, j): [x[(*at, j)] for _, at in window(tuple(p), none)] for *p, j in positions}
            return {p: max(v) if isinstance(op, MaxPool) else sum(v) / len(v) for p, v in read.items()}
        case Pad():
            before = [*(pair[0] for pair in op.padding), 0]
            return {p: x.get(tuple(i - n for i, n in zip(p, before, strict=True)), Fraction(0)) for p in positions}
        case Upsample():
            factor = (*op.factor, 1)
            return {p: x[tuple(i // n for i, n in zip(p, factor, strict=True))] for p in positions}
        case Flatten():
            return {(i,): value for i, (_, value) in enumerate(sorted(x.items()))}
        case Table():
            first, step = min(codes_of(held)), 1 / Fraction(2) ** held.frac
            table = {(first + i) * step: int(code) for i, code in enumerate(op.values)}
            return {p: table[x[p]] / Fraction(2) ** op.format.frac for p in positions}
        case Gather():
            row = [value for _, value in sorted(x.items())]
            fill = op.fill / Fraction(2) ** held.frac
            return {p: row[op.index[p]] if op.index[p] >= 0 else fill for p in positions}
        case Add() | Subtract() | Maximum() | Minimum() | Multiply():
            return {p: ELEMENTWISE[type(op)](x[p], xs[1][p]) for p in positions}
        case Concat():
            channels = 1 + max(p[-1] for p in x)
            return {(*p, j): x[(*p, j)] if j < channels else xs[1][(*p, j - channels)] for *p, j in positions}
    raise AssertionError(op)


def weight(op: Linear, index: tuple[int, ...]) -> Fraction:
    return Fraction(int(op.weight[index])) / Fraction(2) ** op.weight_format.frac


def run_slowly(net: QNet, sample: np.ndarray) -> dict[str, Values]:
    """Exact values of every tensor."""
    tensors = {net.input.name: {p: rounded(Fraction(v), net.input.format) for p, v in np.ndenumerate(sample)}}
    for op in net.ops[1:]:
        sources = [tensors[name] for name in op.reads]
        tensors[op.name] = slowly(op, sources, net.shapes[op.name], net.formats[op.name].frac, net.formats[op.reads[0]])
    return tensors


def assert_equals_loops(net: QNet, x: np.ndarray) -> None:
    traced = reference.trace(net, x)
    assert list(traced) == [op.name for op in net.ops]
    for i, sample in enumerate(x):
        for name, values in run_slowly(net, sample).items():
            expected = np.empty(net.shapes[name], dtype=np.int64)
            for position, value in values.items():
                code = value * Fraction(2) ** net.formats[name].frac
                assert code.denominator == 1, f"{name} is not on its grid"
                expected[position] = code
            assert net.formats[name].contains(expected), f"{name} exceeds its format"
            assert_array_equal(traced[name][i], expected, err_msg=name)
    assert_array_equal(reference.run(net, x), net.join(traced))
    for name, ranges in net.ranges.items():
        assert (traced[name] >= ranges.lo).all() and (traced[name] <= ranges.hi).all(), name


@settings(max_examples=100)
@given(qnets(), SEEDS)
def test_equals_plain_loops(net: QNet, seed: int) -> None:
    assert_equals_loops(net, inputs(net, 2, seed))


def test_dense_over_channels_and_pooling_of_negative_sums() -> None:
    """What networks of a search do not contain, but a QNet may."""
    rng = np.random.default_rng(0)
    weight_format = Fixed(signed=True, width=4, frac=1)
    net = QNet(
        (
            Input(name="x", shape=(4, 5, 3), format=Fixed(signed=True, width=5, frac=-2)),
            Dense(
                name="mix",
                source="x",
                weight=rng.integers(-8, 8, (3, 2)),
                weight_format=weight_format,
                bias=rng.integers(-500, 0, 2),
            ),
            MaxPool(name="pool", source="mix", window=(3, 2), stride=(1, 2)),
            Flatten(name="flat", source="pool"),
        )
    )
    assert_equals_loops(net, rng.normal(scale=40, size=(5, 4, 5, 3)))


def test_a_1x1_image_padded_on_one_side() -> None:
    weight_format = Fixed(signed=True, width=3, frac=0)
    net = QNet(
        (
            Input(name="x", shape=(1, 1, 1), format=Fixed(signed=False, width=3, frac=0)),
            Conv(
                name="conv",
                source="x",
                weight=np.array([[1, 2], [3, -4]]).reshape(2, 2, 1, 1),
                weight_format=weight_format,
                bias=np.array([10]),
                stride=(1, 1),
                padding=((1, 0), (0, 1)),
            ),
        )
    )
    assert_array_equal(reference.run(net, np.full((1, 1, 1, 1), 5.0)), [[[[10 + 3 * 5]]]])


@given(SEEDS, st.integers(1, 6))
def test_sums_beyond_float64_are_exact(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    source, weight_format = Fixed(signed=True, width=29, frac=0), Fixed(signed=True, width=28, frac=3)
    weight_codes = rng.integers(weight_format.lo, weight_format.hi, (n, 1), endpoint=True)
    weight_codes[0, 0] = weight_format.hi
    net = QNet(
        (
            Input(name="x", shape=(n,), format=source),
            Dense(name="fc", source="x", weight=weight_codes, weight_format=weight_format, bias=np.array([1])),
        )
    )
    assert net.partial_sum_bits(net.linears[0]) > 53
    x = rng.integers(source.lo, source.hi, (3, n), endpoint=True)
    expected = [[sum(int(a) * int(b) for a, b in zip(row, weight_codes[:, 0], strict=True)) + 1] for row in x]
    assert_array_equal(reference.run(net, x.astype(np.float64)), expected)


def test_float64_would_round_where_integers_are_used() -> None:
    x = np.array([[2**29 - 1, 1]])
    w = np.array([[2**28 - 1], [1]])
    exact = (2**29 - 1) * (2**28 - 1) + 1
    assert ops._matmul(x, w, 58)[0, 0] == exact
    assert ops._matmul(x, w, 53)[0, 0] != exact


@given(qnets(images=st.just(False)), SEEDS)
def test_integer_and_float64_products_agree(net: QNet, seed: int) -> None:
    x = net.encode(inputs(net, 8, seed))
    op = net.linears[0]
    assert_array_equal(ops._matmul(x, op.weight, 54), ops._matmul(x, op.weight, 53))


def test_batches_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    net = QNet(
        (
            Input(name="x", shape=(2,), format=Fixed(signed=True, width=8, frac=4)),
            Quantize(name="q", source="x", format=Fixed(signed=False, width=3, frac=1)),
        )
    )
    x = np.random.default_rng(0).normal(scale=4, size=(10, 2))
    whole = reference.run(net, x)
    monkeypatch.setattr(reference, "VALUES", 3 * 2)
    assert_array_equal(reference.run(net, x), whole)
    assert reference.run(net, x[:0]).shape == (0, 2)


def test_channels_first_input_is_refused() -> None:
    net = QNet((Input(name="x", shape=(4, 4, 1), format=Fixed(signed=False, width=1, frac=0)),))
    with pytest.raises(InvalidInput, match="channels last"):
        reference.run(net, np.zeros((2, 1, 4, 4)))


@given(st.data())
@pytest.mark.parametrize("dims", [1, 2])
def test_groups_and_dilation_are_those_of_torch(dims: int, data: st.DataObject) -> None:
    each = st.tuples(*[st.integers(1, 3)] * dims)
    groups, channels, members = (data.draw(st.integers(1, 3)) for _ in range(3))
    depthwise = data.draw(st.booleans())
    kernel, stride, dilation, padding = (data.draw(each) for _ in range(4))
    inputs_, outputs = (groups, groups) if depthwise else (groups * channels, groups * members)
    rng = np.random.default_rng(data.draw(SEEDS))
    shape = (*kernel, groups) if depthwise else (*kernel, channels, outputs)
    fields = {
        "weight": rng.integers(-8, 8, shape),
        "weight_format": Fixed(signed=True, width=4, frac=0),
        "bias": rng.integers(-9, 9, outputs),
        "stride": stride,
        "padding": tuple((n, n) for n in padding),
        "dilation": dilation,
    }
    op = (
        DepthwiseConv(name="op", source="x", **fields)
        if depthwise
        else Conv(name="op", source="x", **fields, groups=groups)
    )
    net = QNet((Input(name="x", shape=(*[7] * dims, inputs_), format=Fixed(signed=True, width=5, frac=0)), op))
    x = rng.integers(-16, 16, (2, *net.input_shape))
    weight = op.weight[..., None, :] if depthwise else op.weight
    expected = getattr(torch.nn.functional, f"conv{dims}d")(
        torch.tensor(np.moveaxis(x, -1, 1), dtype=torch.float64),
        torch.tensor(np.moveaxis(weight, (-1, -2), (0, 1)), dtype=torch.float64),
        torch.tensor(op.bias, dtype=torch.float64),
        stride,
        padding,
        dilation,
        groups,
    )
    assert_array_equal(reference.run(net, x), np.moveaxis(expected.numpy(), 1, -1))
    assert op.macs(net.tensors["op"]) == op.weight.size * net.tensors["op"].positions


@given(st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 9), st.integers(-2, 2)), min_size=1, max_size=2))
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_the_ranges_of_two_tensors_are_what_is_reached(kind: type[Op], given: list[tuple[int, int, int]]) -> None:
    """Of one tensor given twice as well, where the function grows or is a square."""
    held = [TensorType((1,), Fixed.enclosing(lo, lo + size, frac)) for lo, size, frac in given]
    ranges = [Ranges(np.array([lo]), np.array([lo + size])) for lo, size, _ in given]
    codes = np.array(list(product(*[range(lo, lo + size + 1) for lo, size, _ in given]))).T[..., None]
    if once := len(given) == 1:
        held, ranges, codes = 2 * held, 2 * ranges, np.concatenate([codes, codes])
    op = kind(name="op", sources=("a", "a" if once else "b"))
    reached, bounds = op.run(held, codes), op.ranges(held, ranges)
    assert op.result(held).format.contains(np.array([bounds.lo, bounds.hi]))
    assert bounds.lo <= reached.min() and reached.max() <= bounds.hi
    if not (once and kind is Subtract):
        assert (bounds.lo, bounds.hi) == (reached.min(), reached.max())
    exact = [
        ELEMENTWISE[kind](*(x / Fraction(2) ** t.format.frac for x, t in zip(xs, held, strict=True)))
        for xs in codes[..., 0].T.tolist()
    ]
    assert [code / Fraction(2) ** op.result(held).format.frac for code in reached.ravel().tolist()] == exact


@given(st.lists(st.integers(-8, 7), min_size=8, max_size=8), st.integers(0, 7), st.integers(0, 7), st.booleans())
def test_the_range_of_a_table_is_what_is_read_of_it(values: list[int], first: int, last: int, signed: bool) -> None:
    held = TensorType((1,), Fixed(signed=signed, width=3, frac=0))
    op = Table(name="op", source="x", values=np.array(values), format=Fixed(signed=True, width=4, frac=1))
    lo, hi = sorted((first, last))
    bounds = op.ranges([held], [Ranges(np.array([lo]) + held.format.lo, np.array([hi]) + held.format.lo)])
    assert (bounds.lo, bounds.hi) == (min(values[lo : hi + 1]), max(values[lo : hi + 1]))
    assert_array_equal(op.run([held], [np.arange(8) + held.format.lo]), values)
