"""A sweep on real data: undisturbed, killed, and on a cluster that loses a worker; always the same table."""

import csv
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.study import interrupt
from hmq_fpga.study.run.config import missed
from hmq_fpga.study.run.diff import diff
from hmq_fpga.study.sweep import table
from hmq_fpga.study.sweep.grid import RATES, Job, SweepConfig, make_sweep, perform, sweep
from hmq_fpga.study.workers import Processes
from tests.study.workers import die_or_not

STEPS = "float_steps: 200\nsearch_steps: 200\nfinetune_steps: 200\n"
RUNS = [f"hmq-rw{rw}-ra4-seed{seed}" for rw in (8, 40) for seed in (0, 1)]


def command(folder, data, own, *more):
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(
        f"task: {own}:small\ndata: {data}\nout: {folder}\nrw: [8, 40]\nseeds: [0, 1]\nestimate: model\n{STEPS}"
    )
    return [sys.executable, "-m", "hmq_fpga", "sweep", str(config), *more]


def digests(folder):
    """The table, in both forms."""
    return [(folder / name).read_text() for name in ("table.json", "table.csv")]


def stage_states(folder):
    found = {}
    for run in RUNS:
        try:
            record = json.loads((folder / run / "run.json").read_text())
        except FileNotFoundError:
            continue
        found |= {(run, name): stage["state"] for name, stage in record.get("stages", {}).items()}
    return found


