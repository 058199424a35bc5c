"""Proofs for all inputs: of what is right they succeed, and a planted fault is refuted by an input that shows it."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.proof.forms import Forms
from hmq_fpga.deploy.proof.prove import prove_program, prove_verilog
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.trace import Interpreter, NotUnrolled, load_program, trace
from hmq_fpga.ir import reference
from tests.deploy.test_every_op import NETWORKS
from tests.strategies import SEEDS, qnets

CONSTANTS = st.lists(st.integers(-9, 9), min_size=3, max_size=3)


@given(a=CONSTANTS, b=CONSTANTS, by=st.integers(0, 3))
def test_equal_functions_have_one_form(a, b, by):
    """A sum, put together in two ways, cut into bits and put together again; and its neighbour has another form."""
    forms = Forms()
    x = [forms.leaf(("x", i), -4, 5 + i) for i in range(3)]
    whole = forms.sum([(v, c + d) for v, c, d in zip(x, a, b, strict=True)], 7)
    parts = [forms.sum(list(zip(x, side, strict=True))) for side in (b, a)]
    high = forms.apply(("floor", by), lambda v: v >> by, whole)
    low = forms.apply(("mask", by), lambda v: v & ((1 << by) - 1), whole)
    assert forms.sum([(part, 1) for part in parts], 7).key == whole.key
    assert forms.sum([(high, 1 << by), (low, 1)]).key == whole.key
    assert forms.sum([(whole, 1)], 1).key != whole.key
    assert forms.maximum([whole, parts[0], x[0]]).key == forms.maximum([forms.maximum([x[0], whole]), parts[0]]).key


@settings(max_examples=25)
@given(net=qnets(), seed=SEEDS)
def test_traced_programs_are_proved(net, seed):
    try:
        program = trace(net)
    except NotUnrolled:
        return
    proof = prove_program(net, program)
    assert proof.state == "proved" or proof.left, proof
    assert proof.counterexample is None


@pytest.mark.parametrize("name", ["Table", "MaxPool", "AvgPool", "LeakyRelu", "Minimum", "Multiply", "mlp", "cnn"])
def test_program_and_verilog_of_every_kind_are_proved(name, request, tmp_path):
    net = NETWORKS[name] if name in NETWORKS else request.getfixturevalue(name)
    project = RtlProject.create(net, tmp_path / "rtl")
    for proof in (prove_program(net, load_program(project.folder)), prove_verilog(net, project)):
        assert (proof.state, proof.shown, proof.left) == ("proved", proof.outputs, ()), proof


def refuted(net, proof, predict=None):
    """The counterexample is one."""
    assert proof.state == "refuted"
    found = proof.counterexample
    x = np.array([found.inputs]).reshape(1, *net.input_shape) * net.input.format.step
    assert reference.run(net, x).ravel()[found.output] == found.expected != found.actual
    if predict:
        assert predict(x).ravel()[found.output] != found.expected
    return found


def test_a_shift_of_the_program_is_refuted(mlp):
    program = trace(mlp)
    for number in np.flatnonzero([op.opcode in (0, 1) for op in program.ops])[::9]:
        ops = list(program.ops)
        ops[number] = ops[number]._replace(data=(ops[number].data[0] + 1,))
        wrong = program._replace(ops=ops)
        proof = prove_program(mlp, wrong)
        if proof.state != "refuted":  # what overflows its word then is said
            assert proof.left
            continue
        refuted(mlp, proof, Interpreter(net=mlp, program=wrong).predict)


def test_a_constant_of_the_verilog_is_refuted(mlp, tmp_path):
    project = RtlProject.create(mlp, tmp_path / "rtl")
    (path,) = [p for p in project.sources if re.search(r",\d+'b", p.read_text())][-1:]
    text = path.read_text()
    constant = list(re.finditer(r"(,\d+'b\d*)(\d),", text))[-1]
    path.write_text(text[: constant.start(2)] + str(1 - int(constant[2])) + text[constant.end(2) :])
    refuted(mlp, prove_verilog(mlp, project))


def test_registers_that_do_not_match_are_found(mlp, tmp_path):
    project = RtlProject.create(mlp, tmp_path / "rtl", latency_cutoff=3)
    assert project.latency_cycles > 1
    late = prove_verilog(mlp, replace(project, latency_cycles=project.latency_cycles - 1))
    assert late.state == "left" and late.left == (
        f"an output comes after {project.latency_cycles} registers, not {project.latency_cycles - 1}",
    )
    assert_array_equal(late.shown, late.outputs)
