"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import readme_table
from tests.outside import needs_qkeras

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), ROOT / "hls_projects" / "README.md", *ROOT.glob("notebooks/*.ipynb")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@needs_qkeras
def test_python_program(tmp_path):
    (program,) = blocks("python")
    (tmp_path / "hls_projects").mkdir()
    check = "\nassert parity.passed and parity.simulators['csim'].values == 5400, parity\n"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(
        [sys.executable, "-c", program + check],
        cwd=tmp_path,
        env=one_thread,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in program.splitlines() if line and "import" not in line]
    assert len(lines) <= 15


def test_config_file(tmp_path):
    from hmq_fpga.study.run.config import load_config

    (text,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml", {})
    assert (config.rw, config.bits, config.io_type) == (10, (2, 3, 4, 6, 8), "io_stream")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_table_of_operations_is_the_one_that_reads_them():
    """Else run `python -m tests.readme_table`."""
    assert readme_table.PLACE.search(README.read_text()).group() == readme_table.table()
