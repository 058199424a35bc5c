"""hls4ml's other backends: exact where g++ compiles their C simulation, else refused by name with the reason."""

import re
import shutil

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.hls.types import expected_types
from hmq_fpga.deploy.vendor.run import Target
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Linear
from tests.deploy.networks import Builder, scheme
from tests.deploy.test_every_op import NETWORKS

WIDE = scheme(signed=True, bits=16, m=0)


@pytest.mark.filterwarnings(
    "ignore:.*supported_boards:pytest.PytestUnraisableExceptionWarning"
)  # hls4ml leaves it open
@pytest.mark.parametrize("backend", ["Quartus", "Catapult", "VivadoAccelerator"])
def test_c_simulation_computes_the_integers_wherever_the_project_is(backend, tmp_path):
    net = NETWORKS["Multiply"]
    x = np.random.default_rng(0).normal(scale=2, size=(100, *net.input_shape)).astype(np.float32)
    HlsProject.create(net, tmp_path / "made", backend=backend)
    made = tmp_path / "here ' there"  # where hls4ml would look for the weights
    shutil.move(tmp_path / "made", made)
    project = HlsProject.load(made)
    assert_array_equal(project.predict(x), reference.run(net, x))
    expected = reference.trace(net, x[:20])
    for tensor, codes in project.trace(x[:20]).items():
        assert_array_equal(codes, expected.pop(tensor), err_msg=tensor)
    assert not expected
    types, wanted = project.types(), expected_types(net)
    for op in (op for op in net.ops if isinstance(op, Linear)):
        assert types[op.name]["weight"] == wanted[op.name]["weight"], op.name
    with pytest.raises(InvalidInput, match=r"project\.tcl"):
        Target.of(made)


@pytest.mark.parametrize(
    ("net", "settings", "line"),
    [
        (NETWORKS["Pad"], {"backend": "oneAPI"}, "backend 'oneAPI': hls4ml compiles its C\\+\\+ by Intel's icpx"),
        (
            NETWORKS["Pad"],
            {"backend": "Libero"},
            "backend 'Libero': hls4ml compiles its C\\+\\+ by Microchip's",
        ),
        (NETWORKS["Pad"], {"backend": "Quartus", "io_type": "io_stream"}, "compared with io_parallel alone"),
        (NETWORKS["Table"], {"backend": "Catapult"}, "op 'op': hls4ml's Catapult has no Table: choose Vitis"),
        (NETWORKS["Gather"], {"backend": "Quartus"}, "op 'op': hls4ml's Quartus has no Gather"),
        (NETWORKS["DepthwiseConv"], {"backend": "Quartus"}, "op 'op': .* no exact depthwise convolution"),
        (NETWORKS["AvgPool"], {"backend": "Catapult"}, "op 'op': .* a type of its own inside an AvgPool"),
        (
            Builder((2,), WIDE).quantize("sign", scheme(signed=False, bits=1, m=0)).net,
            {"backend": "Catapult"},
            "op 'sign': hls4ml's Catapult makes two bits of one",
        ),
        (
            Builder((2,), WIDE).dense("fc", 2, WIDE).net,
            {"backend": "VivadoAccelerator"},
            "its interface has one input and one output, which are floats of 24 bits",
        ),
        (NETWORKS["Pad"], {"backend": "Quartus", "strategy": "distributed_arithmetic"}, "Quartus has it not"),
    ],
)
def test_what_a_backend_cannot_have_is_refused_with_a_line(net, settings, line, tmp_path):
    with pytest.raises(InvalidInput) as refused:
        HlsProject.create(net, tmp_path / "hls", **settings)
    assert re.search(line, str(refused.value))
    assert not (tmp_path / "hls").exists()


def test_several_outputs_are_not_for_an_accelerator(heads, tmp_path):
    with pytest.raises(InvalidInput, match="one input and one output"):
        HlsProject.create(heads, tmp_path / "hls", backend="VivadoAccelerator")
