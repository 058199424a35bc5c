"""The wheel works where there is no repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKED = ("hmq_fpga", "pyproject.toml", "README.md", "LICENSE")
BUDGET = "task: digits_mlp\nfloat_steps: 300\nsearch_steps: 150\nfinetune_steps: 100\nestimate: none\n"


def _do(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source archive, as for an index; in a copy, since setuptools writes into the source."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    _do(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=source)
    (archive,) = (source / "dist").glob("hmq_fpga-*.tar.gz")
    assert archive.stat().st_size < 1_000_000
    (wheel,) = (source / "dist").glob("hmq_fpga-*-py3-none-any.whl")
    return wheel


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = (path.relative_to(ROOT) for path in (ROOT / "hmq_fpga").rglob("*") if path.is_file())
    expected = {str(path) for path in files if "__pycache__" not in path.parts}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hmq_fpga/")}
    assert found == expected
    assert {Path(name).suffix for name in found} > {".jinja", ".css", ".js"}
    assert "hmq_fpga/py.typed" in found


def test_the_demo_runs_without_the_repository(wheel, tmp_path):
    """In an empty environment that gets the wheel and sees the dependencies of this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    _do(
        *(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"),
        *("--no-deps", "--no-index", str(wheel)),
        cwd=tmp_path,
    )
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = _do(python, "-c", "import hmq_fpga; print(hmq_fpga.__file__)", cwd=tmp_path)
    assert Path(home.strip()).is_relative_to(packages)
    (tmp_path / "small.yaml").write_text(BUDGET)
    out = _do(tmp_path / "env" / "bin" / "hmq-fpga", "run", "small.yaml", "--json", cwd=tmp_path)
    assert json.loads(out)["metrics"]["parity_passed"]
    (page,) = (tmp_path / "hls_projects").rglob("report.html")
    assert "<style>" in page.read_text()
