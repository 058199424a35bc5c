"""A request to stop: an exception at once, and a mark for where that exception is lost.

Python raises it between any two instructions of the main thread. Within a callback of C code, or under somebody's bare
`except:` (`copyreg` of the standard library has one), it ends there and the run would go on.
"""

from __future__ import annotations

import threading
from types import FrameType

asked = threading.Event()


def stop(_number: int, _frame: FrameType | None) -> None:
    """Stop the run: a handler of signals."""
    asked.set()
    raise KeyboardInterrupt


def check() -> None:
    """Raise `KeyboardInterrupt` where the run goes on though it has been asked to stop."""
    if asked.is_set():
        raise KeyboardInterrupt
