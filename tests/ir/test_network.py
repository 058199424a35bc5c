import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet, _digest
from hmq_fpga.ir.ops import OPS as OP_TYPES
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
    MaxPool,
    Multiply,
    Op,
    Pad,
    Quantize,
    Scale,
    Table,
    Upsample,
)
from tests.strategies import EITHER, SEEDS, inputs, qnets

BYTE = Fixed(signed=False, width=8, frac=8)
WEIGHT = Fixed(signed=True, width=3, frac=2)


def image(**changes: Any) -> Input:
    return replace(Input(name="x", shape=(6, 5, 2), format=BYTE), **changes)


def conv(**changes: Any) -> Conv:
    op = Conv(
        name="conv",
        source="x",
        weight=np.arange(-4, 4).repeat(6).reshape(3, 2, 2, 4),
        weight_format=WEIGHT,
        bias=np.array([3, 0, -700, 1]),
        stride=(1, 2),
        padding=((0, 1), (2, 0)),
    )
    return replace(op, **changes)


def relu(**changes: Any) -> Quantize:
    return replace(Quantize(name="relu", source="conv", format=BYTE), **changes)


def pool(**changes: Any) -> MaxPool:
    return replace(MaxPool(name="pool", source="relu", window=(2, 2), stride=(2, 1)), **changes)


def flat(**changes: Any) -> Flatten:
    return replace(Flatten(name="flat", source="pool"), **changes)


def fc(**changes: Any) -> Dense:
    op = Dense(
        name="fc",
        source="flat",
        weight=np.arange(16 * 3).reshape(16, 3) % 8 - 4,
        weight_format=WEIGHT,
        bias=np.array([0, 5, -5]),
    )
    return replace(op, **changes)


WINDOW: dict[str, Any] = {
    "weight_format": WEIGHT,
    "bias": np.zeros(4, np.int64),
    "stride": (1, 1),
    "padding": ((0, 0), (0, 0)),
}
OPS: tuple[Op, ...] = (image(), conv(), relu(), pool(), flat(), fc())


def changed(i: int, **changes: Any) -> tuple[Op, ...]:
    """The network with one op changed."""
    return (*OPS[:i], replace(OPS[i], **changes), *OPS[i + 1 :])


def test_shapes_and_formats_of_every_tensor() -> None:
    net = QNet(OPS)
    assert dict(net.shapes) == {
        "x": (6, 5, 2),
        "conv": (5, 3, 4),
        "relu": (5, 3, 4),
        "pool": (2, 2, 4),
        "flat": (16,),
        "fc": (3,),
    }
    assert net.formats["flat"] == net.formats["pool"] == net.formats["relu"] == BYTE
    assert net["conv"] is OPS[1]
    assert (net.inputs, net.outputs, net.linears) == ((OPS[0],), ("fc",), (OPS[1], OPS[-1]))
    assert net.output_format == net.formats["fc"]
    with pytest.raises(KeyError, match="conv7"):
        net["conv7"]


