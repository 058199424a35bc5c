"""QONNX: the file, what runs it, and the road that its users take, hls4ml's own conversion."""

import contextlib
import io
import json
import re

import numpy as np
import onnx
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy import toolchain
from hmq_fpga.deploy.parity import ParityError, check
from hmq_fpga.deploy.qkeras.versions import import_keras
from hmq_fpga.deploy.qonnx import model as qonnx_model
from hmq_fpga.deploy.qonnx.config import hls4ml_config
from hmq_fpga.deploy.qonnx.graph import _ATTRIBUTES
from hmq_fpga.deploy.qonnx.model import QonnxSimulator, export, to_qonnx
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Add, AvgPool, Dense, DepthwiseConv, Flatten, Input, MaxPool, Quantize, Scale
from tests import outside
from tests.deploy.networks import Builder, scheme
from tests.deploy.test_every_op import NETWORKS, network, weights

SIX = scheme(signed=True, bits=6, m=1)


def convert(net, folder, io_type="io_parallel"):
    """By hls4ml, from the files in a folder alone."""
    from hls4ml.converters import convert_from_onnx_model

    if outside.has_qkeras():
        import_keras()  # hls4ml's writer would, with warnings that are errors here
    assert export(net, folder) is None
    config = json.loads((folder / "hls4ml_config.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        project = convert_from_onnx_model(
            onnx.load(folder / "model.onnx"),
            hls_config=config,
            backend="Vitis",
            io_type=io_type,
            output_dir=str(folder / "hls"),
        )
        project.write()
    return project


def test_a_quantizer_is_the_format():
    net = Builder((3,), scheme(signed=True, bits=5, m=-2)).quantize("relu", scheme(signed=False, bits=3, m=1)).net
    model = to_qonnx(net)
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    for node, format_ in zip(model.graph.node, net.formats.values(), strict=True):
        assert (node.op_type, node.domain) == ("Quant", "qonnx.custom_op.general")
        assert [float(constants[name]) for name in node.input[1:]] == [format_.step, 0, format_.width]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"signed": int(format_.signed), "narrow": 0, "rounding_mode": b"ROUND"}


@pytest.mark.parametrize("fixture", ["mlp", "cnn"])
def test_qonnx_computes_every_tensor(fixture, request, samples, tmp_path, monkeypatch):
    net = request.getfixturevalue(fixture)
    export(net, tmp_path)
    x = samples(net)
    x[0], x[1], x[2] = np.inf, -np.inf, np.finfo(np.float32).max
    monkeypatch.setattr(qonnx_model, "BATCH", 128)  # which does not divide their number
    simulator = QonnxSimulator.load(net, tmp_path)
    expected = reference.trace(net, x)
    for name, codes in simulator.trace(x).items():
        assert_array_equal(codes, expected.pop(name), err_msg=name)
    assert not expected
    assert_array_equal(simulator.predict(x[:5]), reference.run(net, x[:5]))


def test_several_ports_and_names_of_others(samples):
    """Among them those that helpers of the graph would have."""
    five = scheme(signed=True, bits=5, m=0)
    ops = (
        Input(name="a", shape=(3,), format=five),
        Input(name="b", shape=(3,), format=scheme(signed=True, bits=3, m=1)),
        Dense(name="fc", source="a", weight=np.eye(3, dtype=np.int64) * 5, weight_format=five, bias=np.arange(3)),
        Add(name="fc_product", sources=("fc", "b")),
        Quantize(name="fc_weight", source="fc_product", format=Fixed(signed=True, width=1, frac=3)),
        Quantize(name="A_quantizer", source="fc_product", format=five),
    )
    net = QNet(ops, ("fc_weight", "A_quantizer"))
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    assert len(np.unique(reference.run(net, x), axis=0)) > 50
    assert_array_equal(QonnxSimulator(net).predict(x), reference.run(net, x))


def test_parity_names_the_tensor_that_differs(mlp, samples, tmp_path):
    export(mlp, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    constant = next(c for c in model.graph.initializer if c.name == "relu3_bitwidth")
    constant.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.float32), constant.name))
    parity = check(mlp, [QonnxSimulator(mlp, model)], samples(mlp))
    with pytest.raises(ParityError, match=r"qonnx: .* tensor 'relu3' first differs"):
        parity.raise_for_mismatch()


@pytest.mark.parametrize(
    ("net", "line"),
    [
        (
            Builder((2,), scheme(signed=True, bits=16, m=0)).dense("fc", 2, scheme(signed=True, bits=16, m=0)).net,
            r"op 'fc': its sums need \d+ bits, and qonnx's float32 is exact up to 24",
        ),
        (
            Builder((2,), scheme(signed=True, bits=5, m=-140)).quantize("q", SIX).net,
            "op 'input': float32, in which qonnx computes, has no values of ap_fixed<5,-139",
        ),
    ],
)
def test_what_float32_does_not_hold_is_refused(net, line, tmp_path):
    with pytest.raises(InvalidInput, match=line):
        export(net, tmp_path / "qonnx")
    assert not (tmp_path / "qonnx").exists()


