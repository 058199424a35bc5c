import os
import signal
import sys
import time

import pytest

from hmq_fpga.deploy import toolchain
from hmq_fpga.deploy.toolchain import Tool, ToolFailed, ToolMissing, run
from hmq_fpga.ir.errors import InvalidInput

TOOL = Tool(program="frobnicate", variable="HMQ_FPGA_FROB", purpose="frobnicate", remedy="install it")
SLEEPER = "import time; time.sleep(600)"
# A program that ignores the request to stop, with a child that does too; the child's number goes to the log
STUBBORN = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); {SLEEPER}"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(toolchain, "GRACE_S", 0.5)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_missing_tool_is_named_with_its_remedy(monkeypatch):
    monkeypatch.delenv("HMQ_FPGA_FROB", raising=False)
    assert TOOL.find() is None
    with pytest.raises(
        ToolMissing, match="frobnicate not found, needed to frobnicate: install it, or set HMQ_FPGA_FROB"
    ):
        TOOL.require()


def test_the_variable_comes_before_path(monkeypatch, tmp_path):
    for folder in ("on_path", "named"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "frobnicate").write_text("#!/bin/sh\n")
        (tmp_path / folder / "frobnicate").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"))
    assert TOOL.require() == str(tmp_path / "on_path" / "frobnicate")
    monkeypatch.setenv("HMQ_FPGA_FROB", str(tmp_path / "named" / "frobnicate"))
    assert TOOL.require() == str(tmp_path / "named" / "frobnicate")


def test_output_and_errors_go_to_the_log_line_by_line(tmp_path):
    code = "import os; [os.write(*w) for w in ((1, b'one\\n'), (2, b'two\\n'), (1, b'three'))]; os._exit(3)"
    lines: list[str] = []
    assert run(python(code), cwd=tmp_path, log=tmp_path / "logs" / "run.log", on_line=lines.append) == 3
    assert lines == ["one", "two", "three"]
    assert (tmp_path / "logs" / "run.log").read_text() == "one\ntwo\nthree"


def test_lines_come_while_the_program_runs(tmp_path):
    (tmp_path / "wait").touch()
    code = "import pathlib, time\nprint('go', flush=True)\nwhile pathlib.Path('wait').exists(): time.sleep(0.01)\n"
    assert run(python(code), cwd=tmp_path, log=tmp_path / "log", on_line=lambda _: (tmp_path / "wait").unlink()) == 0


def test_no_shell_and_no_input(tmp_path):
    code = "import sys; print(sys.argv[1:], repr(sys.stdin.read()))"
    arguments = ["; touch pwned", "$(touch pwned)", "a b"]
    assert run([*python(code), *arguments], cwd=tmp_path, log=tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == f"{arguments} ''\n"
    assert not (tmp_path / "pwned").exists()


def test_the_environment_is_the_given_one(tmp_path):
    code = "import os; print(os.environ.get('A'), os.environ.get('HOME'))"
    assert run(python(code), cwd=tmp_path, log=tmp_path / "log", env={"A": "1"}) == 0
    assert (tmp_path / "log").read_text() == "1 None\n"


def test_a_signal_shows_in_the_exit_code(tmp_path):
    assert run(python("import os; os.kill(os.getpid(), 11)"), cwd=tmp_path, log=tmp_path / "log") == -signal.SIGSEGV


def test_a_program_that_cannot_be_started(tmp_path):
    with pytest.raises(ToolMissing, match="no-such-program: cannot be started in"):
        run(["no-such-program"], cwd=tmp_path, log=tmp_path / "log")


def test_the_time_limit_ends_the_whole_group(tmp_path):
    start = time.monotonic()
    with pytest.raises(ToolFailed, match=r"stopped at the time limit of 1\.5 s; its log is .*/log"):
        run(python(STUBBORN), cwd=tmp_path, log=tmp_path / "log", time_limit_s=1.5)
    assert time.monotonic() - start < 30
    assert is_gone(int((tmp_path / "log").read_text()))
    assert not issubclass(ToolFailed, InvalidInput), "a crashed tool is no bad input"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_ends_the_whole_group(error, tmp_path):
    def on_line(line: str) -> None:
        raise error

    with pytest.raises(error):
        run(python(STUBBORN), cwd=tmp_path, log=tmp_path / "log", on_line=on_line)
    assert is_gone(int((tmp_path / "log").read_text()))


def test_ctrl_c_ends_the_whole_group(tmp_path):
    """In a process of its own: the signal reaches only the caller, since the program has its own session."""
    script = (
        "import pathlib, sys\nfrom hmq_fpga.deploy import toolchain\ntoolchain.GRACE_S = 0.5\n"
        f"toolchain.run([sys.executable, '-c', {STUBBORN!r}], cwd=pathlib.Path('.'), log=pathlib.Path('log'), "
        "on_line=lambda line: print(line, flush=True))\n"
    )
    reader, writer = os.pipe()
    caller = os.posix_spawn(
        sys.executable,
        python(f"import os; os.chdir({str(tmp_path)!r})\n{script}"),
        {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)],
        setsigdef=[signal.SIGINT],  # a shell's background job ignores it
    )
    os.close(writer)
    with os.fdopen(reader) as output:
        child = int(output.readline())
        os.kill(caller, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(caller, 0)[1]) != 0
    assert is_gone(child)


def test_what_a_program_leaves_in_the_background_is_ended_too(tmp_path):
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).pid)"
    assert run(python(code), cwd=tmp_path, log=tmp_path / "log") == 0
    assert is_gone(int((tmp_path / "log").read_text()))