def test_accumulator_is_the_narrowest_that_is_exact() -> None:
    op = Dense(name="fc", source="x", weight=np.array([[3], [-4]]), weight_format=WEIGHT, bias=np.array([10]))
    net = QNet((Input(name="x", shape=(2,), format=Fixed(signed=False, width=4, frac=1)), op))
    lo, hi = -4 * 15 + 10, 3 * 15 + 10
    assert net.formats["fc"] == Fixed.enclosing(lo, hi, 1 + 2) == Fixed(signed=True, width=7, frac=3)
    assert net.bias_format(op) == Fixed(signed=False, width=4, frac=3)
    assert net.partial_sum_bits(op) == (7 * 15 + 10).bit_length()
    extremes = reference.run(net, np.array([[7.5, 0], [0, 7.5]]))
    assert_array_equal(extremes, [[hi], [lo]])


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ((), "starts with its Input"),
        (OPS[1:], "starts with its Input"),
        ((*OPS[:2], image(name="y"), *OPS[2:]), "op 'y': must read earlier ops"),
        (changed(2, name="re lu"), "op 're lu': a name is"),
        (changed(2, name="1st"), "op '1st': a name is"),
        (changed(2, name="conv"), "op 'conv': the name is taken"),
        (changed(2, source="fc"), "op 'relu': must read earlier ops' tensors, not .*fc"),
        (changed(3, source="conv"), "op 'relu': nothing reads its tensor"),
        (changed(0, shape=(6, 5, 2, 2)), "op 'x': input shape"),
        (changed(0, shape=(6, 0, 2)), "op 'x': input shape"),
        (changed(0, shape=(6, 5, 3)), "op 'conv': reads .* takes 2"),
        (changed(1, weight=conv().weight + 1), "op 'conv': a weight code is outside"),
        (changed(1, weight=conv().weight.astype(np.int32)), "op 'conv': .* int64"),
        (changed(1, weight=conv().weight * 0.5), "op 'conv': .* int64"),
        (changed(1, bias=np.zeros(4)), "op 'conv': .* int64"),
        (changed(1, bias=np.zeros(3, np.int64)), "op 'conv': weight .* and bias .* do not fit"),
        (changed(1, weight=conv().weight[0]), "op 'conv': stride .* does not fit"),
        (changed(1, weight=conv().weight[0, 0]), "op 'conv': weight .* and bias .* do not fit"),
        (changed(1, weight=conv().weight[:0]), "op 'conv': weight .* and bias .* do not fit"),
        (changed(1, bias=np.array([0, 0, 2**62, 0])), "op 'conv': a bias code"),
        (changed(1, bias=np.array([0, 0, -(2**63), 0])), "op 'conv': a bias code"),
        (changed(1, stride=(0, 1)), "op 'conv': stride"),
        (changed(1, padding=((0, 0), (0, -1))), "op 'conv': padding"),
        (changed(1, padding=((0, 0), (0, 0)), weight=np.zeros((7, 1, 2, 4), np.int64)), "op 'conv': its window"),
        (changed(3, window=(0, 1)), "op 'pool': window"),
        (changed(3, stride=(1, 0)), "op 'pool': stride"),
        (changed(3, window=(6, 1)), "op 'pool': its window"),
        ((*OPS[:4], fc(source="pool")), "op 'fc': reads .* takes 16"),
        ((*OPS[:5], pool(name="again", source="flat")), "op 'again': reads .* but works on 2 dimensions"),
        ((*OPS[:5], conv(name="again", source="flat")), "op 'again': reads"),
        (changed(5, weight_format=Fixed(signed=True, width=50, frac=0)), "op 'fc': its sums .* may exceed"),
        (changed(5, weight_format=Fixed(signed=True, width=3, frac=250)), "op 'fc': step"),
    ],
)
def test_what_is_wrong_is_named(ops: tuple[Op, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        QNet(ops)


def after_relu(op: type[Op], **values: Any) -> tuple[Op, ...]:
    sources = {} if "sources" in values else {"source": "relu"}
    return (*OPS[:3], op(name="new", **sources, **values))


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (after_relu(AvgPool, window=(3, 1), stride=(1, 1)), "mean over .* powers of two"),
        (after_relu(AvgPool, window=(2,), stride=(1,)), "works on 1 dimensions"),
        (after_relu(LeakyRelu, shift=-1), r"slope 2\*\*-?"),
        (after_relu(LeakyRelu, shift=17), "slope"),
        (after_relu(Pad, padding=((1, 0),)), "works on 1 dimensions"),
        (after_relu(Pad, padding=((1, 0), (0, -1))), "padding .* out of range"),
        (after_relu(Upsample, factor=(2, 0)), "factor"),
        (after_relu(Upsample, factor=(2, 2, 2)), "factor"),
        (after_relu(Add, sources=("relu",)), "merges two tensors, not"),
        (after_relu(Multiply, sources=("relu",) * 3), "merges two tensors, not"),
        (after_relu(Add, sources=("relu", "fc")), "must read earlier"),
        (after_relu(Add, sources=("x", "relu")), "cannot merge"),
        (after_relu(Concat, sources=("x", "relu")), "cannot merge"),
        (after_relu(Multiply, sources=("x", "relu")), "cannot merge"),
        (after_relu(Table, values=np.arange(256.0), format=BYTE), "values are int64"),
        (after_relu(Table, values=np.arange(100), format=BYTE), "a power of two of them"),
        (after_relu(Table, values=np.array(1), format=BYTE), "in one dimension"),
        (after_relu(Table, values=np.arange(64), format=BYTE), "a table of 64 values is read by ap_ufixed<8,0"),
        (after_relu(Table, values=np.arange(256), format=WEIGHT), "a value of the table is outside"),
        (after_relu(Table, values=np.zeros(1 << 13, np.int64), format=BYTE), "exceeds 12 bits"),
        (after_relu(Gather, index=np.array([60])), "reads value 60 of"),
        (after_relu(Gather, index=np.array([-2, 0])), "-1 or more"),
        (after_relu(Gather, index=np.zeros((2, 0), np.int64)), "at least one value"),
        (after_relu(Gather, index=np.array([0.0])), "index is int64"),
        (after_relu(Gather, index=np.array(0)), "at least one value"),
        (after_relu(Gather, index=np.array([0]), fill=256), "its fill 256 is outside"),
        (after_relu(Conv, **WINDOW, weight=np.ones((1, 1, 2, 4), np.int64), groups=3), "4 outputs are not 3 groups"),
        (after_relu(Conv, **WINDOW, weight=np.ones((1, 1, 2, 4), np.int64), groups=4), "takes 8"),
        (after_relu(Conv, **WINDOW, weight=np.ones((1, 1, 2, 4), np.int64), groups=0), "are not 0 groups"),
        (after_relu(Conv, **WINDOW, weight=np.ones((2, 2, 4, 4), np.int64), dilation=(2,)), "dilation"),
        (after_relu(Conv, **WINDOW, weight=np.ones((2, 2, 4, 4), np.int64), dilation=(1, 0)), "dilation"),
        (after_relu(Conv, **WINDOW, weight=np.ones((2, 2, 4, 4), np.int64), dilation=(10**9, 1)), "its window"),
        (
            after_relu(Scale, weight=np.ones(3, np.int64), weight_format=WEIGHT, bias=np.zeros(3, np.int64)),
            "takes 3",
        ),
        (
            after_relu(
                DepthwiseConv,
                weight=np.ones((2, 2, 3), np.int64),
                weight_format=WEIGHT,
                bias=np.zeros(3, np.int64),
                stride=(1, 1),
                padding=((0, 0), (0, 0)),
            ),
            "takes 3",
        ),
    ],
)
def test_what_is_wrong_with_further_ops_is_named(ops: tuple[Op, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"op 'new': .*{message}"):
        QNet(ops)


def test_outputs_are_what_nothing_else_reads() -> None:
    ops = after_relu(Quantize, format=relu().format)
    with pytest.raises(InvalidInput, match="op 'new': reads 'relu', which is an output"):
        QNet(ops, ("relu", "new"))
    for outputs in (("new", "new"), ("new", "nobody")):
        with pytest.raises(InvalidInput, match="must name different tensors of the network"):
            QNet(ops, outputs)
    with pytest.raises(InvalidInput, match="op 'new': nothing reads its tensor"):
        QNet((*OPS[:3], Flatten(name="new", source="conv"), pool(), flat(), fc()))


def two_inputs() -> QNet:
    """Two inputs of different grids and shapes, and two outputs."""
    fine, coarse = Fixed(signed=True, width=5, frac=3), Fixed(signed=False, width=3, frac=0)
    return QNet(
        (
            Input(name="image", shape=(2, 2, 2), format=fine),
            Input(name="extra", shape=(3,), format=coarse),
            Flatten(name="flat", source="image"),
            Concat(name="all", sources=("flat", "extra")),
            Dense(
                name="fc",
                source="all",
                weight=np.arange(22).reshape(11, 2) % 7 - 3,
                weight_format=Fixed(signed=True, width=3, frac=1),
                bias=np.array([1, -1]),
            ),
            Quantize(name="side", source="extra", format=Fixed(signed=False, width=2, frac=0)),
        ),
        ("fc", "side"),
    )


def test_several_inputs_and_outputs_are_one_array_to_the_user(tmp_path: Path) -> None:
    net = two_inputs()
    assert (net.input_shape, net.output_shape) == ((11,), (5,))
    x = np.random.default_rng(0).normal(scale=3, size=(20, 11))
    parts = net.split_inputs(x)
    assert {name: part.shape for name, part in parts.items()} == {"image": (20, 2, 2, 2), "extra": (20, 3)}
    traced = reference.trace(net, x)
    image, extra = (net.formats[name].encode(parts[name]).reshape(20, -1) for name in ("image", "extra"))
    fc = net["fc"]
    assert isinstance(fc, Dense)
    assert_array_equal(traced["fc"], np.concatenate([image, extra << 3], 1) @ fc.weight + fc.bias)
    joined = reference.run(net, x)
    assert_array_equal(net.decode(joined)[:, 2:], net.formats["side"].decode(traced["side"]))
    assert_array_equal(net.decode(joined)[:, :2], net.formats["fc"].decode(traced["fc"]))
    net.save(tmp_path / "qnet")
    loaded = QNet.load(tmp_path / "qnet")
    assert (loaded.digest, loaded.outputs) == (net.digest, net.outputs)
    with pytest.raises(InvalidInput, match="has 2 inputs, and only one is supported here"):
        _ = net.input


def test_the_order_of_outputs_changes_the_digest() -> None:
    net = two_inputs()
    assert QNet(net.ops, ("side", "fc")).digest != net.digest


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup(Quantize):
    """An op with an array of its own that is no weight."""

    table: Codes


def test_every_array_of_every_op_is_saved_and_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OP_TYPES, "Lookup", Lookup)
    nets = [
        QNet((*OPS[:2], Lookup(name="new", source="conv", format=BYTE, table=np.array([1, last])))) for last in (2, 3)
    ]
    assert nets[0].digest != nets[1].digest
    nets[1].save(tmp_path / "qnet")
    loaded = QNet.load(tmp_path / "qnet")
    assert_array_equal(loaded["new"].table, [1, 3])  # type: ignore[union-attr]
    assert loaded.digest == nets[1].digest