def test_files_that_are_not_the_networks(mlp, cnn, tmp_path, monkeypatch):
    export(cnn, tmp_path)
    with pytest.raises(InvalidInput, match="not of this network, it has no such tensor as 'input'"):
        QonnxSimulator.load(mlp, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08damaged")
    with pytest.raises(InvalidInput, match=r"model\.onnx: not an ONNX model"):
        QonnxSimulator.load(mlp, tmp_path)
    monkeypatch.setattr(qonnx_model, "find_spec", lambda name: None)
    with pytest.raises(toolchain.ToolMissing, match=r"pip install 'hmq-fpga\[qonnx\]'"):
        export(mlp, tmp_path)


def residual():
    """Two readers of a tensor with formats of their own, padding, single channels, means, a dense layer by position."""
    net = Builder((6, 6, 2), scheme(signed=True, bits=5, m=1), seed=7)
    net.conv("value", (3, 3), 3, scheme(signed=True, bits=4, m=-1), padding=((1, 1), (1, 1)))
    net.quantize("coarse", scheme(signed=False, bits=4, m=1)).quantize("fine", SIX, source="value")
    net.ops += [
        Add(name="op", sources=("coarse", "fine")),
        Quantize(name="sum", source="op", format=scheme(signed=True, bits=5, m=2)),
        DepthwiseConv(name="depth", source="sum", **weights(2, 2, 3), stride=(1, 1), padding=((0, 0), (0, 0))),
        Quantize(name="again", source="depth", format=scheme(signed=False, bits=5, m=3)),
        AvgPool(name="mean", source="again", window=(2, 2), stride=(2, 2)),
        Quantize(name="less", source="mean", format=scheme(signed=False, bits=4, m=3)),
        Dense(name="over", source="less", **weights(3, 4)),
        Quantize(name="last", source="over", format=scheme(signed=True, bits=6, m=4)),
        Flatten(name="flat", source="last"),
        Dense(name="fc", source="flat", **weights(16, 3)),
    ]
    return net.net


def fine():
    """Grids beyond those of hls4ml's default type in a scale, a pooling and sums, and a quantizer far above them."""
    net = Builder((4, 4, 2), scheme(signed=True, bits=5, m=-8), seed=2)
    net._linear(Scale, "scale", (2,), scheme(signed=True, bits=4, m=-2), bias=90).pool("pool", (2, 2))
    net.quantize("small", scheme(signed=True, bits=7, m=-9)).flatten()
    net.dense("fc", 3, scheme(signed=True, bits=5, m=0), bias=9)
    net.dense("sums", 2, scheme(signed=True, bits=4, m=0), bias=9, source="flat")
    return QNet(tuple(net.quantize("far", scheme(signed=True, bits=2, m=6)).ops), ("fc", "far"))


ROADS = {"residual": residual(), "fine": fine()}


@pytest.mark.parametrize(("name", "io_type"), [("residual", "io_stream"), *((name, "io_parallel") for name in ROADS)])
@pytest.mark.filterwarnings("ignore:Failed to propagate quantization bias")
def test_hls4mls_own_conversion_gives_the_same_integers(name, io_type, tmp_path):
    net = ROADS[name]
    values = np.random.default_rng(0).normal(size=(100, *net.input_shape))
    x = (values * 2.0**net.input.format.threshold_log2).astype(np.float32)
    expected = reference.run(net, x)
    assert len(np.unique(expected, axis=0)) > 50
    project = convert(net, tmp_path, io_type)
    used = {key for node in project.graph.values() for key in node.attributes} - project.output_vars.keys()
    assert {key for key in used if not re.search(r"_(scale|zeropt|bitwidth|values|cpy\d)$|_act$", key)} <= _ATTRIBUTES
    project.compile()
    outputs = project.predict(x)
    rows = [part.reshape(len(x), -1) for part in (outputs if isinstance(outputs, list) else [outputs])]
    assert_array_equal(np.concatenate(rows, 1), net.decode(expected))


@pytest.mark.parametrize(
    ("net", "line"),
    [
        (NETWORKS["Table"], "op 'op': hls4ml's QONNX conversion has no Table"),
        (NETWORKS["Gather"], "op 'op': hls4ml's QONNX conversion has no Gather"),
        (NETWORKS["groups"], "op 'op': .* takes groups for those of a depthwise convolution"),
        (NETWORKS["dilation"], "op 'op': .* has no dilation"),
        (NETWORKS["depthwise dilation"], "op 'op': .* has no dilation"),
        (NETWORKS["Upsample"], "op 'op': .* takes height for width in an upsampling"),
        (network(Quantize, format=Fixed(signed=True, width=1, frac=0)), "op 'op': .* no signed format of one bit"),
        (
            Builder((4, 2), SIX)._add(MaxPool, "pool", window=(2,), stride=(2,)).net,
            "op 'pool': .* channels for position",
        ),
        (Builder((2,), SIX).quantize("relu", SIX).quantize("relu_act", SIX).net, "'relu_act': hls4ml would have two"),
    ],
)
def test_what_hls4mls_own_conversion_cannot_have_has_a_line_and_no_configuration(net, line, tmp_path):
    said = export(net, tmp_path)
    assert said is not None
    assert re.search(line, said)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(InvalidInput, match=line):
        hls4ml_config(net)
