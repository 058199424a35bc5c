"""The whole road on real data: an undisturbed run, and one that is killed in every stage."""

import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Table
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.methods import METHODS
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import ignore
from hmq_fpga.study.run import pipeline
from hmq_fpga.study.run.config import make_config
from hmq_fpga.study.run.diff import diff
from hmq_fpga.study.run.pipeline import compare_again, run
from hmq_fpga.study.tasks import resolve
from tests import outside

QKERAS = ("qkeras",) if outside.has_qkeras() else ()
STAGES = ("float", "search", "finetune", "freeze", *QKERAS, "qonnx", "hls", "rtl", "parity")
SIMULATORS = (*QKERAS, "qonnx", "csim", "trace")


def command(folder, data, own, *more, settings=""):
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(
        f"task: {own}:small\ndata: {data}\nout: {folder}\nrw: 10\n"
        f"float_steps: 300\nsearch_steps: 300\nfinetune_steps: 300\n{settings}"
    )
    return [sys.executable, "-m", "hmq_fpga", "run", str(config), *more]


def states(folder):
    try:
        record = json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: stage["state"] for name, stage in record.get("stages", {}).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_file, own_model):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = subprocess.run(
        command(folder, digits_file, own_model, "--json"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # silence when piped
    return folder, json.loads(done.stdout)


def test_run_folder_is_what_the_contract_says(undisturbed):
    folder, record = undisturbed
    for name in (
        "run.json",
        "scheme.json",
        "qnet",
        *QKERAS,
        "qonnx/model.onnx",
        "hls/firmware/defines.h",
        "parity.json",
        "report.html",
    ):
        assert (folder / name).exists(), name
    metrics = record["metrics"]
    assert metrics["float_accuracy"] > 0.85
    assert metrics["qnet_accuracy"] > 0.85
    assert 10 <= metrics["rw_actual"] <= 11
    assert set(metrics["seconds"]) == set(STAGES)
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["passed"]
    assert parity["samples"] == 200
    assert list(parity["simulators"]) == list(SIMULATORS)
    assert list(parity["left_out"]) == ([] if QKERAS else ["qkeras"])
    for simulator in SIMULATORS:
        assert parity["simulators"][simulator]["values"] == 2000
        assert parity["simulators"][simulator]["mismatches"] == 0
        assert parity["simulators"][simulator]["accuracy"] == metrics["qnet_accuracy"]
    formula, estimate = json.loads((folder / "resources.json").read_text())
    assert formula["stage"] == "model"
    assert estimate["stage"] == "trace"
    assert estimate["lut"] > 0
    tensors = Scheme.load(folder / "scheme.json").tensors
    assert [t.kind for t in tensors] == ["input", "weight", "activation", "weight"]
    assert list((folder / "tensorboard" / "search").iterdir())
    ranges = json.loads((folder / "ranges.json").read_text())
    assert list(ranges["tensors"]) == [t.name for t in tensors]
    assert {len(of["log2"]) for of in ranges["tensors"].values()} == {len(ranges["shares"])}


def test_hls_types_are_the_schemes(undisturbed):
    """Every weight, input and activation type in `defines.h` against `scheme.json`, both read from disk."""
    folder, _ = undisturbed
    types = HlsProject.load(folder / "hls").types()
    for tensor in json.loads((folder / "scheme.json").read_text())["tensors"]:
        bits, integer = tensor["bits"], tensor["threshold_log2"] + tensor["signed"]
        kind = "ap_fixed" if tensor["signed"] else "ap_ufixed"
        if tensor["kind"] == "weight":
            assert types[tensor["name"].removesuffix(".weight")]["weight"] == f"{kind}<{bits},{integer}>"
        else:
            assert types[tensor["name"]]["result"] == f"{kind}<{bits},{integer},AP_RND_CONV,AP_SAT>"


def test_finished_run_is_not_repeated(undisturbed, digits_file, own_model):
    folder, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.npz")} | {
        p: p.stat().st_mtime_ns for p in folder.glob("*.pt")
    }
    assert subprocess.run(command(folder, digits_file, own_model), capture_output=True, check=False).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def run_again(folder, data, own, tmp_path, *options):
    """A copy of a finished run, gone over with other settings, and its record."""
    again = tmp_path / folder.name
    shutil.copytree(folder, again)
    done = subprocess.run(command(again, data, own, "--json", *options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return again, json.loads(done.stdout)


@pytest.mark.once
def test_a_bound_on_bit_operations_is_kept_and_shown(undisturbed, digits_file, own_model, tmp_path):
    folder, record = undisturbed
    most = record["metrics"]["bops"] * 0.9
    again, other = run_again(folder, digits_file, own_model, tmp_path, "--bops", f"{most:.0f}")
    assert most / 1.1 <= other["metrics"]["bops"] <= most
    assert other["metrics"]["rw_actual"] >= 10
    assert f"R_w 10, {most:,.0f} bit operations" in (again / "report.html").read_text()


@pytest.mark.once
def test_a_bound_on_logic_is_kept_by_the_tracers_figure(undisturbed, digits_file, own_model, tmp_path):
    folder, _ = undisturbed
    before = json.loads((folder / "resources.json").read_text())[1]["lut"]
    most = before // 2
    again, other = run_again(folder, digits_file, own_model, tmp_path, "--luts", str(most), "--distill")
    _, traced = json.loads((again / "resources.json").read_text())
    assert traced["lut"] == other["metrics"]["luts_actual"] <= most == other["metrics"]["luts_target"]
    assert traced["lut"] > 0.8 * most
    assert other["metrics"]["parity_passed"]
    assert f"at most {most} asked" in (again / "report.html").read_text()


@pytest.mark.once
def test_other_settings_of_the_verilog_repeat_only_what_they_touch(undisturbed, digits_file, own_model, tmp_path):
    folder, record = undisturbed
    again, other = run_again(folder, digits_file, own_model, tmp_path, "--latency-cutoff", "0")
    stages = other["stages"]
    repeated = {name for name in STAGES if stages[name] != record["stages"][name]}
    assert repeated == {"rtl", "parity"}
    cycles = [
        {entry["stage"]: entry for entry in json.loads((run / "resources.json").read_text())}["trace"]["latency_cycles"]
        for run in (folder, again)
    ]
    assert cycles[0] > 1
    assert cycles[1] == 0


@pytest.mark.once
def test_widths_of_single_weights(undisturbed, digits_file, own_model, tmp_path):
    """Exact in all back ends, kept and counted by the run, and searched again where their file has changed."""
    folder, _ = undisturbed
    again, record = run_again(folder, digits_file, own_model, tmp_path, "--method", "hgq")
    parity = json.loads((again / "parity.json").read_text())
    assert [(name, parity["simulators"][name]["mismatches"]) for name in SIMULATORS] == [(n, 0) for n in SIMULATORS]
    scheme = Scheme.load(again / "scheme.json")
    bits = sum(int(t.widths.sum()) for t in scheme.of_kind("weight"))
    metrics = record["metrics"]
    assert metrics["weight_bits"] == bits
    assert metrics["rw_actual"] == 32 * sum(t.size for t in scheme.of_kind("weight")) / bits
    assert 10 <= metrics["rw_actual"] <= 11
    means = {layer["weight_bits"] for layer in json.loads((again / "layers.json").read_text())["layers"]} - {None}
    assert means == {t.mean_width for t in scheme.of_kind("weight")}
    found = diff(folder, again)
    assert all("bits a weight" in change[1] for name, change in found["formats"].items() if name.endswith(".weight"))

    files = {path: path.read_bytes() for path in (again / "scheme.json", again / "widths.npz")}
    command_again = command(again, digits_file, own_model, "--json", "--method", "hgq")
    for damage, repeated in ((lambda: None, False), ((again / "widths.npz").unlink, True)):
        damage()
        done = subprocess.run(command_again, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (json.loads(done.stdout)["stages"]["search"] != record["stages"]["search"]) == repeated
        assert Scheme.load(again / "scheme.json") == scheme
    assert files[again / "scheme.json"] == (again / "scheme.json").read_bytes()


@pytest.mark.once
def test_parity_on_some_samples(undisturbed, digits_file, own_model, tmp_path):
    """The back ends see the first ones only, accuracy is still that of the whole test split."""
    folder, record = undisturbed
    again, other = run_again(folder, digits_file, own_model, tmp_path, "--parity-samples", "30")
    parity = json.loads((again / "parity.json").read_text())
    assert parity["samples"] == 30
    assert {simulator["values"] for simulator in parity["simulators"].values()} == {300}
    assert len((again / "hls" / "tb_data" / "tb_input_features.dat").read_text().splitlines()) == 30
    for name in ("float_accuracy", "qnet_accuracy"):
        assert other["metrics"][name] == record["metrics"][name]


@pytest.mark.once
def test_killed_in_every_stage_gives_the_same_network(undisturbed, digits_file, own_model, tmp_path):
    folder, killed = tmp_path / "killed", set()
    started = command(folder, digits_file, own_model, settings="checkpoint_s: 0\n")
    for stage in STAGES:
        process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoint, trains = folder / f".checkpoint-{stage}" / stage, stage in ("float", "search", "finetune")
        while process.poll() is None and states(folder).get(stage) != "done":
            if states(folder).get(stage) == "running" and checkpoint.exists() == trains:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
        if states(folder).get(stage) == "running":
            killed.add(stage)
            assert checkpoint.exists() == trains
    assert killed >= {"float", "search", "finetune", "hls", "parity"}  # the others pass in milliseconds
    finished = subprocess.run(command(folder, digits_file, own_model), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert QNet.load(folder / "qnet").digest == QNet.load(undisturbed[0] / "qnet").digest
    assert not list(folder.glob(".new-*")) + list(folder.glob(".checkpoint-*"))


@pytest.mark.once
def test_two_processes_make_one_run(undisturbed, digits_file, own_model, tmp_path):
    """Started by torchrun: both train, the first writes and speaks."""
    python, *arguments = command(tmp_path / "run", digits_file, own_model, "--json", settings="estimate: none\n")
    both = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(both, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert 10 <= record["metrics"]["rw_actual"] <= 11
    assert record["metrics"]["parity_passed"]
    assert record["metrics"]["qnet_accuracy"] > 0.85
    assert record["stages"]["search"]["inputs"] != undisturbed[1]["stages"]["search"]["inputs"]


def test_csim_again_on_other_data(undisturbed, digits_file, tmp_path):
    folder, _ = undisturbed
    with np.load(digits_file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(
        tmp_path / "scaled.npz", **(arrays | {"x_test": arrays["x_test"][:50] * 8, "y_test": arrays["y_test"][:50]})
    )
    arguments = ["csim", str(folder), "--data", str(tmp_path / "scaled.npz"), "--json"]
    done = subprocess.run([sys.executable, "-m", "hmq_fpga", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 50


def test_broken_project_fails_the_command(undisturbed, tmp_path):
    """A weight changed behind our back: csim says so before it simulates, and names file, tensor and both values."""
    folder = tmp_path / "broken"
    shutil.copytree(undisturbed[0], folder)
    for bias in (folder / "hls" / "firmware" / "weights").glob("b*"):  # the header and the text are one constant
        text = bias.read_text()
        values = re.search(r"[-\d.]+(?:e-?\d+)?, ", text)
        bias.write_text(text[: values.start()] + "0, " + text[values.end() :])
    arguments = [sys.executable, "-m", "hmq_fpga", "csim", str(folder), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert re.search(r"hls/firmware/weights/b2\.h: \w+: 0, expected -?\d", done.stderr)
    assert Path(folder / "parity.json").exists()


def test_convert_needs_no_torch(undisturbed, tmp_path):
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        f"sys.argv = ['hmq-fpga', 'convert', {str(undisturbed[0])!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "from hmq_fpga.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (folder / "hls" / "firmware" / "defines.h" for folder in (tmp_path / "out", undisturbed[0]))
    assert ours.read_text() == theirs.read_text()


def test_vendor_tools_are_missing_in_one_line(undisturbed, monkeypatch):
    """No tool here: the command says which, writes nothing, and an archive for another machine can be made."""
    folder, _ = undisturbed
    before = (folder / "resources.json").read_text()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done = subprocess.run(
        [sys.executable, "-m", "hmq_fpga", "synth", str(folder), "--tool", "vitis"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "vitis" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (folder / "resources.json").read_text() == before
    assert not (folder / "synth").exists()


def test_archive_goes_out_and_comes_back(undisturbed, tmp_path):
    """What another machine sends back is read if it is this network's; here it is the project as it went out."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    packed = [sys.executable, "-m", "hmq_fpga", "pack", str(folder), "--out", str(tmp_path / "out.tar.gz")]
    assert subprocess.run(packed, capture_output=True, check=False).returncode == 0
    nothing_back = [sys.executable, "-m", "hmq_fpga", "collect", str(folder)]
    done = subprocess.run(nothing_back, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "results.tar.gz" in done.stderr

    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    (there,) = (tmp_path / "there").iterdir()
    came_back = [*nothing_back, "--from", str(there)]
    before = subprocess.run(came_back, capture_output=True, text=True, check=False)
    assert "not the network's" not in before.stderr
    types = there / "firmware" / "defines.h"
    types.write_text(types.read_text().replace("AP_SAT", "AP_WRAP", 1))
    done = subprocess.run(came_back, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"not the network's: \S+/firmware/defines\.h.*AP_WRAP.*AP_SAT.*; pack the run again", done.stderr)


def test_a_trained_models_weights_are_the_float_baseline(undisturbed, digits_file, own_model, tmp_path):
    folder, record = undisturbed
    config = {"task": f"{own_model}:small", "data": digits_file, "weights": folder / "float.pt", "estimate": "none"}
    steps = {"search_steps": 150, "finetune_steps": 10}
    again = run(make_config({**config, **steps, "out": tmp_path / "run"}), Quiet())
    assert again["metrics"]["float_accuracy"] == record["metrics"]["float_accuracy"]
    assert again["resolved"]["budget"]["float_steps"] == 0


def test_an_outlier_in_the_training_data_stands_in_the_notes(own_model, digits_file, tmp_path):
    with np.load(digits_file) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["x_train"][17, 3] = 1e6
    np.savez(tmp_path / "faulty.npz", **arrays)
    steps = {"float_steps": 300, "search_steps": 150, "finetune_steps": 100, "estimate": "none"}
    config = {"task": f"{own_model}:small", "data": tmp_path / "faulty.npz", "out": tmp_path / "run", **steps}
    metrics = run(make_config(config), Quiet())["metrics"]
    (note,) = metrics["ranges"]
    assert note.startswith("input: 1 of ")
    assert "exceed its threshold 2**0, up to 2**20, and are clipped: correct or leave out" in note
    assert note in json.loads((tmp_path / "run" / "layers.json").read_text())["notes"]
    assert note in html.unescape((tmp_path / "run" / "report.html").read_text())
    assert metrics["qnet_accuracy"] > metrics["float_accuracy"] - 0.02


@pytest.mark.once
def test_the_model_is_read_once_where_its_parameters_stay(own_model, digits_file, tmp_path, monkeypatch):
    """Twice with float training in between; and what is searched is the trained model, however a run came to it."""
    read = []

    def counted(*arguments, **settings):
        read.append(arguments)
        return instrument(*arguments, **settings)

    monkeypatch.setattr(pipeline, "instrument", counted)
    steps = {"float_steps": 100, "search_steps": 150, "finetune_steps": 20, "estimate": "none"}
    config = {"task": f"{own_model}:small", "data": digits_file, "out": tmp_path / "run", **steps}

    def digest_and_readings(**changes):
        read.clear()
        record = run(make_config(config | changes), Quiet())
        return record["metrics"]["qnet_digest"], len(read)

    first, readings = digest_and_readings()
    assert readings == 2
    for made in ("search.pt", "finetune.pt"):  # what comes after it is done again
        (tmp_path / "run" / made).unlink()
        assert digest_and_readings() == (first, 1)
    assert digest_and_readings() == (first, 1)
    for made in ("float.pt", "search.pt"):  # trained from the start again
        (tmp_path / "run" / made).unlink()
    assert digest_and_readings() == (first, 2)
    pipeline.train_baseline(make_config(config | {"out": tmp_path / "baseline"}), Quiet())
    read.clear()
    record = run(make_config(config | {"out": tmp_path / "other"}), Quiet(), shared=tmp_path / "baseline")
    assert (record["metrics"]["qnet_digest"], len(read)) == (first, 1)
    weights = {"weights": tmp_path / "run" / "float.pt", "float_steps": 0, "out": tmp_path / "given"}
    assert digest_and_readings(**weights) == (first, 1)


def small(own, data, out, **changes):
    """Settings of a short run."""
    steps = {"float_steps": 200, "search_steps": 150, "finetune_steps": 100}
    return make_config({"task": f"{own}:small", "data": data, "out": out, "estimate": "none", **steps, **changes})


@pytest.mark.once
def test_dead_channels_are_taken_out_on_request(digits_file, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nfrom torch import nn\n\n\ndef small():\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
        "    model[1].weight.data[[2, 5]] = -0.1\n"
        "    model[1].weight.data[[2, 5], 0] = 0.1  # of a corner, which is empty\n"
        "    return model\n"
    )
    before = run(small(own, digits_file, tmp_path / "run", estimate="model"), Quiet())
    nets = [QNet.load(tmp_path / "run" / "qnet")]
    after = run(small(own, digits_file, tmp_path / "run", estimate="model", drop_dead=True), Quiet())
    nets.append(QNet.load(tmp_path / "run" / "qnet"))
    assert all(after["stages"][name] == before["stages"][name] for name in ("float", "search", "finetune"))
    ((tensor, count),) = after["metrics"]["dead_channels"].items()
    assert count >= 2 and "dead_channels" not in before["metrics"]
    assert [int((~net.linears[0].weight.any(axis=0)).sum()) for net in nets] == [0, count]
    assert after["metrics"]["parity_passed"] and after["metrics"]["qnet_digest"] != before["metrics"]["qnet_digest"]
    assert f"{tensor}: {count} of 8 channels are taken out" in (tmp_path / "run" / "report.html").read_text()
    with np.load(digits_file) as data:
        np.testing.assert_array_equal(*(reference.run(net, data["x_train"].reshape(-1, 64)) for net in nets))


@pytest.mark.once
@pytest.mark.parametrize("stopped", ["float", "search", "finetune"])
def test_a_stage_goes_on_from_its_checkpoint(stopped, own_model, digits_file, tmp_path):
    """Where it was, not from its start; and not where a setting has changed."""
    config = small(own_model, digits_file, tmp_path / "run", checkpoint_s=0)
    heard = []

    class Watched:
        def __init__(self, last=None):
            self.last = last

        @contextmanager
        def stage(self, name):
            def listen(step, steps, values):
                if name == stopped:
                    heard.append(step)
                    if self.last and step >= self.last:
                        raise KeyboardInterrupt

            yield listen

        def skipped(self, name):
            pass

    for last in (50, 80):
        with pytest.raises(KeyboardInterrupt):
            run(config, Watched(last))
    assert heard == sorted(heard)
    with pytest.raises(KeyboardInterrupt):
        run(small(own_model, digits_file, tmp_path / "run", checkpoint_s=0, seed=1), Watched(1))
    assert heard[-1] < 10


@pytest.mark.parametrize("method", METHODS)
def test_training_stages_do_without_the_test_split(method, own_model, digits_file, tmp_path):
    config = small(own_model, digits_file, tmp_path, method=method)
    stages = pipeline._Run(config, resolve(config.task), Target(weight_rate=8))
    stages.dataset = stages.proven = None  # what is left of the data is the task
    stages.listener, stages.checkpoints, stages.key = ignore, tmp_path, ""
    for stage in (stages.train_float, stages.search, stages.finetune):
        stage(tmp_path)
    assert (tmp_path / "finetune.pt").exists()


class Quiet:
    """Shows nothing."""

    @contextmanager
    def stage(self, name):
        yield ignore

    def skipped(self, name):
        pass


@pytest.mark.once
def test_an_image_autoencoder_is_a_regression(own_model, digits_file, tmp_path):
    with np.load(digits_file) as archive:
        images = {split: archive[f"x_{split}"].reshape(-1, 8, 8)[:150] for split in ("train", "test")}
    arrays = {f"{kind}_{split}": x if kind == "x" else x[:, None] for split, x in images.items() for kind in "xy"}
    np.savez(tmp_path / "images.npz", **arrays)
    steps = {"float_steps": 200, "search_steps": 150, "finetune_steps": 50}
    config = {"task": f"{own_model}:mirror", "data": tmp_path / "images.npz", "out": tmp_path / "run", "rw": 6}
    record = run(make_config({**config, **steps, "estimate": "model"}), Quiet())
    metrics = record["metrics"]
    assert metrics["parity_passed"]
    assert metrics["qnet_accuracy"] is metrics["float_accuracy"] is None
    assert 0 < metrics["qnet_mse"] < 1
    parity = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert parity["simulators"]["csim"]["values"] == 150 * 64
    described = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert described["notes"] == ["4 removed: the hardware gives the values before it"]
    assert [(row["path"], row["kind"]) for row in described["layers"]] == [
        ("0", "Conv2d"),
        ("1", "ReLU"),
        ("2", "Upsample"),
        ("3", "Conv2d"),
    ]
    assert sum(row["weight_share"] or 0 for row in described["layers"]) == pytest.approx(1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "squared error" in page
    assert "4 removed" in page
    net = QNet.load(tmp_path / "run" / "qnet")
    values = net.decode(reference.run(net, images["test"][..., None]))
    error = np.square(1 / (1 + np.exp(-values[..., 0])) - images["test"]).mean()
    assert metrics["qnet_mse"] == pytest.approx(error, rel=1e-5)
    assert error < 1.5 * metrics["float_mse"]
    assert metrics["outputs"] == "values before Sigmoid; apply Sigmoid"
    assert metrics["outputs"] in page
    told = json.loads((tmp_path / "run" / "outputs.json").read_text())
    assert told["outputs"] == [{"name": net.outputs[0], "shape": [8, 8, 1], "apply": "Sigmoid"}]


@pytest.mark.once
@pytest.mark.parametrize("name", ["logistic", "logit"])
def test_one_output_tells_two_classes(name, own_model, digits_file, tmp_path):
    with np.load(digits_file) as archive:
        arrays = {key: archive[key] % 2 if key[0] == "y" else archive[key] for key in archive.files}
    np.savez(tmp_path / "odd.npz", **arrays)
    steps = {"float_steps": 300, "search_steps": 150, "finetune_steps": 200, "estimate": "none"}
    task = {"task": f"{own_model}:{name}", "data": tmp_path / "odd.npz", "out": tmp_path / "run"}
    record = run(make_config(task | steps), Quiet())
    metrics = record["metrics"]
    assert metrics["qnet_accuracy"] > metrics["float_accuracy"] - 0.05 > 0.75
    parity = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert {simulator["accuracy"] for simulator in parity["simulators"].values()} == {metrics["qnet_accuracy"]}
    assert metrics["outputs"].endswith("class: 1 where the value is positive")
    assert ("apply Sigmoid" in metrics["outputs"]) == (name == "logistic")
    three = spoiled_labels(tmp_path / "three.npz", arrays)
    with pytest.raises(InvalidInput, match=r"output is \(1,\), but the data have 3 classes"):
        run(make_config({**task, "data": three}), Quiet())
    with pytest.raises(InvalidInput, match="a softmax of one output is always one"):
        run(make_config({**task, "task": f"{own_model}:certain"}), Quiet())


def spoiled_labels(path, arrays):
    """The same data with a third class."""
    np.savez(path, **(arrays | {"y_train": np.arange(900) % 3}))
    return path


@pytest.mark.once
def test_a_final_function_can_be_kept_in_hardware(own_model, digits_file, tmp_path):
    with np.load(digits_file) as archive:
        images = {split: archive[f"x_{split}"].reshape(-1, 8, 8)[:100] for split in ("train", "test")}
    arrays = {f"{kind}_{split}": x if kind == "x" else x[:, None] for split, x in images.items() for kind in "xy"}
    np.savez(tmp_path / "images.npz", **arrays)
    config = {"task": f"{own_model}:mirror", "data": tmp_path / "images.npz", "out": tmp_path / "run", "rw": 6}
    steps = {"float_steps": 100, "search_steps": 150, "finetune_steps": 20, "estimate": "model", "keep_final": True}
    record = run(make_config(config | steps), Quiet())
    assert record["metrics"]["parity_passed"]
    assert record["metrics"]["outputs"] == "as the model returns them"
    net = QNet.load(tmp_path / "run" / "qnet")
    assert isinstance(net.ops[-1], Table)
    with pytest.raises(InvalidInput, match="keep_final is for regressions"):
        run(make_config({"task": "digits_mlp", "keep_final": True, "out": tmp_path / "classes"}), Quiet())


@pytest.mark.once
def test_several_outputs_are_a_regression_of_all_in_a_row(own_model, digits_file, tmp_path):
    with np.load(digits_file) as archive:
        splits = {split: archive[f"x_{split}"].reshape(-1, 64)[:150] for split in ("train", "test")}
    targets = {
        split: np.stack([x.mean(1), x[:, :32].mean(1), x[:, 32:].mean(1)], 1, dtype=np.float32)
        for split, x in splits.items()
    }
    arrays = {f"x_{split}": x for split, x in splits.items()} | {f"y_{split}": y for split, y in targets.items()}
    np.savez(tmp_path / "means.npz", **arrays)
    steps = {"float_steps": 100, "search_steps": 150, "finetune_steps": 20, "estimate": "trace"}
    task = {"task": f"{own_model}:Heads", "rw": 4}
    record = run(make_config({**task, **steps, "data": tmp_path / "means.npz", "out": tmp_path / "run"}), Quiet())
    assert record["metrics"]["parity_passed"]
    parity = json.loads((tmp_path / "run" / "parity.json").read_text())
    values = {name: simulator["values"] for name, simulator in parity["simulators"].items()}
    assert values == dict.fromkeys(SIMULATORS, 150 * 3)
    net = QNet.load(tmp_path / "run" / "qnet")
    assert [net.shapes[name] for name in net.outputs] == [(1,), (2,)]
    with pytest.raises(
        InvalidInput, match=r"2 outputs and the data one target: give a target for each, real ones .*\(n, 3\)"
    ):
        run(make_config({**task, **steps, "data": digits_file, "out": tmp_path / "classes"}), Quiet())


def halves(digits_file, path, **more):
    """The digits as two inputs: features of the upper half, an image of the lower one."""
    with np.load(digits_file) as archive:
        arrays = {key: archive[key] for key in archive.files}
    for split in ("x_train", "x_test"):
        x = arrays.pop(split)
        arrays |= {f"{split}_0": x[:, :32], f"{split}_1": x[:, 32:].reshape(-1, 1, 4, 8)}
    np.savez(path, **(arrays | more))
    return path


def commanded(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hmq_fpga", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_inputs_from_the_command_line(own_model, digits_file, tmp_path):
    """The whole road, the project again on other data, the page again, and the QNet by itself."""
    folder, data = tmp_path / "run", halves(digits_file, tmp_path / "halves.npz")
    (tmp_path / "run.yaml").write_text(
        f"task: {own_model}:Eyes\ndata: {data}\nout: {folder}\n"
        "float_steps: 600\nsearch_steps: 150\nfinetune_steps: 200\n"
    )
    record = json.loads(commanded("run", tmp_path / "run.yaml", "--json"))
    metrics = record["metrics"]
    assert metrics["parity_passed"]
    assert metrics["qnet_accuracy"] > metrics["float_accuracy"] - 0.1 > 0.65
    parity = json.loads((folder / "parity.json").read_text())
    assert {name: s["mismatches"] for name, s in parity["simulators"].items()} == dict.fromkeys(SIMULATORS, 0)
    net = QNet.load(folder / "qnet")
    assert [(op.name, op.shape) for op in net.inputs] == [("upper", (32,)), ("lower", (4, 8, 1))]
    few = {name: array[:40] * 4 for name, array in np.load(data).items() if name.startswith("x_test")}
    other = halves(digits_file, tmp_path / "few.npz", **few, y_test=np.load(data)["y_test"][:40])
    assert json.loads(commanded("csim", folder, "--data", other, "--json"))["samples"] == 40
    (folder / "report.html").unlink()
    commanded("report", folder)
    page = (folder / "report.html").read_text()
    assert "upper" in page
    assert "lower" in page
    commanded("convert", folder, "--out", tmp_path / "out")
    ours, theirs = (made / "hls" / "firmware" / "defines.h" for made in (tmp_path / "out", folder))
    assert ours.read_text() == theirs.read_text()


def test_a_dictionary_of_outputs_of_two_inputs(own_model, digits_file, tmp_path):
    """One of them a number for each sample behind a sigmoid; targets stand in the order of its keys."""
    with np.load(digits_file) as archive:
        x = {split: archive[f"x_{split}"] for split in ("train", "test")}
    targets = {f"y_{s}": np.stack([x[s].mean(1), x[s][:, :32].mean(1), x[s][:, 32:].mean(1)], 1) for s in x}
    data = halves(digits_file, tmp_path / "halves.npz", **targets)
    steps = {"float_steps": 200, "search_steps": 150, "finetune_steps": 50, "rw": 6}
    config = {"task": f"{own_model}:Named", "data": data, "out": tmp_path / "run", "normalize": True}
    record = run(make_config(config | steps), Quiet())
    metrics = record["metrics"]
    assert metrics["parity_passed"]
    assert metrics["float_mse"] < 0.05
    assert metrics["qnet_mse"] < 2 * metrics["float_mse"]
    told = json.loads((tmp_path / "run" / "outputs.json").read_text())["outputs"]
    assert [(output["shape"], output["apply"]) for output in told] == [([1], "sigmoid"), ([2], None)]


@pytest.mark.once
def test_lazy_and_wrapped_models_are_trained_as_they_are(own_model, digits_file, tmp_path):
    """Their parameters have the names that they have without a wrapper."""
    images = spoiled_images(tmp_path / "images.npz", digits_file)
    steps = {"float_steps": 500, "search_steps": 150, "finetune_steps": 150, "estimate": "none"}
    config = {"task": f"{own_model}:lazy", "data": images, "out": tmp_path / "run"}
    metrics = run(make_config(config | steps), Quiet())["metrics"]
    assert metrics["qnet_accuracy"] > metrics["float_accuracy"] - 0.1 > 0.6
    assert list(torch.load(tmp_path / "run" / "float.pt")) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    again = config | {"weights": tmp_path / "run" / "float.pt", "out": tmp_path / "again"}
    steps["float_steps"] = 0
    assert run(make_config(again | steps), Quiet())["metrics"]["float_accuracy"] == metrics["float_accuracy"]


def spoiled_images(path, file):
    with np.load(file) as archive:
        np.savez(path, **{k: archive[k].reshape(-1, 1, 8, 8) if k[0] == "x" else archive[k] for k in archive.files})
    return path


@pytest.mark.once
@pytest.mark.parametrize("targets", ["classes", "numbers"])
def test_one_number_for_each_sample(targets, own_model, digits_file, tmp_path):
    """Behind a sigmoid and a squeeze, in DataParallel."""
    with np.load(digits_file) as archive:
        arrays = {key: archive[key] % 2 if key[0] == "y" else archive[key] for key in archive.files}
    if targets == "numbers":
        arrays |= {key: arrays[key][:, None].astype(np.float32) for key in ("y_train", "y_test")}
    np.savez(tmp_path / "odd.npz", **arrays)
    steps = {"float_steps": 300, "search_steps": 150, "finetune_steps": 200, "estimate": "none"}
    task = {"task": f"{own_model}:number", "data": tmp_path / "odd.npz", "out": tmp_path / "run"}
    metrics = run(make_config(task | steps), Quiet())["metrics"]
    assert metrics["parity_passed"]
    assert "apply sigmoid" in metrics["outputs"]
    if targets == "classes":
        assert metrics["qnet_accuracy"] > metrics["float_accuracy"] - 0.05 > 0.75
    else:
        assert metrics["qnet_mse"] < metrics["float_mse"] + 0.05 < 0.2
    assert all(name.startswith("body.") for name in torch.load(tmp_path / "run" / "float.pt"))


@pytest.mark.once
def test_a_model_that_returns_the_class(own_model, digits_file, tmp_path):
    """It is trained by the values before its softmax and argmax."""
    steps = {"float_steps": 300, "search_steps": 150, "finetune_steps": 100, "estimate": "none"}
    task = {"task": f"{own_model}:Class", "data": digits_file, "out": tmp_path / "run"}
    metrics = run(make_config(task | steps), Quiet())["metrics"]
    assert metrics["qnet_accuracy"] > metrics["float_accuracy"] - 0.05 > 0.8
    assert "apply argmax" in metrics["outputs"]


@pytest.mark.once
def test_normalized_inputs_reach_everything(own_model, digits_file, tmp_path):
    """Features from 1e-6 to 1e6: refused as they are, learned when normalized, the same in every stage and later."""
    with np.load(digits_file) as archive:
        arrays = {key: archive[key] for key in archive.files}
    scales = np.logspace(-6, 6, 64, dtype=np.float32)
    for split in ("x_train", "x_test"):
        arrays[split] = arrays[split] * scales + scales
    np.savez(tmp_path / "wide.npz", **arrays)
    np.savez(tmp_path / "few.npz", **(arrays | {name: arrays[name][:90] for name in ("x_test", "y_test")}))
    steps = {"float_steps": 300, "search_steps": 150, "finetune_steps": 100, "estimate": "none"}
    config = {"task": f"{own_model}:small", "data": tmp_path / "wide.npz", "out": tmp_path / "run", **steps}
    with pytest.raises(InvalidInput, match=r"inputs: feature 1 .* would not vary in any 8-bit .*: add --normalize"):
        run(make_config(config), Quiet())
    assert not (tmp_path / "run").exists()
    config["normalize"] = True
    record = run(make_config(config), Quiet())
    metrics = record["metrics"]
    assert metrics["parity_passed"]
    assert min(metrics["float_accuracy"], metrics["qnet_accuracy"]) > 0.8
    assert record["config"]["normalize"]
    stored = json.loads((tmp_path / "run" / "normalization.json").read_text())
    first = (arrays["x_test"][0] - np.array(stored["mean"])) / np.array(stored["deviation"])
    written = np.loadtxt(tmp_path / "run" / "hls" / "tb_data" / "tb_input_features.dat")[0]
    np.testing.assert_allclose(written, first, atol=1e-4)
    assert "as normalization.json has them" in (tmp_path / "run" / "report.html").read_text()
    again = compare_again(tmp_path / "run")
    assert {simulator.accuracy for simulator in again.simulators.values()} == {metrics["qnet_accuracy"]}
    few = compare_again(tmp_path / "run", tmp_path / "few.npz")
    assert few.passed
    assert few.simulators["csim"].accuracy > 0.75
    assert run(make_config(config), Quiet())["stages"] == record["stages"]
    baseline, other = (make_config(config | {"out": tmp_path / name}) for name in ("baseline", "other"))
    pipeline.train_baseline(baseline, Quiet())
    assert run(other, Quiet(), shared=baseline.folder)["metrics"]["qnet_digest"] == metrics["qnet_digest"]
    assert json.loads((other.folder / "normalization.json").read_text()) == stored


@pytest.mark.once
def test_samples_of_two_dimensions_are_sequences_to_a_model_over_them(own_model, digits_file, tmp_path):
    with np.load(digits_file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for split in ("x_train", "x_test"):
        arrays[split] = arrays[split].reshape(-1, 8, 8)
    np.savez(tmp_path / "rows.npz", **arrays)
    steps = {"float_steps": 200, "search_steps": 150, "finetune_steps": 50, "estimate": "none"}
    task = {"task": f"{own_model}:over_rows", "data": tmp_path / "rows.npz", "out": tmp_path / "run"}
    record = run(make_config(task | steps), Quiet())
    assert record["metrics"]["parity_passed"]
    assert record["metrics"]["qnet_accuracy"] > 0.5
    net = QNet.load(tmp_path / "run" / "qnet")
    assert net.shapes[net.ops[0].name] == (8, 8)  # length, channels


def test_curves_for_tensorboard(undisturbed):
    """As TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(undisturbed[0] / "tensorboard" / "search")).Reload()
    assert {"loss", "temperature", "rate_actual"} <= set(curves.Tags()["scalars"])
    steps = [point.step for point in curves.Scalars("loss")]
    assert steps == sorted(steps)
    assert steps[-1] == 300