def version_2(net: QNet) -> tuple[dict[str, Any], dict[str, Any]]:
    """A network as format version 2 described it: several outputs were a last op."""
    description, arrays = net._description(), net._arrays()
    del description["outputs"]
    if len(net.outputs) > 1:
        description["ops"].append({"op": "Outputs", "name": "outputs", "sources": list(net.outputs)})
    return {**description, "format_version": 2}, arrays


@settings(max_examples=20)
@given(qnets())
def test_version_2_is_read(net: QNet) -> None:
    description, arrays = version_2(net)
    digest = _digest(description, arrays)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "network.json").write_text(json.dumps({"digest": digest, **description}))
        np.savez(folder / "weights.npz", **arrays)
        assert QNet.load(folder).digest == net.digest
        (folder / "network.json").write_text(json.dumps({"digest": digest[::-1], **description}))
        with pytest.raises(InvalidInput, match="digest differs"):
            QNet.load(folder)


def test_version_3_is_read(tmp_path: Path) -> None:
    """It had neither groups nor dilation."""
    net = QNet(OPS)
    description, arrays = {**net._description(), "format_version": 3}, net._arrays()
    for entry in description["ops"]:
        entry.pop("groups", None)
        entry.pop("dilation", None)
    digest = _digest(description, arrays)
    (tmp_path / "network.json").write_text(json.dumps({"digest": digest, **description}))
    np.savez(tmp_path / "weights.npz", **arrays)
    assert QNet.load(tmp_path).digest == net.digest