def wait_until(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_file, own_model):
    folder = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    done = subprocess.run(
        command(folder, digits_file, own_model, "--jobs", "2", "--json"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr  # R_w = 40 cannot be had
    assert done.stderr == ""  # silence when piped
    return folder, json.loads(done.stdout)


def test_table_has_every_run_and_every_error(undisturbed):
    folder, rows = undisturbed
    assert [row["run"] for row in rows] == RUNS
    assert json.loads((folder / "table.json").read_text())["rows"] == rows
    with (folder / "table.csv").open(newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == RUNS
    for row in rows[:2]:
        assert row["state"] == "done"
        assert row["parity_passed"]
        assert 8 <= row["rw_actual"] <= 8.8
        assert row["qnet_accuracy"] > 0.8
        assert row["model_lut"] > 0
        assert row["bops"] > 0
    for row in rows[2:]:
        assert row["state"] == "failed"
        assert row["error"] == "R_w = 40 cannot be reached with bit-widths 2 … 8: choose from 4 to 16"
        assert row["qnet_accuracy"] is None
    assert not any("seconds" in column for column in rows[0])


@pytest.mark.once
def test_run_of_a_sweep_is_an_ordinary_run(undisturbed, digits_file, own_model, tmp_path):
    """Its baseline was trained once, for all; on its own a run finds nothing to repeat, and anew it is the same."""
    folder, rows = undisturbed
    run = folder / RUNS[0]
    assert (run / "float.pt").read_bytes() == (folder / "float-seed0" / "float.pt").read_bytes()
    record = json.loads((run / "run.json").read_text())
    assert record["stages"]["float"]["seconds"] < 0.2
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.pt")}
    arguments = ["run", f"{own_model}:small", "--data", str(digits_file), "--estimate", "model"]
    config = tmp_path / "config.yaml"
    for out, repeated in ((run, False), (tmp_path / "alone", True)):
        config.write_text(f"task: {own_model}:small\ndata: {digits_file}\nrw: 8\nestimate: model\nout: {out}\n{STEPS}")
        arguments = [sys.executable, "-m", "hmq_fpga", "run", str(config)]
        subprocess.run(arguments, check=True, capture_output=True)
        assert QNet.load(out / "qnet").digest == rows[0]["qnet_digest"], repeated
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.once
def test_killed_sweep_gives_the_same_table(undisturbed, digits_file, own_model, tmp_path):
    """SIGKILL of the command alone: its processes end with it, and what was finished is not repeated."""
    folder = tmp_path / "killed"
    arguments = command(folder, digits_file, own_model, "--jobs", "2")
    for stage in ("search", "parity"):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda stage=stage: stage_states(folder).get((RUNS[0], stage)) in ("running", "done"), process)
        process.kill()
        process.wait()
    record = json.loads((folder / RUNS[0] / "run.json").read_text())
    assert record["stages"]["search"]["state"] == "done"
    before = (folder / RUNS[0] / "search.pt").stat().st_mtime_ns
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert digests(folder) == digests(undisturbed[0])
    assert (folder / RUNS[0] / "search.pt").stat().st_mtime_ns == before


def test_a_request_that_a_callback_loses_is_not_told_about(monkeypatch, capsys):
    asked = threading.Event()
    monkeypatch.setattr(interrupt, "asked", asked)
    monkeypatch.setattr(sys, "unraisablehook", interrupt.lost)

    def told(error):
        def fail(_a, _b):
            raise error

        numbers = (ctypes.c_int * 2)(2, 1)
        compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(fail)
        ctypes.CDLL(None).qsort(numbers, 2, ctypes.sizeof(ctypes.c_int), compare)
        return capsys.readouterr().err

    assert "KeyboardInterrupt" in told(KeyboardInterrupt)
    asked.set()
    assert told(KeyboardInterrupt) == ""
    assert "ValueError" in told(ValueError)


def heeding_interrupts():
    """As in a terminal: what a shell starts in the background ignores them, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.once
def test_interrupted_sweep_says_so_and_leaves_no_process(digits_file, own_model, tmp_path):
    folder = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(folder, digits_file, own_model, "--jobs", "2"),
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=heeding_interrupts,
    )
    wait_until(lambda: "running" in stage_states(folder).values(), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=300)  # its end comes when the last process has closed its standard error
    assert process.returncode == 130, said.decode()
    assert said.decode().strip() == "hmq-fpga: interrupted; the same command goes on where it stopped"
    assert {row["state"] for row in table.rows(folder)} <= {"open", "failed"}


@pytest.mark.once
@pytest.mark.parametrize(("verb", "function"), [("run", "deaf"), ("sweep", "deaf"), ("sweep", "deaf_worker")])
def test_lost_interruption_ends_the_work_nevertheless(verb, function, digits_file, own_model, tmp_path):
    """The exception of the signal is swallowed, here under a bare `except:` of the user's."""
    folder = tmp_path / "out"
    arguments = [verb, f"{own_model}:{function}", "--data", str(digits_file), "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "hmq_fpga", *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    if function == "deaf":
        assert done.returncode == 130
        assert done.stderr.strip() == "hmq-fpga: interrupted; the same command goes on where it stopped"
        assert not list(folder.rglob("float.pt"))
    else:  # the others go on
        assert done.returncode == 1
        assert {row["error"] for row in table.rows(folder)} == {"InterruptedError: stopped by a signal"}


@contextmanager
def started(module, *arguments):
    """A process of Dask's, stopped at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.once
def test_cluster_that_loses_a_worker_gives_the_same_table(undisturbed, digits_file, own_model, tmp_path):
    """A scheduler and two workers on loopback; one is killed while it is at a run."""
    folder, where = tmp_path / "cluster", tmp_path / "scheduler.json"
    local = ["--local-directory", str(tmp_path), "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1"]
    with started("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(where)) as scheduler:
        wait_until(lambda: where.exists() and where.read_text(), scheduler)
        address = json.loads(where.read_text())["address"]
        with started("dask_worker", address, *local) as first, started("dask_worker", address, *local) as second:
            process = subprocess.Popen(
                command(folder, digits_file, own_model, "--cluster", address),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            wait_until(lambda: len(at_work(folder)) == 2, process)
            assert first.poll() is None
            first.kill()
            _, said = process.communicate(timeout=600)
            assert process.returncode == 1, said
            assert second.poll() is None
    assert digests(folder) == digests(undisturbed[0])


def at_work(folder):
    return {run for (run, _), state in stage_states(folder).items() if state == "running"}


def test_any_executor_will_do(undisturbed, digits_file, own_model):
    """Finished runs are only looked at; threads take turns."""
    folder, rows = undisturbed
    settings = {"rw": 8, "seeds": [0, 1], "estimate": "model", "data": digits_file}
    config = make_sweep(
        {"task": f"{own_model}:small", "out": folder, "float_steps": 200, "search_steps": 200, "finetune_steps": 200}
        | settings
    )
    before = digests(folder)
    with ThreadPoolExecutor(2) as executor:
        assert sweep(config, executor=executor) == rows[:2]
    assert digests(folder) != before  # the table is of this grid


def test_page_is_rebuilt_from_what_is_stored(undisturbed):
    folder, _ = undisturbed
    before = digests(folder), (folder / "report.html").read_bytes()
    for path in [folder / "report.html", folder / "table.json", *folder.glob("figures/*")]:
        path.unlink()
    subprocess.run([sys.executable, "-m", "hmq_fpga", "report", str(folder)], check=True, capture_output=True)
    assert (digests(folder), (folder / "report.html").read_bytes()) == before
    assert (folder / "figures" / "accuracy_rw.png").exists()


def test_diff_says_what_changed(undisturbed):
    folder, rows = undisturbed
    a, b = (folder / run for run in RUNS[:2])
    found = diff(a, b)
    assert found["settings"] == {"seed": [0, 1]}
    assert found["figures"]["qnet_accuracy"] == [row["qnet_accuracy"] for row in rows[:2]]
    assert not found["same_network"]
    assert found["resources"]["model (hmq_fpga)"]["lut"] == [row["model_lut"] for row in rows[:2]]
    same = diff(a, a)
    assert same["same_network"]
    assert [same[key] for key in ("settings", "formats", "layers", "resources")] == [{}] * 4
    with pytest.raises(InvalidInput, match="was not finished"):
        diff(a, folder / "float-seed0")
    done = subprocess.run([sys.executable, "-m", "hmq_fpga", "diff", str(a), str(b)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed" in done.stdout


def test_one_value_is_a_list_of_it():
    config = make_sweep({"task": "digits_mlp", "rw": 8, "seed": 3, "method": "uniform", "estimate": "none"})
    assert config == SweepConfig(
        task="digits_mlp", rw=(8.0,), seeds=(3,), methods=("uniform",), settings={"estimate": "none"}
    )
    assert list(config.runs()) == ["uniform-rw8-ra4-seed3"]


def test_bounds_that_are_missed():
    kept = {"rw_target": 8.0, "rw_actual": 8.2, "bops_target": 100.0, "bops": 100, "luts_target": None}
    assert not missed(kept)
    assert missed(kept | {"rw_actual": 7.9}) == {"rw": 7.9}
    assert missed(kept | {"luts_target": 10, "luts_actual": 11, "bops": 101}) == {"bops": 101, "luts": 11}


def test_bounds_of_a_sweep():
    config = make_sweep({"task": "digits_mlp", "bops": [2e5, 1.5e6], "weight_bits": 3e4})
    assert [(name, run.rw, run.weight_bits, run.bops) for name, run in config.runs().items()] == [
        ("hmq-weight_bits30000-bops200000-ra4-seed0", None, 3e4, 2e5),
        ("hmq-weight_bits30000-bops1500000-ra4-seed0", None, 3e4, 1.5e6),
    ]
    assert [run.rw for run in make_sweep({"task": "digits_mlp"}).runs().values()] == list(RATES)


def test_a_process_that_dies_fails_its_own_run_only(monkeypatch):
    monkeypatch.setattr("hmq_fpga.study.sweep.grid._do", die_or_not)
    jobs = [Job(name=name, config=name) for name in ("good", "bad", "fine", "last")]
    with Processes(2).opened() as workers:
        ended = dict(perform(jobs, workers, None))
    assert ended == {"good": None, "bad": "its process died; out of memory?", "fine": None, "last": None}
