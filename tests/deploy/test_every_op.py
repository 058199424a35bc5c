"""One law for every op: saved, loaded, digested, and computed by every back end as by the reference."""

import re
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy import backends
from hmq_fpga.deploy.backends import BACKENDS, QKERAS, split_by_installed
from hmq_fpga.deploy.convert import convert_folder
from hmq_fpga.deploy.hls import project
from hmq_fpga.deploy.hls.layers import ATTRIBUTES
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.layers import layer_codes
from hmq_fpga.deploy.parity import check, compare_layers
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import (
    OPS,
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
    Subtract,
    Table,
    Upsample,
)

WEIGHT = Fixed(signed=True, width=4, frac=2)
UNSIGNED, SIGNED = Fixed(signed=False, width=4, frac=2), Fixed(signed=True, width=5, frac=1)


def codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(-8, 8, shape)


def weights(*shape: int) -> dict:
    return {"weight": codes(*shape), "weight_format": WEIGHT, "bias": codes(shape[-1])}


FIELDS: dict[type[Op], dict] = {  # of an op that reads an image of three channels, or two of them
    Scale: weights(3),
    DepthwiseConv: {**weights(2, 2, 3), "stride": (2, 2), "padding": ((0, 1), (1, 0))},
    LeakyRelu: {"shift": 2},
    Table: {"values": codes(16), "format": WEIGHT},
    MaxPool: {"window": (2, 2), "stride": (2, 2)},
    AvgPool: {"window": (2, 1), "stride": (2, 1)},
    Pad: {"padding": ((1, 0), (0, 2))},
    Upsample: {"factor": (2, 1)},
    Gather: {"index": np.random.default_rng(3).permutation(60)[:24].reshape(3, 4, 2).clip(-1, 47), "fill": 5},
    **{kind: {"sources": ("relu", "other")} for kind in (Add, Subtract, Maximum, Minimum, Multiply, Concat)},
}
IN_ALL = {Input, Conv, Quantize, Flatten, Dense}  # ops that every network here has


def network(kind: type[Op], **values) -> QNet:
    """A network with the op, named `op`, between others; with the fields given, else with those above."""
    ops: list[Op] = [
        Input(name="x", shape=(4, 4, 2), format=Fixed(signed=True, width=5, frac=2)),
        Conv(name="conv", source="x", **weights(2, 1, 2, 3), stride=(1, 1), padding=((1, 0), (0, 0))),
        Quantize(name="relu", source="conv", format=UNSIGNED),
    ]
    last = "relu"
    if values := values or FIELDS.get(kind, {}):
        if "other" in values.get("sources", ()):
            ops.append(Quantize(name="other", source="conv", format=SIGNED))
        if kind is LeakyRelu:
            ops[-1] = Quantize(name="relu", source="conv", format=SIGNED)
        read = {} if "sources" in values else {"source": "relu"}
        ops += [kind(name="op", **read, **values), Quantize(name="again", source="op", format=SIGNED)]
        last = "again"
    ops.append(Flatten(name="flat", source=last))
    features = QNet(tuple(ops)).output_shape[0]
    return QNet((*ops, Dense(name="out", source="flat", **weights(features, 3))))


WINDOWS = {"stride": (1, 1), "padding": ((1, 0), (0, 1))}
NETWORKS = {
    **{kind.__name__: network(kind) for kind in FIELDS},
    "groups": network(Conv, **weights(2, 2, 1, 6), **WINDOWS, groups=3),
    "dilation": network(Conv, **weights(2, 2, 3, 2), **WINDOWS, dilation=(2, 3)),
    "depthwise dilation": network(DepthwiseConv, **weights(2, 2, 3), **WINDOWS, dilation=(3, 1)),
    "depthwise strides": network(DepthwiseConv, **{**FIELDS[DepthwiseConv], "stride": (1, 2)}),
    "square": network(Multiply, sources=("relu", "relu")),
    "double": network(Add, sources=("relu", "relu")),
    "doubled channels": network(Concat, sources=("relu", "relu")),
    "dense over channels": network(Dense, **weights(3, 4)),
}

GROUPS = 6  # of networks that are compiled together


def test_no_op_is_left_out():
    assert FIELDS.keys() | IN_ALL == set(OPS.values())


