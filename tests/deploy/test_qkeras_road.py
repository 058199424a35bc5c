"""The road that QKeras users take: an exported model, and hls4ml's own conversion by the configuration beside it."""

import json
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.qkeras.config import hls4ml_config
from hmq_fpga.deploy.qkeras.model import export, load, to_qkeras
from hmq_fpga.deploy.qkeras.versions import quiet
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Scale
from tests import outside
from tests.deploy.networks import Builder, scheme

pytestmark = outside.needs_qkeras


@pytest.fixture(scope="module")
def mixed():
    """What the others lack: padding by its own layer before a depthwise convolution, and a channel by channel scale."""
    net = Builder((4, 4, 2), scheme(signed=True, bits=4, m=0), seed=3)
    net.depthwise("depth", (2, 2), scheme(signed=True, bits=3, m=2), padding=((0, 1), (2, 1)))
    net.quantize("relu", scheme(signed=False, bits=4, m=4))
    net._linear(Scale, "scale", (2,), scheme(signed=True, bits=3, m=-1), bias=9)
    net.quantize("wide", scheme(signed=True, bits=8, m=8)).flatten()
    return net.dense("fc", 3, scheme(signed=True, bits=8, m=7)).net


@pytest.mark.xfail(sys.version_info >= (3, 12), reason="hls4ml 1.3.0 reads no models of Keras 3", run=False)
@pytest.mark.filterwarnings("ignore:Overriding attribute '.*_quantizer'")
@pytest.mark.parametrize(
    ("fixture", "io_type"), [("mlp", "io_parallel"), ("cnn", "io_stream"), ("mixed", "io_parallel")]
)
def test_hls4mls_own_conversion_gives_the_same_integers(fixture, io_type, samples, request, tmp_path):
    from hls4ml.converters import convert_from_keras_model

    net = request.getfixturevalue(fixture)
    export(net, tmp_path)
    model, config = load(tmp_path / "model.keras"), json.loads((tmp_path / "hls4ml_config.json").read_text())
    with quiet():
        project = convert_from_keras_model(
            model, hls_config=config, backend="Vitis", io_type=io_type, output_dir=str(tmp_path / "hls")
        )
        project.compile()
    x = samples(net)
    expected = net.decode(reference.run(net, x)).reshape(len(x), -1)
    assert_array_equal(project.predict(x.astype(np.float64)).reshape(len(x), -1), expected)


@pytest.mark.parametrize(
    ("first", "second", "layer"), [("fc", "fc_linear", "fc_linear"), ("fc", "FC", "fc"), ("fc", "input_values", None)]
)
def test_two_layers_of_one_name(first, second, layer, tmp_path):
    """hls4ml would take the types of one for the other's, so there is no configuration; Keras refuses the last."""
    five = scheme(signed=True, bits=5, m=0)
    net = Builder((2,), five).dense(first, 2, five).quantize("relu", five).dense(second, 2, five).net
    if layer is None:
        with pytest.raises(InvalidInput, match=f"op '{second}': Keras would have two layers of this name: rename one"):
            to_qkeras(net)
        return
    with pytest.raises(InvalidInput, match=f"op '{layer}': hls4ml would have two layers of this name: rename one"):
        hls4ml_config(net)
    export(net, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.keras"}