def test_products_beyond_int64_are_refused() -> None:
    wide = Quantize(name="wide", source="conv", format=Fixed(signed=True, width=32, frac=0))
    with pytest.raises(InvalidInput, match=r"op 'square': products of .* exceed 62 bits"):
        QNet((*OPS[:2], wide, Multiply(name="square", sources=("wide", "wide"))))


def test_grids_too_far_apart_are_not_merged() -> None:
    coarse = relu(format=Fixed(signed=False, width=40, frac=-10))
    fine = Quantize(name="fine", source="conv", format=Fixed(signed=False, width=40, frac=20))
    with pytest.raises(InvalidInput, match="on one grid exceed"):
        QNet((*OPS[:2], coarse, fine, Add(name="sum", sources=("relu", "fine"))))


@settings(max_examples=50)
@given(qnets(), SEEDS)
def test_save_and_load(net: QNet, seed: int) -> None:
    with TemporaryDirectory() as folder:
        net.save(Path(folder) / "qnet")
        loaded = QNet.load(Path(folder) / "qnet")
    assert loaded.digest == net.digest
    assert loaded.shapes == net.shapes
    assert loaded.formats == net.formats
    x = inputs(net, 3, seed)
    assert_array_equal(reference.run(loaded, x), reference.run(net, x))


