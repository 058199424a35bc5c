"""Models that were written and trained in QKeras, read as networks: what they predict is what the integers say."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.convert import convert_folder
from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.qkeras.model import save, to_qkeras
from hmq_fpga.deploy.qkeras.reader import from_qkeras
from hmq_fpga.deploy.qkeras.versions import floatx, import_keras, plain_batch_norm, quiet
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Dense, Quantize, Table
from tests import outside
from tests.deploy.test_every_op import NETWORKS

pytestmark = outside.needs_qkeras
JET = {"fc_in": Fixed(signed=True, width=10, frac=6)}


@pytest.fixture(scope="module")
def keras():
    made = import_keras()
    made.utils.set_random_seed(3)
    return made


def bits(width: int, integer: int = 0, **more):
    import qkeras

    return qkeras.quantized_bits(width, integer, alpha=1, **more)


def samples(net: QNet, count: int = 300) -> np.ndarray:
    """Anywhere in the input's range, half-way between two codes, and its ends."""
    format_, rng = net.input.format, np.random.default_rng(0)
    halves = rng.integers(2 * format_.lo - 1, 2 * format_.hi + 2, (count, *net.input.shape)) * format_.step / 2
    halves[0], halves[1] = format_.lo * format_.step, format_.hi * format_.step
    return halves.astype(np.float32)


def predicted_alike(model, net: QNet, x: np.ndarray, different: int = 150) -> None:
    expected = net.decode(reference.run(net, x))
    assert len(np.unique(expected, axis=0)) >= different, "the network should tell its inputs apart"
    assert_array_equal(np.asarray(model(x), np.float64).reshape(expected.shape), expected)


def jet_tagging(keras):
    """The first model of hls4ml's tutorial with QKeras: 16 features, dense layers, quantized ReLUs, a softmax."""
    import qkeras

    kernel = {"kernel_quantizer": bits(6), "bias_quantizer": bits(6)}
    model = keras.Sequential()
    model.add(keras.layers.Input((16,), name="fc_in"))
    for number, units in enumerate((24, 16, 16), 1):
        model.add(qkeras.QDense(units, name=f"fc{number}", **kernel, bias_initializer="he_uniform"))
        model.add(qkeras.QActivation(qkeras.quantized_relu(6), name=f"relu{number}"))
    model.add(qkeras.QDense(5, name="output", **kernel, bias_initializer="he_uniform"))
    model.add(keras.layers.Activation("softmax", name="softmax"))
    return model


def image_model(keras):
    """Layers of images and sequences, of many kinds."""
    import qkeras

    layers = keras.layers
    x = inputs = keras.Input((9, 8, 2), name="image")
    x = qkeras.QActivation("quantized_bits(7,2,0,1,1)", name="scaled")(x)
    own = {"kernel_quantizer": bits(4), "bias_quantizer": bits(5), "bias_initializer": "he_uniform"}
    x = qkeras.QConv2D(
        4, (3, 2), padding="same", strides=2, name="conv-1", activation=qkeras.quantized_relu(5, 1), **own
    )(x)
    y = qkeras.QDepthwiseConv2D(
        3, padding="same", dilation_rate=2, depthwise_quantizer=bits(4, 1), bias_quantizer=bits(3, 1), name="depth"
    )(x)
    y = qkeras.QActivation("quantized_bits(5,2,1,1,1)", name="even")(y)
    x = layers.Add(name="sum")([x, y, x])
    x = layers.MaxPooling2D(2, name="pool")(qkeras.QActivation("quantized_relu(6,2)", name="positive")(x))
    x = qkeras.QConv2D(3, 1, name="mixed", use_bias=False, kernel_quantizer=qkeras.ternary(alpha=1))(x)
    x = layers.Dropout(0.5, name="drop")(layers.ReLU(name="plain")(x))
    x = layers.Permute((2, 1, 3), name="turned")(layers.AveragePooling2D((2, 1), name="mean")(x))
    x = layers.Reshape((2, 3), name="line")(layers.Maximum(name="larger")([x, layers.Permute((1, 2, 3))(x)]))
    x = qkeras.QActivation("quantized_bits(8,4,0,1,1)", name="last")(layers.ZeroPadding1D((1, 0), name="pad")(x))
    x = qkeras.QConv1D(3, 2, padding="causal", name="time", kernel_quantizer="quantized_bits(4,0,0)")(x)  # auto_po2
    x = qkeras.QActivation("quantized_bits(8,5,0,1,1)", name="late")(layers.UpSampling1D(2, name="up")(x))
    x = layers.GlobalMaxPooling1D(name="best")(layers.LeakyReLU(0.25, name="leaky")(x))
    x = qkeras.QActivation("quantized_bits(8,5,0,1,1)", name="best_quantized")(x)
    return keras.Model(inputs, qkeras.QDense(3, name="logits", **own)(x))


def test_what_was_exported_is_read_again():
    for name, net in NETWORKS.items():
        x = np.random.default_rng(0).normal(scale=2, size=(50, 4, 4, 2)).astype(np.float32)
        again = from_qkeras(to_qkeras(net))
        assert [op.name for op in again.inputs] == [op.name for op in net.inputs]
        assert_array_equal(again.decode(reference.run(again, x)), net.decode(reference.run(net, x)), err_msg=name)


def test_the_tutorials_model(keras):
    with quiet():
        model = jet_tagging(keras)
        net = from_qkeras(model, JET)
        scores = keras.Model(model.inputs, model.get_layer("output").output)
        predicted_alike(scores, net, net.input.format.decode(net.encode(samples(net))).astype(np.float32))
    assert [op.name for op in net.ops] == ["fc_in", "fc1", "relu1", "fc2", "relu2", "fc3", "relu3", "output"]
    assert net["fc1"].weight_format == Fixed(signed=True, width=6, frac=5)
    assert net["relu1"].format == Fixed(signed=False, width=6, frac=6)


