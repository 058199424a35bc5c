"""Planted faults: caught, shown to make no difference, or a hole with an input that shows it."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from hmq_fpga.deploy.audit.audit import _judged, audit
from hmq_fpga.deploy.audit.fault import Fault, Meaning, type_cast, with_op
from hmq_fpga.deploy.audit.firmware import Firmware
from hmq_fpga.deploy.backends import HLS, RTL
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Dense, Input, Quantize, Table
from tests.deploy.networks import Builder, scheme
from tests.outside import needs_qkeras


def test_types_compute_as_the_compiler_does():
    """Quarters to whole numbers of three bits."""
    codes = np.array([-18, -7, -6, -2, 2, 6, 10, 14])
    for text, expected in {
        "ap_fixed<3,3,AP_RND_CONV,AP_SAT,0>": [-4, -2, -2, 0, 0, 2, 2, 3],
        "ap_fixed<3,3,AP_RND,AP_SAT>": [-4, -2, -1, 0, 1, 2, 3, 3],
        "ap_fixed<3,3>": [3, -2, -2, -1, 0, 1, 2, 3],
        "ap_ufixed<3,3,AP_TRN,AP_SAT>": [0, 0, 0, 0, 0, 1, 2, 3],
        "ap_ufixed<4,2>": [14, 9, 10, 14, 2, 6, 10, 14],
    }.items():
        cast = type_cast(text, 2, before=True, target=0)
        assert cast.function(codes).tolist() == expected, text
    format_ = Fixed(signed=True, width=5, frac=1)
    cast = type_cast(str(format_), 4, before=True, target=1)
    assert cast.shift == 0 and cast.function(codes).tolist() == format_.requantize(codes, 4).tolist()


@dataclass
class Reference:
    """The network itself, as a simulator."""

    net: QNet
    name: str = "reference"

    def predict(self, x):
        return reference.run(self.net, x)


def fault(net, meaning):
    unseen = nullcontext(Reference(net))
    return Fault(backend="hls", kind="", where="", change="", simulator=lambda: unseen, meaning=meaning)


def outputs(planted, x):
    with planted.simulator() as simulator:
        return simulator.predict(x)


def test_a_survivor_is_equal_or_a_hole(mlp):
    """A type with a bit to spare is equal; one code of a weight is not, and an input says so."""
    x = np.zeros((4, *mlp.input_shape), np.float32)
    expected = reference.run(mlp, x)
    exact = mlp.formats["fc2"]
    wide = type_cast(f"ap_fixed<{exact.width + 1},{exact.integer + 1}>", exact.frac, before=False, target=exact.frac)
    equal = _judged(mlp, fault(mlp, Meaning(net=mlp, casts={"fc2": wide})), x, expected)
    assert (equal.result, equal.inputs) == ("equal", None) and "own form" in equal.reason
    narrow = type_cast(f"ap_fixed<{exact.width - 3},{exact.integer - 3}>", exact.frac, before=False, target=exact.frac)
    assert _judged(mlp, fault(mlp, Meaning(net=mlp, casts={"fc2": narrow})), x, expected).result == "hole"
    op = mlp["fc1"]
    weight = op.weight.copy()
    weight[0, 0] += 1 if weight[0, 0] < 3 else -1
    wrong = with_op(mlp, op, weight=weight)
    hole = _judged(mlp, fault(mlp, Meaning(net=wrong)), x, expected)
    assert hole.result == "hole"
    shown = np.array([hole.inputs]) * mlp.input.format.step
    assert (reference.run(mlp, shown) != reference.run(wrong, shown)).any()


def test_an_input_near_parity_s_is_found():
    """Random inputs do not come near a sum of 286 of 300; a sample of parity lacks but one value of it."""
    format_ = Fixed(signed=False, width=4, frac=0)
    three = Fixed(signed=True, width=3, frac=0)
    ones = {"weight": np.ones((20, 1), np.int64), "weight_format": three, "bias": np.array([-286])}
    net = QNet(
        (
            Input(name="x", shape=(20,), format=format_),
            Dense(name="fc1", source="x", **ones),
            Quantize(name="relu", source="fc1", format=format_),
            Dense(name="fc2", source="relu", **{**ones, "weight": np.ones((1, 1), np.int64), "bias": np.array([0])}),
        )
    )
    wrong = with_op(net, net["fc1"], weight=np.where(np.arange(20)[:, None] == 3, 2, 1))
    x = np.where(np.arange(20) == 3, 0, 15)[None].astype(np.float32)
    verdict = _judged(net, fault(net, Meaning(net=wrong)), x, reference.run(net, x))
    assert verdict.result == "hole"
    shown = np.array([verdict.inputs], np.float32)
    assert (reference.run(net, shown) != reference.run(wrong, shown)).any()


def test_an_entry_of_a_table_in_the_firmware(samples, tmp_path):
    builder = Builder((4,), scheme(signed=True, bits=5, m=0)).dense("fc", 3, scheme(signed=True, bits=3, m=0))
    builder.quantize("q", scheme(signed=True, bits=4, m=2))
    net = builder._add(Table, "table", values=np.arange(16)[::-1] - 8, format=Fixed(signed=True, width=6, frac=2)).net
    project = HlsProject.create(net, tmp_path / "hls")
    planted = Firmware(net, project, tmp_path)._entry(np.random.default_rng(0))
    assert (
        planted.kind == "table entry" and planted.meaning.net["table"].values.tolist() != net["table"].values.tolist()
    )
    x = samples(net, 60)
    np.testing.assert_array_equal(outputs(planted, x), reference.run(planted.meaning.net, x))
    assert _judged(net, planted, x, reference.run(net, x)).result == "caught"


def test_windows_of_a_pooling_in_the_firmware(samples, tmp_path):
    builder = Builder((6, 6, 2), scheme(signed=True, bits=5, m=0)).pool("pool", (3, 3), (2, 2))
    net = builder.quantize("q", scheme(signed=True, bits=4, m=0)).net
    project = HlsProject.create(net, tmp_path / "hls")
    x = samples(net, 40)
    expected = reference.run(net, x)
    rng, found = np.random.default_rng(0), {}
    while len(found) < 3:
        planted = Firmware(net, project, tmp_path)._window(rng)
        found.setdefault(planted.kind, planted)
    for planted in found.values():
        assert _judged(net, planted, x, expected).result == "caught", planted.where
    stream = HlsProject.create(net, tmp_path / "stream", io_type="io_stream")
    assert Firmware(net, stream, tmp_path)._window(rng) is None


def test_faults_of_firmware_and_program(mlp, samples, tmp_path):
    """Each is what it says: what a fault means is what its simulation computes."""
    for backend in (HLS, RTL):
        backend.create(mlp, tmp_path, Hardware(), None)
    x = samples(mlp, 40)
    found = audit(mlp, tmp_path, x, mutants=6)
    assert found.count("hole") == 0, found.to_json()
    assert found.count("caught") >= 4
    assert {mutant.backend for mutant in found.mutants} == {"hls", "rtl"}
    assert not any(mutant.reason.startswith("does not run") for mutant in found.mutants)


def test_what_a_fault_means_is_what_it_computes(mlp, samples, tmp_path):
    project = HlsProject.create(mlp, tmp_path / "hls")
    x = samples(mlp, 30)
    faults = Firmware(mlp, project, tmp_path).faults(np.random.default_rng(3))
    codes = [f for f in islice(faults, 12) if f.kind.startswith(("code", "swapped"))][:4]
    assert codes
    for planted in codes:
        np.testing.assert_array_equal(outputs(planted, x), reference.run(planted.meaning.net, x), planted.where)


@needs_qkeras
def test_faults_of_a_model(cnn, samples, tmp_path):
    from hmq_fpga.deploy.qkeras.faults import model_faults
    from hmq_fpga.deploy.qkeras.model import export

    export(cnn, tmp_path / "qkeras")
    x = samples(cnn, 30)
    expected = reference.run(cnn, x)
    verdicts = [
        _judged(cnn, planted, x, expected)
        for planted in islice(model_faults(cnn, tmp_path / "qkeras", np.random.default_rng(0)), 6)
    ]
    assert sum(v.result == "caught" for v in verdicts) >= 4


def test_nothing_to_prove_is_said(mlp, samples, tmp_path):
    from hmq_fpga.ir.errors import InvalidInput

    with pytest.raises(InvalidInput, match="no Verilog to prove"):
        audit(mlp, tmp_path, samples(mlp, 1), proofs=True)
