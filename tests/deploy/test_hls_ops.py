"""hls4ml computes every tensor as the reference: ops that move values, tables, merges, and what is made otherwise."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.hls.lower import MAX_READERS, lowered
from hmq_fpga.deploy.hls.project import HlsProject, LayerSettings, expected_types
from hmq_fpga.ir import reference
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
    Maximum,
    MaxPool,
    Minimum,
    Multiply,
    Quantize,
    Scale,
    Subtract,
    Table,
)

SIGNED, FINE, UNSIGNED = (
    Fixed(signed=True, width=5, frac=2),
    Fixed(signed=True, width=6, frac=4),
    Fixed(signed=False, width=4, frac=1),
)
WEIGHT = Fixed(signed=True, width=4, frac=2)


def codes(*shape, lo=-8, hi=8):
    return np.random.default_rng(len(shape)).integers(lo, hi, shape)


def weights(*shape):
    return {"weight": codes(*shape), "weight_format": WEIGHT, "bias": codes(shape[-1])}


def inputs(net, count=60):
    """Codes anywhere and at both ends, as values `(batch, *input_shape)`."""
    rng = np.random.default_rng(0)
    parts = []
    for op in net.inputs:
        drawn = rng.integers(op.format.lo, op.format.hi, (count, *op.shape), endpoint=True)
        ends = rng.choice([op.format.lo, op.format.hi], (count // 2, *op.shape))
        drawn = np.concatenate(
            [drawn, ends, np.full_like(drawn[:1], op.format.lo), np.full_like(drawn[:1], op.format.hi)]
        )
        parts.append(op.format.decode(drawn).astype(np.float32))
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def image(shape=(4, 4, 3), format_=SIGNED):
    return Input(name="x", shape=shape, format=format_)


def index(shape, *axes):
    """Of a tensor whose axes change places."""
    return np.arange(np.prod(shape)).reshape(shape).transpose(axes)


def network(*ops):
    """Of all ops, whose outputs are the tensors that nothing reads."""
    read = {name for op in ops for name in op.reads}
    return QNet(ops, tuple(op.name for op in ops if op.name not in read))


def moves():
    """Transposed, cut, rolled, repeated, filled, and beyond three dimensions; before and after other ops."""
    shape = (4, 4, 3)
    padded = np.pad(index(shape, 0, 1, 2), ((1, 0), (0, 2), (1, 0)), constant_values=-1)
    return network(
        image(shape),
        Gather(name="transposed", source="x", index=index(shape, 2, 0, 1).copy()),
        Conv(name="conv", source="transposed", **weights(2, 2, 4, 3), stride=(1, 1), padding=((0, 0), (0, 0))),
        Quantize(name="relu", source="conv", format=FINE),
        Gather(name="padded", source="x", index=padded, fill=-3),
        Gather(name="blocks", source="x", index=np.arange(48).reshape(2, 2, 2, 2, 3)[:, :, :, ::-1].copy()),
        Scale(name="scaled", source="blocks", **weights(3)),
        Quantize(name="scaled_q", source="scaled", format=FINE),
        Gather(name="reshaped", source="x", index=np.arange(48).reshape(8, 6)),
        Dense(name="positions", source="reshaped", **weights(6, 4)),
        Quantize(name="positions_q", source="positions", format=SIGNED),
        Gather(name="cut", source="positions_q", index=np.arange(32).reshape(8, 4)[2:6, ::2].copy()),
        Flatten(name="flat", source="cut"),
        LeakyRelu(name="leaky", source="flat", shift=2),
        Gather(name="twice", source="leaky", index=np.repeat(np.arange(8), 2)),
        Dense(name="out", source="twice", **weights(16, 3)),
    )


def values():
    """Tables of codes of any sign, of a finer copy, of a variable with bits to spare; merges of two and of one."""
    far = Fixed(signed=True, width=9, frac=14)
    one = Fixed(signed=False, width=1, frac=0)
    merges = []
    for i, kind in enumerate((Add, Subtract, Maximum, Minimum, Multiply)):
        name = kind.__name__.lower()
        merges.append(kind(name=f"{name}_two", sources=("fine", "half") if i % 2 else ("half", "x")))
        merges.append(kind(name=f"{name}_one", sources=("fine", "fine")))
    return network(
        image((3, 2, 2)),
        Quantize(name="fine", source="x", format=FINE),
        Table(name="odd", source="x", values=codes(32, lo=-200, hi=200), format=far),
        Quantize(name="half", source="x", format=UNSIGNED),
        Table(name="of_unsigned", source="half", values=codes(16, lo=0, hi=4), format=UNSIGNED),
        Quantize(name="bit", source="x", format=one),
        Table(name="of_bit", source="bit", values=np.array([5, -7]), format=SIGNED),
        Scale(
            name="finer",
            source="half",
            weight=np.full(2, 4),
            weight_format=Fixed(signed=True, width=4, frac=2),
            bias=np.zeros(2, np.int64),
        ),
        Table(name="of_finer", source="finer", values=codes(64, lo=-16, hi=16), format=SIGNED),
        Flatten(name="flat", source="of_unsigned"),
        Table(name="of_flat", source="flat", values=codes(16, lo=-16, hi=16), format=SIGNED),
        Scale(
            name="tiny",
            source="x",
            weight=np.array([1, -1]),
            weight_format=Fixed(signed=True, width=2, frac=6),
            bias=np.zeros(2, np.int64),
        ),
        Quantize(name="none", source="tiny", format=Fixed(signed=True, width=4, frac=-1)),
        Table(name="of_tiny", source="tiny", values=codes(64, lo=-16, hi=16), format=SIGNED),
        *merges,
    )


def layers():
    """Dilation, groups, strides of two sizes, dense layers of positions, and windows that overlap or leave gaps."""
    around = ((1, 1), (1, 1))
    depthwise = {"padding": ((0, 0), (0, 0)), "source": "x"}
    return network(
        image((7, 6, 2), UNSIGNED),
        Conv(name="dilated", source="x", **weights(2, 2, 2, 3), stride=(1, 2), padding=around, dilation=(2, 3)),
        Conv(name="grouped", source="x", **weights(3, 2, 1, 4), stride=(1, 1), padding=around, groups=2),
        DepthwiseConv(name="deep", **weights(2, 2, 2), stride=(1, 1), dilation=(3, 1), **depthwise),
        DepthwiseConv(name="uneven", **weights(2, 3, 2), stride=(1, 2), **depthwise),
        DepthwiseConv(name="tall", **weights(2, 3, 2), stride=(3, 1), **depthwise),
        DepthwiseConv(name="flat_lines", **weights(1, 3, 2), stride=(2, 1), **depthwise),
        DepthwiseConv(name="dots", **weights(1, 1, 2), stride=(2, 3), **depthwise),
        Conv(name="column", source="x", **weights(2, 1, 2, 2), stride=(1, 2), padding=((0, 0), (0, 0))),
        Conv(name="lines", source="x", **weights(1, 2, 2, 2), stride=(2, 1), padding=((1, 0), (0, 1))),
        MaxPool(name="overlap", source="x", window=(3, 2), stride=(2, 1)),
        AvgPool(name="mean", source="x", window=(2, 2), stride=(1, 3)),
        Dense(name="pixels", source="x", **weights(2, 5)),
        Gather(name="row", source="x", index=np.arange(84).reshape(42, 2)),
        DepthwiseConv(name="along", source="row", **weights(3, 2), stride=(2,), padding=((1, 0),)),
    )


def lines():
    """Of one spatial dimension; and what was flattened is rounded, scaled, and merged with what was not."""
    return network(
        image((9, 4), UNSIGNED),
        Conv(name="dilated", source="x", **weights(2, 4, 3), stride=(2,), padding=((2, 1),), dilation=(3,)),
        Conv(name="grouped", source="x", **weights(3, 2, 4), stride=(1,), padding=((1, 1),), groups=2),
        DepthwiseConv(name="deep", source="x", **weights(2, 4), stride=(1,), padding=((0, 0),), dilation=(2,)),
        DepthwiseConv(name="points", source="x", **weights(1, 4), stride=(2,), padding=((1, 0),)),
        MaxPool(name="overlap", source="x", window=(3,), stride=(2,)),
        AvgPool(name="mean", source="x", window=(2,), stride=(1,)),
        Dense(name="positions", source="x", **weights(4, 5)),
        Quantize(name="signed", source="grouped", format=SIGNED),
        Concat(name="joined", sources=("signed", "positions")),
        Flatten(name="flat", source="signed"),
        Quantize(name="late", source="flat", format=UNSIGNED),
        Dense(name="logits", source="late", **weights(36, 3)),
        Scale(name="scaled", source="late", **weights(36)),
        Gather(name="narrow", source="signed", index=np.arange(36).reshape(18, 2)),
        Quantize(name="narrow_q", source="narrow", format=FINE),
        Flatten(name="narrow_flat", source="narrow_q"),
        Flatten(name="pixels", source="x"),
        Subtract(name="less", sources=("narrow_flat", "pixels")),
        Scale(name="of_two", source="narrow_q", **weights(2)),
    )


def two_inputs():
    """Of different shapes and formats; a stream that is read often, and twice by one op."""
    often = [Quantize(name=f"q{i}", source="x", format=replace(FINE, frac=i)) for i in range(MAX_READERS + 2)]
    return network(
        image((3, 2, 2)),
        Input(name="Y", shape=(5,), format=UNSIGNED),
        *often,
        Dense(name="fc", source="Y", **weights(5, 12)),
        Quantize(name="fc_q", source="fc", format=SIGNED),
        Gather(name="as_image", source="fc_q", index=np.arange(12).reshape(3, 2, 2)),
        Subtract(name="less", sources=("x", "as_image")),
        Quantize(name="less_q", source="less", format=SIGNED),
        Flatten(name="flat", source="less_q"),
        Concat(name="joined", sources=("fc_q", "flat")),
        Concat(name="wide", sources=("x", "as_image")),
        Multiply(name="square", sources=("x", "x")),
    )


def ports():
    """An input that is put out, a tensor that is put out twice, and one that others read in another shape."""
    return QNet(
        (
            image((3, 2)),
            Input(name="y", shape=(4, 2), format=FINE),
            Flatten(name="x_flat", source="x"),
            Gather(name="x_again", source="x", index=np.arange(6).reshape(3, 2)),
            Conv(name="conv", source="y", **weights(2, 2, 3), stride=(1,), padding=((0, 0),)),
            Quantize(name="relu", source="conv", format=UNSIGNED),
            Flatten(name="relu_flat", source="relu"),
            Gather(name="relu_again", source="relu", index=np.arange(9).reshape(1, 9)),
            Dense(name="fc", source="relu", **weights(3, 2)),
            LeakyRelu(name="late", source="x_flat", shift=1),
        ),
        ("x_again", "relu_flat", "relu_again", "fc", "late"),
    )


NETWORKS = {"values": values, "moves": moves, "layers": layers, "lines": lines, "two": two_inputs, "ports": ports}
ADDERS = {
    "strategy": "distributed_arithmetic",
    "layers": {n: LayerSettings(strategy="Latency") for n in ("deep", "points")},
}
CASES = {
    **{
        f"{name}-{io_type}": (name, {"io_type": io_type})
        for name in NETWORKS
        for io_type in ("io_parallel", "io_stream")
    },
    "vivado-parallel": ("layers", {"io_type": "io_parallel", "backend": "Vivado"}),
    "vivado-stream": ("moves", {"io_type": "io_stream", "backend": "Vivado"}),
    "adders": ("lines", {"io_type": "io_stream", **ADDERS}),
    "resource": ("layers", {"io_type": "io_stream", "strategy": "Resource", "reuse_factor": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_the_references(case, tmp_path):
    name, options = CASES[case]
    net = NETWORKS[name]()
    project = HlsProject.create(net, tmp_path / "hls", **options)
    x = inputs(net)
    expected, traced = reference.trace(net, x), project.trace(x)
    assert traced.keys() == expected.keys()
    for op, right in expected.items():
        assert_array_equal(traced[op], right, op)
        assert len(np.unique(right)) > 1 or op in ("subtract_one", "none"), op
    for op, roles in project.types().items():
        assert roles.items() <= expected_types(net)[op].items(), op


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
def test_several_inputs_and_outputs_are_ports_in_their_order(io_type, tmp_path):
    net = two_inputs()
    project = HlsProject.create(net, tmp_path / "hls", io_type=io_type)
    x = inputs(net)
    expected = reference.run(net, x)
    assert_array_equal(HlsProject.load(project.folder).predict(x), expected)
    project.write_tb_data(x, expected)
    rows = np.loadtxt(project.folder / "tb_data" / "tb_input_features.dat")
    assert_array_equal(rows, x)
    bench = (project.folder / "myproject_test.cpp").read_text()
    assert re.findall(r"copy_data<float, (\w+), (\d+), [\d*]+>\(in, (\w+)\);", bench) == [
        ("input_t", "0", "x_values"),
        ("input2_t", "12", "Y_values"),
    ]
    with pytest.raises(InvalidInput, match="finite values of shape"):
        project.predict(x[:, :-1])


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_lowered_network_is_the_same_function(name, io_type):
    net = NETWORKS[name]()
    made = lowered(net, io_type)
    x = inputs(net)
    expected, actual = reference.trace(net, x), reference.trace(made.net, x)
    assert made.held.keys() == expected.keys()
    for op, right in expected.items():
        held, format_ = made.held[op], net.formats[op]
        assert_array_equal(actual[held].reshape(right.shape) << format_.frac - made.net.formats[held].frac, right, op)
    assert [made.held[name] for name in net.outputs] == list(made.net.outputs)
    readers = Counter(name for op in made.net.ops for name in op.reads)
    assert io_type == "io_parallel" or max(readers.values()) <= MAX_READERS


def test_a_quantizer_of_what_was_flattened_is_before_it():
    """hls4ml's streams cannot round what was flattened."""
    net = network(
        image(),
        Flatten(name="flat", source="x"),
        Quantize(name="late", source="flat", format=UNSIGNED),
        Dense(name="out", source="late", **weights(48, 2)),
    )
    made = lowered(net, "io_stream").net
    assert [(type(op), op.name, op.reads) for op in made.ops[1:]] == [
        (Quantize, "late", ("x",)),
        (Flatten, "late_flat", ("late",)),
        (Dense, "out", ("late_flat",)),
    ]


def test_a_table_of_a_variable_with_too_many_bits_is_refused(tmp_path):
    """`ap_fixed` reads the bit half a step below: the linear result has a bit there for the coarse quantizer."""
    net = network(
        image((4,)),
        Dense(
            name="fc", source="x", **{**weights(4, 2), "weight": np.zeros((4, 2), np.int64), "bias": np.array([0, 1])}
        ),
        Quantize(name="none", source="fc", format=Fixed(signed=True, width=4, frac=-9)),
        Table(name="table", source="fc", values=np.array([3, 5]), format=SIGNED),
    )
    with pytest.raises(InvalidInput, match="op 'table': hls4ml has its source in 13 bits"):
        HlsProject.create(net, tmp_path / "hls")
