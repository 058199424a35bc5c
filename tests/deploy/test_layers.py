"""Each layer by itself, on codes that no input need lead to."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.deploy import layers
from hmq_fpga.deploy.audit.fault import with_op
from hmq_fpga.deploy.coverage import Tally
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.layers import layer_codes
from hmq_fpga.deploy.parity import ParityError, check, compare_layers
from hmq_fpga.deploy.proof.opened import _separate, find_places
from hmq_fpga.deploy.rtl.trace import Interpreter, trace
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Dense, Gather, Input, Quantize
from tests.deploy.networks import Builder, scheme


@dataclass
class Layers:
    """The reference of a network, which takes any codes."""

    net: QNet
    name: str = "layers"

    def predict(self, x):
        return reference.run(self.net, x)

    def takes(self, codes):
        return codes

    def layers(self, given):
        return reference.layers(self.net, given)


def dead() -> QNet:
    """Its last relu is zero for every input, but only since the two neurons before it are never large together."""
    builder = Builder((1,), scheme(signed=True, bits=4, m=0))
    weights = {"weight_format": Fixed(signed=True, width=3, frac=0)}
    builder._add(Dense, "fc1", weight=np.array([[1, -1]]), bias=np.array([0, 0]), **weights)
    builder.quantize("relu1", scheme(signed=False, bits=3, m=0))
    builder._add(Dense, "fc2", weight=np.array([[1], [1]]), bias=np.array([-8]), **weights)
    builder.quantize("relu2", scheme(signed=False, bits=4, m=1))
    return builder._add(Dense, "fc3", weight=np.array([[1]]), bias=np.array([0]), **weights).net


def test_given_nothing_but_inputs_it_is_the_network(cnn, samples):
    x = samples(cnn, 5)
    made = reference.layers(cnn, cnn.split_inputs(cnn.encode(x)))
    for name, codes in reference.trace(cnn, x).items():
        assert_array_equal(made[name], codes)


def test_a_layer_reads_what_it_is_given(mlp):
    given = layer_codes(mlp)
    made = reference.layers(mlp, given)
    for op in mlp.ops[1:]:
        assert_array_equal(made[op.name], op.run(mlp.sources(op), [given[name] for name in op.reads]))


@pytest.mark.parametrize("network", ["mlp", "cnn", "heads"])
def test_codes_are_possible_and_drive_sums_to_their_ends(network, request):
    net = request.getfixturevalue(network)
    given = layer_codes(net)
    made = reference.layers(net, given)
    for name, codes in given.items():
        ranges = net.ranges[name]
        assert (codes >= ranges.lo).all() and (codes <= ranges.hi).all()
    for op in net.linears:
        ranges = net.ranges[op.name]
        assert made[op.name].min() == ranges.lo.min() and made[op.name].max() == ranges.hi.max(), op.name


def test_large_networks_are_left_out(mlp, monkeypatch):
    monkeypatch.setattr(layers, "LARGEST", 100)
    assert layer_codes(mlp) is None
    assert check(mlp, [Layers(mlp)], np.zeros((1, *mlp.input_shape)), made=True).layers is None


def test_a_fault_that_no_input_shows_is_found():
    net = dead()
    every = np.arange(-8, 8)[:, None] * net.input.format.step
    assert not reference.trace(net, every)["relu2"][:, 0].any()
    wrong = with_op(net, net["fc3"], weight=np.array([[3]]))
    assert_array_equal(reference.run(net, every), reference.run(wrong, every))
    parity = check(net, [Layers(wrong)], every, made=True)
    assert parity.simulators["layers"].mismatches == parity.made.simulators["layers"].mismatches == 0
    assert parity.layers.simulators["layers"].mismatches > 0 and not parity.passed
    with pytest.raises(ParityError, match=r"codes differ layer by layer, by up to .* tensor 'fc3' first differs"):
        parity.raise_for_mismatch()
    assert parity.to_json()["layers"]["simulators"]["layers"]["first_difference"]["tensor"] == "fc3"


def test_what_only_a_layer_reaches_is_called_so():
    net, tally = dead(), Tally(dead())
    tally.add((np.arange(-8, 8)[:, None] * net.input.format.step).astype(np.float32), "data")
    missed, given = tally.wanted, layer_codes(net)
    seen = tally.seen_in_layers(given, reference.layers(net, given))
    assert ("fc2", "high") in missed & seen and ("relu1", "zero") in seen - missed
    tally.add_layers(seen)
    coverage = tally.coverage()
    states = {(t.tensor, event): state for t in coverage.tensors for event, state in t.events.items()}
    assert {at for at, state in states.items() if state == "layer"} == missed & seen
    assert states["relu1", "zero"] == "data" and coverage.to_json()["layer"] == len(missed & seen)


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
def test_firmware(cnn, io_type, tmp_path):
    """Equal with arrays and with streams; and a wrong weight file shows at the layer that reads it."""
    project = HlsProject.create(cnn, tmp_path / "hls", io_type=io_type)
    found, given, _ = compare_layers(cnn, project, layer_codes(cnn))
    assert found.mismatches == 0 and found.values > 10_000
    assert {op.name for op in cnn.ops if isinstance(op, Quantize)} <= given.keys()
    weights = min((project.folder / "firmware" / "weights").glob("w*.txt"), key=lambda path: int(path.stem[1:]))
    held = weights.read_text()
    first, _, others = held.partition(", ")
    for path in (weights, weights.with_suffix(".h")):
        path.write_text(path.read_text().replace(held, f"{0.125 if float(first) == 0.25 else 0.25}, {others}"))
    found, _, _ = compare_layers(cnn, HlsProject.load(project.folder), layer_codes(cnn))
    assert found.mismatches > 0 and found.first_difference.tensor == "same"


def test_other_types_than_amds_take_nothing(mlp, tmp_path):
    project = HlsProject.create(mlp, tmp_path / "hls", backend="Catapult")
    assert compare_layers(mlp, project, layer_codes(mlp)) == (None, {}, {})


@pytest.mark.parametrize("network", ["mlp", "cnn", "heads"])
def test_a_program_opened_at_its_tensors(network, request):
    net = request.getfixturevalue(network)
    interpreter = Interpreter(net=net, program=trace(net))
    found, given, _ = compare_layers(net, interpreter, layer_codes(net))
    assert found.mismatches == 0
    assert sum(isinstance(net[name], Quantize) for name in given) >= 2


def test_a_wrong_shift_shows_in_an_opened_program(mlp):
    program = trace(mlp)
    places, codes, unseen = find_places(mlp, program), layer_codes(mlp), []
    for number, op in enumerate(program.ops):
        if op.opcode in (0, 1):
            ops = list(program.ops)
            ops[number] = op._replace(data=(op.data[0] + 1,))
            wrong = Interpreter(net=mlp, program=program._replace(ops=ops), places=places)
            if compare_layers(mlp, wrong, codes)[0].mismatches == 0:
                unseen.append(number)
    assert len(unseen) <= len(program.ops) / 50


def test_a_program_that_reads_past_a_tensor_is_not_opened_there(mlp):
    program = trace(mlp)
    places = find_places(mlp, program)
    assert _separate(mlp, program, places)
    ops = list(program.ops)
    at = next(n for n in range(int(program.out_idxs[0]), 0, -1) if ops[n].opcode in (0, 1))
    an_input = next(n for n, op in enumerate(ops) if op.opcode == -1)
    ops[at] = ops[at]._replace(addr=(an_input, *ops[at].addr[1:]))
    assert not _separate(mlp, program._replace(ops=ops), places)


def test_equal_channels_have_one_code():
    """Two neurons with the same weights are one value of the program."""
    builder = Builder((4,), scheme(signed=True, bits=4, m=0)).dense("fc1", 3, scheme(signed=True, bits=3, m=0))
    twin = replace(builder.ops[-1], weight=np.array([[1, 1, -2], [3, 3, 1], [-2, -2, 1], [1, 1, 2]]))
    builder.ops[-1] = replace(twin, bias=np.array([5, 5, -3]))
    builder.quantize("relu", scheme(signed=False, bits=4, m=0)).dense("fc2", 2, scheme(signed=True, bits=3, m=0))
    net = builder.net
    interpreter = Interpreter(net=net, program=trace(net))
    found, given, _ = compare_layers(net, interpreter, layer_codes(net))
    assert found.mismatches == 0
    assert_array_equal(given["relu"][:, 0], given["relu"][:, 1])


def test_an_input_is_its_own_format():
    net = QNet((Input(name="x", shape=(2,), format=Fixed(signed=True, width=4, frac=1)),))
    assert set(np.unique(layer_codes(net)["x"])) == set(range(-8, 8))


def test_what_only_moves_values_is_not_given():
    """Half of what a layer makes, put out, is in the program, but nothing that a layer computes."""
    builder = Builder((4,), scheme(signed=True, bits=4, m=0)).dense("fc1", 4, scheme(signed=True, bits=3, m=0))
    builder._add(Gather, "some", index=np.array([2, 0]), fill=0)
    builder.quantize("relu", scheme(signed=False, bits=4, m=0), source="fc1").dense(
        "fc2", 2, scheme(signed=True, bits=3, m=0)
    )
    net = QNet(tuple(builder.ops), ("some", "fc2"))
    interpreter = Interpreter(net=net, program=trace(net))
    found, given, _ = compare_layers(net, interpreter, layer_codes(net))
    assert found.mismatches == 0 and "some" not in given and "relu" in given
