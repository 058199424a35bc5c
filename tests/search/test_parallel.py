"""Two processes with half of each batch do what one does with the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmq_fpga.search import parallel
from hmq_fpga.search.methods import METHODS
from tests.search.parallel_job import job

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "-m", "tests.search.parallel_job", folder],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "error").read_text() == "batches of 63 samples cannot be split evenly over 2 processes"
    return job(tmp_path_factory.mktemp("one")), *(torch.load(folder / f"{number}.pt") for number in range(2))


def farthest(made, other):
    """Largest difference of two state dicts, and whether all else in them is the same."""
    tensors = {name: value for name, value in made.items() if torch.is_tensor(value)}
    same = all(other[name] == value for name, value in made.items() if name not in tensors)
    return max(float((value - other[name]).abs().max()) for name, value in tensors.items()), same


@pytest.mark.parametrize("what", ["float", "normed", "finetune", *METHODS])
def test_both_processes_have_the_same(what, results):
    _, first, second = results
    assert farthest(first[what], second[what]) == (0, True)


@pytest.mark.parametrize("what", ["float", "finetune", *METHODS])
def test_two_processes_find_what_one_does(what, results):
    one, two, _ = results
    difference, same = farthest(one[what], two[what])
    assert same
    if what not in ("hmq", "zeroq"):  # where levels are learnt, a rounding flips; and BatchNorm sees half a batch
        assert difference < 1e-12
    if what in METHODS:
        assert 10 <= two[what]["rate"] <= 11


def test_both_go_on_from_the_firsts_checkpoint(results):
    for made in results:
        assert farthest(made["continued"], made["float"]) == (0, True)


def test_statistics_of_parts_are_averaged(results):
    one, two, _ = results
    assert farthest(one["normed"], two["normed"])[0] < 0.05


def test_one_process_alone(monkeypatch):
    batch = torch.arange(6)
    assert torch.equal(parallel.part(batch), batch)
    assert parallel.from_first("x") == "x"
    parallel.average([batch])
    assert parallel.own_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallel.own_device("cuda") == "cuda:1"
    with pytest.raises(ValueError, match=r"'cuda:0': 2 processes need a GPU each; give cuda"):
        parallel.own_device("cuda:0")
