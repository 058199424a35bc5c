"""Skips in continuous integration: a missing tool fails, outside data are left out and counted, with workers too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
from tests import outside

outside.BESIDE = outside.Path("nowhere")

@pytest.mark.parametrize("i", range(3))
def test_data(i):
    assert outside.data("a.npz").read_text() == "a"

def test_reports():
    outside.reports("vivado_hls")

def test_tool():
    pytest.skip("no frobnicate here")

def test_other():
    pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs the tests above with our settings."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS)

    def run(*options, **variables):
        ours = {"CI": "true", "PYTHONPATH": str(ROOT), **variables}
        others = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith(("HMQ_FPGA_", "PYTEST"))}
        command = (sys.executable, "-m", "pytest", "-rfs", "-p", "no:cacheprovider", "test_it.py", *options)
        return subprocess.run(command, cwd=tmp_path, env=others | ours, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_missing_tools_fail_and_missing_data_are_left_out(run, options):
    done = run(*options)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed, 4 skipped" in done.stdout
    assert "skipped, which CI does not allow: no frobnicate here" in done.stdout
    line = done.stdout.splitlines()[-2]  # above pytest's last
    assert set(line.removeprefix("left out: ").split("; ")) == {
        "3 tests of real data: HMQ_FPGA_DATA names their folder",
        "1 test of reports of real runs: HMQ_FPGA_REPORTS names their folder",
    }


def test_where_the_variable_is_set_the_tests_run(run, tmp_path):
    (tmp_path / "a.npz").write_text("a")
    done = run(HMQ_FPGA_DATA=str(tmp_path), HMQ_FPGA_REPORTS=str(tmp_path))
    assert "2 failed, 4 passed" in done.stdout, done.stdout
    assert "vivado_hls is missing, though the folder of reports of real runs is given (HMQ_FPGA_REPORTS)" in done.stdout
    assert "left out" not in done.stdout


def test_outside_ci_a_missing_tool_is_a_skip(run):
    assert "1 passed, 5 skipped" in run(CI="").stdout
