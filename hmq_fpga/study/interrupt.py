"""A request to stop: an exception at once, and a mark for where that exception is lost.

Python raises it between any two instructions of the main thread. Within a callback of C code, or under somebody's bare
`except:` (`copyreg` of the standard library has one), it ends there and the run would go on.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

asked = threading.Event()


def stop(_number: int, _frame: FrameType | None) -> None:
    """Stop the run: a handler of signals."""
    asked.set()
    raise KeyboardInterrupt


def lost(unraisable: Any) -> None:
    """Say nothing of an exception of `stop` that ended in a callback, as `check` finds its mark.

    A `sys.unraisablehook`.
    """
    if not (asked.is_set() and isinstance(unraisable.exc_value, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)


def check() -> None:
    """Raise `KeyboardInterrupt` where the run goes on though it has been asked to stop."""
    if asked.is_set():
        raise KeyboardInterrupt
