import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hmq_fpga import cli
from hmq_fpga.deploy.backends import HLS
from hmq_fpga.deploy.toolchain import ToolFailed
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.run.pipeline import require_device
from tests import outside
from tests.deploy.networks import Builder, scheme


def call(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["hmq-fpga", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def spoiled(path, file, **arrays):
    with np.load(file) as archive:
        np.savez(path, **{name: arrays.get(name, archive[name]) for name in archive.files})
    return path


def bad_calls(tmp_path, data, own):
    """Arguments after `run`, and what the one line must say."""
    with np.load(data) as archive:
        x = archive["x_train"].copy()
    x[3, 5] = np.nan
    line = own.read_text().splitlines().index("def broken():") + 2
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "bad.yaml").write_text("task: digits_mlp\nrate: 8\n")
    (tmp_path / "worse.yaml").write_text("task: [")
    (tmp_path / "hasty.yaml").write_text("task: digits_mlp\nsearch_steps: 100\n")
    (tmp_path / "layers.yaml").write_text("task: digits_mlp\nlayers: {fc9: {reuse_factor: 2}}\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    nan = spoiled(tmp_path / "nan.npz", data, x_train=x)
    short = spoiled(tmp_path / "short.npz", data, y_test=np.arange(3))
    wide = spoiled(tmp_path / "wide.npz", data, x_train=np.nan_to_num(x) * np.logspace(-6, 6, 64))
    real = spoiled(tmp_path / "real.npz", data, y_train=x[:, :3] * 0, y_test=x[:200, :3] * 0)
    images = spoiled(tmp_path / "images.npz", data, x_train=np.zeros((900, 1, 8, 8)), x_test=np.zeros((200, 1, 8, 8)))
    torch.save({"0.weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Path.cwd()))
    return {
        "unknown task": (["digit_mlp"], "unknown task 'digit_mlp'"),
        "missing data": (["digits_mlp", "--data", tmp_path / "none.npz"], "none.npz: no such file"),
        "malformed data": (["digits_mlp", "--data", tmp_path / "text.npz"], "cannot be read as an .npz file"),
        "uneven data": (["digits_mlp", "--data", short], "x_test has 200 samples and y_test 3"),
        "nan in data": (["digits_mlp", "--data", nan], "x_train: 1 values are NaN"),
        "features of too different scales": ([f"{own}:small", "--data", wide], "the input beside feature 63 (0 …"),
        "nan in weights": ([f"{own}:nan", "--data", data], "0.weight holds NaN"),
        "no data for own model": ([f"{own}:small"], "--data"),
        "unsupported module": ([f"{own}:normed", "--data", data], "'1' (LayerNorm): takes means of"),
        "returns nothing": ([f"{own}:Nothing", "--data", data], "forward must return a tensor that it computed"),
        "exits": ([f"{own}:Exits", "--data", data], "does not accept an input of shape (64,) in mine.py:"),
        "a class for a number": ([f"{own}:Class", "--data", real], "argmax has no gradient: give classes as targets"),
        "other targets": ([f"{own}:narrow", "--data", real], "output is (4,), but the targets are (3,)"),
        "another model's weights": (["digits_mlp", "--weights", tmp_path / "other.pt"], "not a state dict of this"),
        "a pickle for weights": (["digits_mlp", "--weights", tmp_path / "evil.pt"], "not a state dict of this"),
        "no weights": (["digits_mlp", "--weights", tmp_path / "none.pt"], "none.pt"),
        "too few outputs": ([f"{own}:narrow", "--data", data], "but the data have 10 classes"),
        "unreachable R_w": (["digits_mlp", "--rw", "40"], "choose from 4 to 16"),
        "unreachable bit operations": (["digits_mlp", "--bops", "1000"], "1,000 bit operations are out of reach: the"),
        "zeros and LUTs": (["digits_mlp", "--luts", "900", "--zeros", "0.5"], "zeros and luts all prune: give one"),
        "no bit operations": (["digits_mlp", "--bops", "0"], "setting 'bops': Input should be greater than 0"),
        "unreachable R_a": (["digits_mlp", "--ra", "100"], "leaves tensor 'input'"),
        "unknown method": (["digits_mlp", "--method", "magic"], "there are hawq, hgq, hmq, msqe, "),
        "unknown setting": ([tmp_path / "bad.yaml"], "setting 'rate'"),
        "broken yaml": ([tmp_path / "worse.yaml"], "cannot be read"),
        "too few steps": ([tmp_path / "hasty.yaml"], "search_steps = 100: hmq needs at least 150"),
        "unknown layer": ([tmp_path / "layers.yaml"], "layer 'fc9' has no reuse factor or strategy; these layers have"),
        "no strategy for it": (
            [f"{own}:depthwise", "--data", images, "--strategy", "Resource"],
            "no Resource strategy of depthwise convolutions",
        ),
        "function that fails": (
            [f"{own}:broken", "--data", data],
            f"fails in line {line}: ValueError: a depth is missing",
        ),
        "function with arguments": ([f"{own}:needy", "--data", data], "needy: fails: TypeError: needy() missing 1"),
        "foreign folder": (["digits_mlp", "--out", tmp_path / "thesis"], "holds 'thesis.tex' but no run"),
        "line break in a path": (
            ["digits_mlp", "--out", tmp_path / "a\nb"],
            "no compiler takes a path with line breaks",
        ),
        "too long a name": (["digits_mlp", "--out", tmp_path / ("ü" * 130)], "a name of 260 bytes"),
        "no GPU": (["digits_mlp", "--device", "cuda"], "device 'cuda': PyTorch"),
        "unknown device": (["digits_mlp", "--device", "gpu"], "give cpu, cuda, or cuda:N"),
        "not a number": (["digits_mlp", "--rw", "high"], "not a valid float"),
        "unknown option": (["digits_mlp", "--rate", "8"], "No such option"),
    }


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, digits_file, own_model, monkeypatch, capsys, subtests):
    cases = bad_calls(tmp_path, digits_file, own_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = files(tmp_path)
    for name, (arguments, message) in cases.items():
        with subtests.test(name):
            code, out, err = call(monkeypatch, capsys, "run", *arguments)
            assert (code, out) == (2, "")
            assert err.startswith("hmq-fpga: ")
            assert message in err
            assert err.count("\n") == 1
            assert files(tmp_path) == before


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "hmq-fpga: unknown task 'digit_mlp'"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        code, out, err = call(monkeypatch, capsys, "run", "digit_mlp")
        assert (code, out, err[: len(said)]) == (2, "", said)
        assert bool(err) == bool(said)
    monkeypatch.setenv("RANK", "0")
    assert "give --jobs for several runs" in call(monkeypatch, capsys, "sweep", "digits_mlp")[2]


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_device("cuda:1")
    with pytest.raises(InvalidInput, match=r"device 'cuda:2': this machine has 2, the last is 'cuda:1'"):
        require_device("cuda:2")


def bad_sweeps(tmp_path, data, own):
    """Arguments after `sweep`, and what the one line must say."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    return {
        "unknown task": (["digit_mlp"], "unknown task 'digit_mlp'"),
        "line break in a path": (
            ["digits_mlp", "--out", tmp_path / "a\nb"],
            "no compiler takes a path with line breaks",
        ),
        "too long a name": (["digits_mlp", "--out", tmp_path / ("ü" * 130)], "a name of 260 bytes"),
        "no GPU": (["digits_mlp", "--device", "cuda"], "device 'cuda': PyTorch"),
        "not a number": (["digits_mlp", "--rw", "4", "high"], "'high' is not a valid float"),
        "no number": (["digits_mlp", "--seeds", "-1"], "No such option"),
        "unknown method": (["digits_mlp", "--methods", "hmq", "magic"], "there are hawq, hgq, hmq, msqe, "),
        "missing data": (["digits_mlp", "--data", tmp_path / "none.npz"], "none.npz: no such file"),
        "unsupported module": ([f"{own}:normed", "--data", data], "'1' (LayerNorm): takes means of"),
        "no process": (["digits_mlp", "--data", data, "--jobs", "0"], "--jobs 0: give at least 1"),
        "bad address": (["digits_mlp", "--data", data, "--cluster", "tcp:/nowhere"], "--cluster tcp:/nowhere"),
        "foreign folder": (["digits_mlp", "--out", tmp_path / "thesis"], "holds 'thesis.tex' but no sweep"),
    }


def test_bad_sweep_is_one_line_and_writes_nothing(tmp_path, digits_file, own_model, monkeypatch, capsys, subtests):
    cases = bad_sweeps(tmp_path, digits_file, own_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = files(tmp_path)
    for name, (arguments, message) in cases.items():
        with subtests.test(name):
            code, out, err = call(monkeypatch, capsys, "sweep", *arguments)
            assert (code, out) == (2, "")
            assert message in err
            assert err.count("\n") == 1
            assert files(tmp_path) == before


def test_a_tool_that_fails_is_one_line_and_has_its_own_exit_code(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ToolFailed("hls4ml dropped\nlayer 'fc1'")

    monkeypatch.setattr("hmq_fpga.deploy.convert.convert_folder", fail)
    code, out, err = call(monkeypatch, capsys, "convert", tmp_path, "--out", tmp_path / "out")
    assert (code, out, err) == (3, "", "hmq-fpga: hls4ml dropped layer 'fc1'\n")


def test_what_is_known_to_stop_hls_is_said(tmp_path, monkeypatch, capsys):
    format_ = scheme(signed=True, bits=3, m=0)
    Builder((64,), format_).dense("wide", 65, format_).net.save(tmp_path / "qnet")
    monkeypatch.setattr("hmq_fpga.deploy.convert.split_by_installed", lambda: ((HLS,), {}))
    code, out, err = call(monkeypatch, capsys, "convert", tmp_path, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "wide: 4,160 multiplications of one unrolled loop" in out


def test_missing_compiler_is_found_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HMQ_FPGA_GXX", str(tmp_path / "no-compiler"))
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "run", "digits_mlp")
    assert code == 2
    assert "g++ not found, needed to compile the C simulation: install" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb",
    ["run", "convert", "csim", "audit", "synth", "pack", "collect", "sweep", "diff", "report", "tasks", "doctor"],
)
def test_every_verb_has_help_with_an_example(verb, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, verb, "--help")
    assert code == 0
    assert f"Example: hmq-fpga {verb}" in out


@pytest.mark.parametrize(
    "verb", ["csim", "audit", "report", "pack", "collect", "synth --tool vitis", "synth --tool yosys", "diff ."]
)
def test_verbs_on_a_run_want_a_run(verb, tmp_path, monkeypatch, capsys):
    verb, *options = verb.split()
    code, _, err = call(monkeypatch, capsys, verb, tmp_path, *options)
    assert code == 2
    assert "not the folder of a run" in err


def test_convert_wants_a_network(tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "convert", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "not a readable QNet folder" in err
    assert not (tmp_path / "out").exists()


def test_tasks_and_doctor_speak_json(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "tasks", "--json")
    assert code == 0
    assert {"digits_mlp", "digits_cnn", "pendigits_mlp", "mnist_cnn"} <= set(json.loads(out))
    code, out, _ = call(monkeypatch, capsys, "doctor", "--json")
    assert code == 0
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert set(findings["qkeras"]) == {"name", "found", "purpose", "remedy"}
    assert findings["qkeras"]["remedy"] == "pip install 'hmq-fpga[qkeras]'"
    assert (findings["qkeras"]["found"] is not None) == outside.has_qkeras()  # by either of its packages


def test_a_remedy_is_printed_as_it_is(monkeypatch, capsys):
    """Brackets too, which are styles to the library that prints."""
    monkeypatch.setattr("hmq_fpga.deploy.doctor.installed_version", lambda name: None)
    _, out, _ = call(monkeypatch, capsys, "doctor")
    assert "pip install 'hmq-fpga[qkeras]'" in out


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["run", "--help"]])
def test_light_verbs_load_no_framework(arguments):
    """Imports take seconds; a look at the help must not."""
    code = (
        "import sys\n"
        f"sys.argv = ['hmq-fpga', *{arguments}]\n"
        "from hmq_fpga import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'tensorflow', 'hls4ml', 'qkeras', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