def test_saving_again_replaces_and_is_reproducible(tmp_path: Path) -> None:
    QNet(OPS[:3]).save(tmp_path / "qnet")
    QNet(OPS).save(tmp_path / "qnet")
    QNet(OPS).save(tmp_path / "deeper" / "again")
    assert QNet.load(tmp_path / "qnet").digest == QNet(OPS).digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deeper", "qnet"]
    for name in ("network.json", "weights.npz"):
        assert (tmp_path / "qnet" / name).read_bytes() == (tmp_path / "deeper" / "again" / name).read_bytes()


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidInput, match=r"thesis\.tex"):
        QNet(OPS).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@given(qnets(), st.data())
def test_digest_changes_with_any_weight(net: QNet, data: st.DataObject) -> None:
    i = data.draw(st.sampled_from([i for i, op in enumerate(net.ops) if isinstance(op, Linear)]))
    op = net.ops[i]
    field = data.draw(st.sampled_from(["weight", "bias"]))
    codes = getattr(op, field).copy()
    at = data.draw(st.integers(0, codes.size - 1))
    codes.flat[at] = codes.flat[at] - 1 if codes.flat[at] > 0 else codes.flat[at] + 1
    ops = (*net.ops[:i], replace(op, **{field: codes}), *net.ops[i + 1 :])
    assert QNet(ops, net.outputs).digest != net.digest
    assert QNet(net.ops, net.outputs).digest == net.digest


@given(qnets(), EITHER, st.data())
def test_digest_changes_with_any_format(net: QNet, wider: bool, data: st.DataObject) -> None:
    i = data.draw(st.sampled_from([i for i, op in enumerate(net.ops) if isinstance(op, Input | Quantize | Linear)]))
    op = net.ops[i]
    field = "weight_format" if isinstance(op, Linear) else "format"
    old = getattr(op, field)
    new = replace(old, width=old.width + 1) if wider else replace(old, frac=old.frac + 1)
    ops = (*net.ops[:i], replace(op, **{field: new}), *net.ops[i + 1 :])
    try:
        assert QNet(ops, net.outputs).digest != net.digest
    except InvalidInput as error:
        assert wider and "is read by" in str(error)