@pytest.mark.parametrize("kind", OPS.values(), ids=OPS)
def test_an_op_is_saved_and_digested(kind, tmp_path):
    net = network(kind)
    net.save(tmp_path / "qnet")
    loaded = QNet.load(tmp_path / "qnet")
    assert loaded.digest == net.digest
    op = next(op for op in reversed(net.ops) if isinstance(op, kind))
    for field in fields(op):
        value, saved = getattr(op, field.name), getattr(loaded[op.name], field.name)
        if isinstance(value, np.ndarray):  # each array decides the digest
            assert_array_equal(saved, value)
            changed = value.copy()
            changed.flat[0] += 1 if changed.flat[0] < 7 else -1
            ops = tuple(replace(o, **{field.name: changed}) if o is op else o for o in net.ops)
            assert QNet(ops).digest != net.digest, field.name
        else:
            assert saved == value, field.name


def beside_one_another(nets: Sequence[QNet]) -> QNet:
    """One network of several, which read the same input, and each have an output: compiled once."""
    ops, outputs = [nets[0].ops[0]], []
    for i, net in enumerate(nets):
        names = {op.name: op.name if isinstance(op, Input) else f"{op.name}_{i}" for op in net.ops}
        for op in net.ops[1:]:
            single, several = getattr(op, "source", None), getattr(op, "sources", None)
            read = {"source": names[single]} if single else {"sources": tuple(names[name] for name in several)}
            ops.append(replace(op, name=names[op.name], **read))
        outputs.append(names[net.outputs[0]])
    return QNet(tuple(ops), tuple(outputs))


@pytest.mark.parametrize("names", [list(NETWORKS)[i::GROUPS] for i in range(GROUPS)], ids=", ".join)
def test_every_back_end_computes_the_same(names, tmp_path):
    nets = [NETWORKS[name] for name in names]
    net = beside_one_another(nets)
    x = np.random.default_rng(0).normal(scale=2, size=(50, 4, 4, 2)).astype(np.float32)
    installed, _ = split_by_installed()
    for backend in installed:
        backend.create(net, tmp_path, Hardware(), None)
    simulators = [s for backend in installed for s in backend.simulators(net, tmp_path, Hardware())]
    parity = check(net, simulators, x)
    parity.raise_for_mismatch()
    assert len(parity.simulators) == len(installed)
    codes = layer_codes(net)
    for simulator in simulators:
        compared, given, _ = compare_layers(net, simulator, codes)
        assert compared.mismatches == 0 and len(given) > len(nets), (simulator.name, compared)
    for each in nets:
        assert len(np.unique(reference.run(each, x), axis=0)) > 25, "the network should tell its inputs apart"


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
@pytest.mark.parametrize("kind", OPS.values(), ids=OPS)
def test_the_attributes_of_hls4mls_layers_are_known(kind, io_type, tmp_path, monkeypatch):
    """hls4ml files results among them, by the layers' names."""
    found = set()
    written = project._write

    def spy(graph, made):
        found.update(key for node in graph.graph.values() for key in node.attributes if key not in graph.graph)
        written(graph, made)

    monkeypatch.setattr(project, "_write", spy)
    try:
        HlsProject.create(network(kind), tmp_path / "hls", io_type=io_type)
    except InvalidInput as refused:
        assert io_type == "io_stream" and "op 'op'" in str(refused)
        return
    found -= {name for name in found if re.fullmatch(r"\w+_cpy\d", name)}  # a stream's copies
    assert found
    assert found <= ATTRIBUTES


def test_what_is_not_installed_and_what_qkeras_cannot_have_is_left_out_with_a_line(tmp_path, monkeypatch):
    sign = Fixed(signed=True, width=1, frac=0)
    network(Quantize, format=sign).save(tmp_path / "qnet")
    if QKERAS.missing() is None:
        _, left_out = convert_folder(tmp_path / "qnet", tmp_path / "refused", Hardware(estimate="none"))
        assert left_out == {
            "qkeras": "no QKeras model: op 'op': QKeras has no signed format of one bit: "
            "use two bits or an unsigned one"
        }
        assert {path.name for path in (tmp_path / "refused").iterdir()} == {"hls", "qonnx"}
    absent = replace(QKERAS, missing=lambda: "QKeras is not installed: pip install it")
    monkeypatch.setattr(backends, "BACKENDS", tuple(absent if b is QKERAS else b for b in BACKENDS))
    _, left_out = convert_folder(tmp_path / "qnet", tmp_path / "absent", Hardware(estimate="none"))
    assert left_out == {"qkeras": "QKeras is not installed: pip install it"}
    assert {path.name for path in (tmp_path / "absent").iterdir()} == {"hls", "qonnx"}
