"""Settings that hold for all tests."""

import os

import pytest
from hypothesis import settings

from tests import outside

settings.register_profile("hmq", deadline=None)  # other processes may have the machine
if not os.environ.get("CI"):  # there hypothesis chooses its own: the same examples every time
    settings.load_profile("hmq")


def pytest_configure(config):
    """The core environment is one without QKeras, or its tests would prove nothing."""
    if os.environ.get(outside.CORE) and outside.has_qkeras():
        raise pytest.UsageError(f"{outside.CORE} is set, but the extra qkeras is installed here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI every tool is there: a test that is skipped has failed, unless it is one that may be left out."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = str(call.excinfo.value)
        if not reason.startswith(outside.LEFT_OUT):
            report.outcome = "failed"
            report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """One line on what was left out, from all worker processes, below pytest's own."""
    result = yield
    skipped = terminalreporter.stats.get("skipped", [])
    line = outside.summary(report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple))
    if line:
        terminalreporter.write_line(line)
    return result