def test_layers_of_images_and_sequences_in_every_back_end(keras, tmp_path):
    with quiet():
        model = image_model(keras)
        net = from_qkeras(model)
        predicted_alike(model, net, samples(net), 50)
    kinds = {type(op) for op in net.ops}
    assert {Table, Quantize, Dense} <= kinds
    assert {"image", "conv_1", "conv_1_activation", "even", "even_symmetric"} <= net.shapes.keys()
    check(net, [RtlProject.create(net, tmp_path / "rtl").interpreter()], samples(net)).raise_for_mismatch()


def test_a_normalization_by_powers_of_two_is_exact_in_float64(keras):
    from hmq_fpga.deploy.qkeras import small

    with quiet(), floatx("float64"):
        inputs = keras.Input((3,), name="x")
        norm = keras.layers.BatchNormalization(epsilon=0, name="norm", **plain_batch_norm())
        model = keras.Model(inputs, norm(small.QActivation("quantized_bits(5,1,0,1,1)", name="q")(inputs)))
        norm.set_weights([np.array(values) for values in ([3.0, -1, 2], [0.125, 0, 5], [0.5, 1, -2], [4.0, 0.25, 1])])
        net = from_qkeras(model)
        predicted_alike(model, net, samples(net))


REFUSED = {  # a layer after a quantized input of eight values
    "float kernel": (lambda q, k: k.layers.Dense(2), r"\(Dense\) has constants on no grid of few bits"),
    "wide": (
        lambda q, k: q.QDense(2, kernel_quantizer=bits(20), use_bias=False, kernel_initializer="he_uniform"),
        "needs .* bits, and the model's float32 is exact to 24",
    ),
    "tanh": (lambda q, k: q.QActivation("quantized_tanh(4)"), "has the quantizer quantized_tanh; quantized_bits and"),
    "slope": (lambda q, k: q.QActivation(q.quantized_relu(4, negative_slope=0.5)), "with negative_slope set"),
    "scale": (lambda q, k: q.QActivation(q.quantized_bits(4, alpha="auto")), "with alpha set"),
    "random": (
        lambda q, k: q.QActivation(q.quantized_bits(4, alpha=1, use_stochastic_rounding=True)),
        "with use_stochastic_rounding set",
    ),
    "binary": (lambda q, k: q.QActivation(bits(1)), "of one bit and a sign, which is ±1"),
    "symmetric": (lambda q, k: q.QActivation(bits(13, symmetric=1)), "is symmetric, which is read up to 12 bits"),
    "normalization": (lambda q, k: k.layers.BatchNormalization(), "has constants on no grid of few bits"),
    "softplus": (lambda q, k: k.layers.Activation("softplus"), r"\(softplus\) has no exact integers here"),
    "unknown": (lambda q, k: k.layers.UnitNormalization(), "is not read: see from_qkeras for what is"),
}


@pytest.mark.parametrize(("made", "line"), REFUSED.values(), ids=REFUSED)
def test_a_layer_that_has_no_exact_integers_is_named(made, line, keras):
    import qkeras

    with quiet():
        x = inputs = keras.Input((8,), name="x")
        layer = made(qkeras, keras)
        model = keras.Model(inputs, layer(qkeras.QActivation("quantized_bits(8,2,0,1,1)", name="q")(x)))
        with pytest.raises(InvalidInput, match=line) as refused:
            from_qkeras(model)
    assert layer.name in str(refused.value)


def test_a_layer_that_computes_something_else_is_named(keras):
    import qkeras

    class Odd(qkeras.QDense):
        def call(self, inputs):
            return super().call(inputs) * 2

    Odd.__name__ = "QDense"
    with quiet():
        inputs = keras.Input((4,), name="x")
        x = qkeras.QActivation("quantized_bits(4,0,0,1,1)", name="q")(inputs)
        x = Odd(4, kernel_quantizer=bits(4), kernel_initializer="ones", name="odd")(x)
        with pytest.raises(UnsupportedLayer, match=r"layer 'odd' .* computes other values than the integers"):
            from_qkeras(keras.Model(inputs, keras.layers.Flatten(name="flat")(x)))


def test_inputs_without_a_format_and_layers_used_twice(keras):
    import qkeras

    with quiet():
        model = jet_tagging(keras)
        with pytest.raises(InvalidInput, match=r"'fc_in': .* give its format, as in input_formats={'fc_in': Fixed"):
            from_qkeras(model)
        with pytest.raises(InvalidInput, match="input_formats: the model has no input 'fc', but fc_in"):
            from_qkeras(model, {"fc": JET["fc_in"]})
        inputs, shared = keras.Input((4,), name="x"), qkeras.QDense(4, kernel_quantizer=bits(4), name="shared")
        twice = keras.Model(inputs, shared(shared(qkeras.QActivation("quantized_bits(4,0,0,1,1)", name="q")(inputs))))
        with pytest.raises(UnsupportedLayer, match=r"layer 'shared' \(QDense\) is used more than once"):
            from_qkeras(twice)


def test_a_model_file_is_converted(keras, tmp_path):
    with quiet():
        model = image_model(keras)
        save(model, tmp_path / "model.keras")
    net, left_out = convert_folder(tmp_path / "model.keras", tmp_path / "out", Hardware(estimate="none"))
    assert not left_out
    assert net.digest == from_qkeras(model).digest == QNet.load(tmp_path / "out" / "qnet").digest
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"qnet", "qkeras", "qonnx", "hls"}
