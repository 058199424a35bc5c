import json
import re
import subprocess
import sys
from zipfile import ZipFile

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.qkeras import versions
from hmq_fpga.deploy.qkeras.config import hls4ml_config
from hmq_fpga.deploy.qkeras.model import QKerasSimulator, export, float_type, layer_name, load, save, to_qkeras
from hmq_fpga.deploy.qkeras.versions import import_keras, quantizer_attribute
from hmq_fpga.deploy.toolchain import ToolMissing
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Concat, Dense, Flatten, Gather, Input, Quantize, Scale, Table
from tests import outside
from tests.strategies import inputs, qnets

pytestmark = outside.needs_qkeras

LOAD = """
import sys
import keras
import numpy as np
from qkeras.utils import _add_supported_quantized_objects

objects = {}
_add_supported_quantized_objects(objects)
assert "hmq_fpga" not in sys.modules
if keras.__version__ >= "3":
    import hmq_fpga.deploy.qkeras.small
for folder in sys.argv[1:]:
    model = keras.models.load_model(folder + "/model.keras", custom_objects=objects)
    np.save(folder + "/y.npy", model(np.load(folder + "/x.npy")))
"""


@given(qnets())
@settings(max_examples=25)
def test_equals_the_reference_in_every_tensor(net):
    x = inputs(net, 20, seed=0).astype(np.float32)
    expected, actual = reference.trace(net, x), QKerasSimulator(net).trace(x)
    for op in net.ops:
        assert_array_equal(actual[op.name], expected[op.name], err_msg=op.name)


@pytest.mark.parametrize("fixture", ["mlp", "cnn"])
def test_far_beyond_the_range_saturates(fixture, samples, request):
    net = request.getfixturevalue(fixture)
    x = 1e7 * samples(net)
    assert_array_equal(QKerasSimulator(net).predict(x), reference.run(net, x))


@pytest.mark.parametrize("fixture", ["mlp", "cnn"])
def test_the_learned_numbers_are_in_the_configuration(fixture, request):
    net = request.getfixturevalue(fixture)
    model = to_qkeras(net)
    for op in net.ops:
        layer = model.get_layer(layer_name(op))
        if isinstance(op, Input | Quantize):
            format_, quantizer = op.format, getattr(layer, quantizer_attribute())
        elif op in net.linears:
            format_, quantizer = op.weight_format, layer.kernel_quantizer
            assert_array_equal(format_.encode(quantizer(layer.kernel)), op.weight)
        else:
            continue
        config = quantizer.get_config()
        assert (config["bits"], config["integer"]) == (format_.width, format_.threshold_log2)
        assert config.get("keep_negative", 0) == format_.signed
        assert config.get("alpha", 1) == 1
        relu = isinstance(op, Quantize) and not op.format.signed and net.formats[op.source].signed
        assert type(quantizer).__name__ == ("quantized_relu" if relu else "quantized_bits")


def test_paddings_by_their_keras_names(cnn):
    model = to_qkeras(cnn)
    assert [model.get_layer(op.name).padding for op in cnn.linears[:-1]] == ["same", "valid", "valid", "valid"]
    assert model.get_layer("uneven_padding").padding == ((1, 0), (2, 1))


@pytest.fixture(scope="module")
def scaled() -> QNet:
    """So many channels that TensorFlow takes them eight at a time; biases too small for rounding to hide an error."""
    rng = np.random.default_rng(0)
    six, four = Fixed(signed=True, width=6, frac=3), Fixed(signed=True, width=4, frac=2)
    weight, bias = rng.integers(-8, 8, 20), rng.integers(-3, 3, 20)
    ops = (
        Input(name="x", shape=(20,), format=six),
        Scale(name="scale", source="x", weight=weight, weight_format=four, bias=bias),
    )
    return QNet(ops)


def test_a_scale_of_many_channels_is_exact(scaled, samples):
    x = samples(scaled)
    assert_array_equal(QKerasSimulator(scaled).predict(x), reference.run(scaled, x))


