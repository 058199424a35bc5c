"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


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
    from hmq_fpga.study.run import load_config

    (text,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml", {})
    assert (config.rw, config.bits, config.io_type) == (10, (2, 3, 4, 6, 8), "io_stream")
