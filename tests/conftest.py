"""Settings that hold for all tests."""

import os

import pytest
from hypothesis import settings

settings.register_profile("hmq", deadline=None)  # other processes may have the machine
if not os.environ.get("CI"):  # there hypothesis chooses its own: the same examples every time
    settings.load_profile("hmq")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI every tool and every data set is there: a test that is skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {call.excinfo.value}"
    return report