@pytest.fixture(scope="module")
def wide() -> QNet:
    return _wide(40)


@pytest.fixture(scope="module")
def moved() -> QNet:
    """Layers of this package's own: a table whose values only float64 holds, and values moved around a filling."""
    three, fine = Fixed(signed=True, width=3, frac=1), Fixed(signed=True, width=30, frac=4)
    values = np.array([-(2**29), -3, 7, 2**29 - 1, 1, 0, -1, 2**28 + 1])
    ops = (
        Input(name="x", shape=(2, 3), format=three),
        Table(name="table", source="x", values=values, format=fine),
        Gather(name="gather", source="table", index=np.array([[5, -1], [0, 5]]), fill=2**29 - 3),
    )
    return QNet(ops)


def test_saved_models_predict_the_same_in_a_fresh_process(mlp, wide, moved, samples, tmp_path):
    nets = {tmp_path / "float32": mlp, tmp_path / "float64": wide, tmp_path / "moved": moved}
    for folder, net in nets.items():
        export(net, folder)
        np.save(folder / "x.npy", samples(net))
    (tmp_path / "load.py").write_text(LOAD)
    subprocess.run(
        [sys.executable, "load.py", *(folder.name for folder in nets)], check=True, cwd=tmp_path, capture_output=True
    )
    for folder, net in nets.items():
        expected = reference.run(net, samples(net))
        assert_array_equal(np.load(folder / "y.npy"), net.decode(expected))
        assert_array_equal(QKerasSimulator.load(net, folder).predict(samples(net)), expected)
        assert_array_equal(np.asarray(load(folder / "model.keras")(samples(net))), net.decode(expected))


def test_a_model_of_another_network_is_refused(mlp, cnn, tmp_path):
    export(mlp, tmp_path)
    with pytest.raises(InvalidInput, match=r"model\.keras: not of this network, it has no such tensor as 'input'"):
        QKerasSimulator.load(cnn, tmp_path)


def test_files_that_are_no_models_of_this_keras_are_refused(mlp, tmp_path):
    path = tmp_path / "model.keras"
    with pytest.raises(InvalidInput, match=r"model\.keras: not a Keras model: .*No such file"):
        load(path)
    export(mlp, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InvalidInput, match="not a Keras model: File is not a zip file"):
        load(path)
    with ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "1.2.3"}')
    with pytest.raises(InvalidInput, match=r"of Keras 1\.2\.3, which Keras .* cannot read: export it again"):
        load(path)
    with ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": import_keras().__version__}))
    with pytest.raises(InvalidInput, match="not a model of QKeras"):
        load(path)


def test_without_qkeras_one_line_says_how_to_get_it(mlp, samples, tmp_path, monkeypatch):
    assert versions.missing() is None
    monkeypatch.setattr(versions, "find_spec", lambda name: None if name == "qkeras" else object())
    line = "QKeras is not installed, .* are left out: pip install 'hmq-fpga\\[qkeras\\]'"
    assert re.fullmatch(line, versions.missing())
    uses = (lambda: to_qkeras(mlp), lambda: load(tmp_path / "model.keras"), lambda: export(mlp, tmp_path / "new"))
    for use in (
        *uses,
        lambda: save(None, tmp_path / "model.keras"),
        lambda: QKerasSimulator(mlp).predict(samples(mlp)),
    ):
        with pytest.raises(ToolMissing, match=line):
            use()
    assert not any(tmp_path.iterdir())


