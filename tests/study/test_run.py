"""The whole road on real data: an undisturbed run, and one that is killed in every stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import Scheme

STAGES = ("float", "search", "finetune", "freeze", "convert", "parity", "resources")


def command(folder, data, own, *more):
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(
        f"task: {own}:small\ndata: {data}\nout: {folder}\nrw: 10\n"
        "float_steps: 300\nsearch_steps: 300\nfinetune_steps: 300\n"
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
    for name in ("run.json", "scheme.json", "qnet", "qkeras", "hls/firmware/defines.h", "parity.json", "report.html"):
        assert (folder / name).exists(), name
    metrics = record["metrics"]
    assert metrics["float_accuracy"] > 0.85
    assert metrics["qnet_accuracy"] > 0.85
    assert 10 <= metrics["rw_actual"] <= 11
    assert set(metrics["seconds"]) == set(STAGES)
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["passed"]
    assert parity["samples"] == 200
    for simulator in ("qkeras", "csim"):
        assert parity["simulators"][simulator]["values"] == 2000
        assert parity["simulators"][simulator]["mismatches"] == 0
        assert parity["simulators"][simulator]["accuracy"] == metrics["qnet_accuracy"]
    tensors = Scheme.load(folder / "scheme.json").tensors
    assert [t.kind for t in tensors] == ["input", "weight", "activation", "weight"]
    assert list((folder / "tensorboard" / "search").iterdir())


def test_finished_run_is_not_repeated(undisturbed, digits_file, own_model):
    folder, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.npz")} | {
        p: p.stat().st_mtime_ns for p in folder.glob("*.pt")
    }
    assert subprocess.run(command(folder, digits_file, own_model), capture_output=True, check=False).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_killed_in_every_stage_gives_the_same_network(undisturbed, digits_file, own_model, tmp_path):
    folder = tmp_path / "killed"
    for stage in STAGES:
        process = subprocess.Popen(
            command(folder, digits_file, own_model),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and states(folder).get(stage) != "running":
            assert time.monotonic() < deadline, f"stage {stage} never began"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = subprocess.run(command(folder, digits_file, own_model), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert QNet.load(folder / "qnet").digest == QNet.load(undisturbed[0] / "qnet").digest
    assert not list(folder.glob(".new-*"))


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
    """A weight changed behind our back: csim says so by its exit code and names the tensor."""
    folder = tmp_path / "broken"
    shutil.copytree(undisturbed[0], folder)
    header = next((folder / "hls" / "firmware" / "weights").glob("b*.h"))
    text = header.read_text()
    start = text.index("{") + 1
    end = min(i for i in (text.find(",", start), text.find("}", start)) if i > 0)
    header.write_text(text[:start] + "0" + text[end:])
    arguments = [sys.executable, "-m", "hmq_fpga", "csim", str(folder), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    csim = json.loads(done.stdout)["simulators"]["csim"]
    assert csim["mismatches"] > 0
    assert Path(folder / "parity.json").exists()


def test_convert_needs_no_torch(undisturbed, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['hmq-fpga', 'convert', {str(undisturbed[0])!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "from hmq_fpga.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (folder / "hls" / "firmware" / "defines.h" for folder in (tmp_path / "out", undisturbed[0]))
    assert ours.read_text() == theirs.read_text()