@pytest.mark.parametrize(
    "ops",
    [
        changed(1, padding=((1, 0), (2, 0))),
        changed(1, padding=((0, 1), (1, 1))),
        changed(3, window=(3, 2)),
        changed(5, name="logits"),
    ],
)
def test_digest_changes_with_the_geometry(ops: tuple[Op, ...]) -> None:
    assert QNet(OPS).digest != QNet(ops).digest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    QNet(OPS).save(tmp_path / "qnet")
    return tmp_path / "qnet"


def edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A change of `network.json`."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / "network.json").read_text())
        change(data)
        (folder / "network.json").write_text(json.dumps(data))

    return apply


def change_weight(folder: Path) -> None:
    with np.load(folder / "weights.npz") as archive:
        arrays = dict(archive)
    arrays["fc.weight"][0, 0] += 1
    np.savez(folder / "weights.npz", **arrays)


def drop_weight(folder: Path) -> None:
    with np.load(folder / "weights.npz") as archive:
        np.savez(folder / "weights.npz", **{name: archive[name] for name in archive.files if name != "fc.bias"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights.npz").unlink(),
        lambda folder: (folder / "network.json").unlink(),
        lambda folder: (folder / "network.json").write_text("{"),
        lambda folder: (folder / "network.json").write_text("[]"),
        lambda folder: (folder / "network.json").write_bytes(b"\xff"),
        change_weight,
        drop_weight,
        edit(lambda data: data.update(format_version=1)),
        edit(lambda data: data.update(digest="0" * 64)),
        edit(lambda data: data.pop("ops")),
        edit(lambda data: data.update(ops=[])),
        edit(lambda data: data["ops"][3].update(op="MedianPool")),
        edit(lambda data: data["ops"][3].update(window=[2, 2, 2])),
        edit(lambda data: data["ops"][3].update(window=2)),
        edit(lambda data: data["ops"][3].update(stride=[2, 2])),
        edit(lambda data: data["ops"][2]["format"].update(frac=7)),
        edit(lambda data: data["ops"][2].pop("format")),
    ],
)
def test_damaged_files_are_named(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(InvalidInput, match="qnet"):
        QNet.load(saved)


def test_truncated_weights_are_named(saved: Path) -> None:
    whole = (saved / "weights.npz").read_bytes()
    for length in range(0, len(whole), 97):
        (saved / "weights.npz").write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match="qnet"):
            QNet.load(saved)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_run(saved: Path) -> None:
    with np.load(saved / "weights.npz") as archive:
        arrays = dict(archive)
    np.savez(saved / "weights.npz", **{**arrays, "fc.weight": np.array([Trap(saved / "run")])})
    with pytest.raises(InvalidInput, match="qnet"):
        QNet.load(saved)
    assert not (saved / "run").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.data())
def test_no_change_of_the_json_goes_unnoticed(data: st.DataObject) -> None:
    """Any value anywhere in it replaced by any other: refused, or the same network."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "qnet"
        QNet(OPS).save(folder)
        content = json.loads((folder / "network.json").read_text())
        node = content
        while True:
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(EITHER):
                break
            node = node[key]
        node[key] = data.draw(JSON)
        (folder / "network.json").write_text(json.dumps(content))
        try:
            assert QNet.load(folder).digest == QNet(OPS).digest
        except InvalidInput as error:
            assert "qnet" in str(error)


@settings(max_examples=300)
@given(st.data())
def test_no_flipped_bit_in_the_weights_goes_unnoticed(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name) / "qnet"
        QNet(OPS).save(folder)
        content = bytearray((folder / "weights.npz").read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (folder / "weights.npz").write_bytes(content)
        try:
            assert QNet.load(folder).digest == QNet(OPS).digest
        except InvalidInput as error:
            assert "qnet" in str(error)