def test_several_inputs_are_a_list(tmp_path):
    byte, three = Fixed(signed=True, width=8, frac=4), Fixed(signed=False, width=3, frac=-1)
    weight = {"weight": np.arange(14).reshape(7, 2) - 7, "weight_format": Fixed(signed=True, width=4, frac=0)}
    net = QNet(
        (
            Input(name="image", shape=(2, 1, 2), format=byte),
            Input(name="extra", shape=(3,), format=three),
            Flatten(name="flat", source="image"),
            Concat(name="all", sources=("extra", "flat")),
            Dense(name="fc", source="all", **weight, bias=np.array([1, -1])),
        )
    )
    x = np.random.default_rng(0).normal(scale=9, size=(50, 7)).astype(np.float32)
    x[0] = 1e7
    export(net, tmp_path)
    expected = reference.trace(net, x)
    for simulator in (QKerasSimulator(net), QKerasSimulator.load(net, tmp_path)):
        actual = simulator.trace(x)
        for op in net.ops:
            assert_array_equal(actual[op.name], expected[op.name], err_msg=op.name)
    parts = net.split_inputs(x[1:])
    assert_array_equal(np.asarray(to_qkeras(net)([*parts.values()])), net.decode(expected["fc"])[1:])
    assert not (tmp_path / "hls4ml_config.json").exists()
    with pytest.raises(InvalidInput, match="has 2 inputs, and only one"):
        hls4ml_config(net)


def test_hls4mls_own_conversion_is_not_offered_for_what_it_may_compute_otherwise(moved):
    with pytest.raises(InvalidInput, match="op 'table': hls4ml's Keras conversion is not known to keep a Table"):
        hls4ml_config(moved)


def _wide(bits: int) -> QNet:
    """Sums of about `bits` bits, and a quantizer that shows their last one."""
    half = Fixed(signed=True, width=bits // 2, frac=0)
    weight = np.array([[half.hi, half.lo], [half.hi - 1, half.lo]])
    bias, two = np.array([1, -1]), Fixed(signed=True, width=2, frac=0)
    return QNet(
        (
            Input(name="x", shape=(2,), format=Fixed(signed=True, width=bits - bits // 2, frac=0)),
            Dense(name="fc", source="x", weight=weight, weight_format=half, bias=bias),
            Quantize(name="relu", source="fc", format=Fixed(signed=False, width=bits, frac=0)),
            Dense(name="out", source="relu", weight=np.eye(2, dtype=int), weight_format=two, bias=bias),
        )
    )


def test_the_model_also_runs_and_trains_as_a_graph(mlp, samples):
    model, x = to_qkeras(mlp), samples(mlp)
    expected = mlp.decode(reference.run(mlp, x))
    assert_array_equal(model.predict(x, verbose=0), expected)
    model.compile("sgd", "mse")
    model.fit(x, expected + 1, verbose=0)


def test_sums_beyond_float32_are_float64(wide):
    net = wide
    assert float_type(_wide(20)) == "float32"
    assert float_type(net) == "float64"
    x = np.random.default_rng(0).integers(-(2**19), 2**19, (200, 2)).astype(np.float32)
    assert_array_equal(np.asarray(to_qkeras(net)(x)), net.decode(reference.run(net, x)))
    assert import_keras().backend.floatx() == "float32"


def test_sums_beyond_float64_are_refused():
    with pytest.raises(InvalidInput, match=r"op '\w+': its sums need 5\d bits"):
        to_qkeras(_wide(56))


def test_floatx_is_restored_after_an_error():
    net = QNet(
        (
            Input(name="x", shape=(1,), format=Fixed(signed=True, width=30, frac=0)),
            Quantize(name="sign", source="x", format=Fixed(signed=True, width=1, frac=0)),
        )
    )
    with pytest.raises(InvalidInput, match="op 'sign': QKeras has no signed format of one bit"):
        to_qkeras(net)
    assert import_keras().backend.floatx() == "float32"


def test_a_bias_of_one_signed_bit_is_kept():
    format_ = Fixed(signed=False, width=1, frac=0)
    weight, bias = np.ones((1, 2), dtype=int), np.array([0, -1])
    net = QNet(
        (
            Input(name="x", shape=(1,), format=Fixed(signed=False, width=2, frac=0)),
            Dense(name="fc", source="x", weight=weight, weight_format=format_, bias=bias),
        )
    )
    x = np.arange(4, dtype=np.float32)[:, None]
    assert_array_equal(QKerasSimulator(net).predict(x), np.concatenate([x, x - 1], axis=1))
