"""Where the runs of a sweep are done: processes of this machine, or a Dask cluster, both as `Executor`s.

Light to import: a new process sets its signals up before it loads any framework.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Protocol

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study import interrupt

CONNECT_S = 10  # to reach a scheduler
GRACE_S = 10.0  # for tools that a worker has started, when the sweep has ended without it
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_busy = threading.Lock()


class Workers(Protocol):
    """What does the work.

    Attributes:
        limit: how many calls to submit at a time; None for all.
    """

    limit: int | None

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a call done."""


class Processes:
    """Processes of this machine, which end with this one, however it ends.

    Each is told by its environment to use its share of the cores; what the user has set there stays. A process that
    dies breaks the futures of those in work; the next call gets new processes.
    """

    def __init__(self, jobs: int) -> None:
        self.limit: int | None = jobs
        self._executor: Executor | None = None

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a call done in one of the processes."""
        with _signals_kept_back():  # from a new process until it has set its signals up
            try:
                return self._executor_now().submit(_in_process, function, *arguments)
            except BrokenExecutor:
                self._executor = None
                return self._executor_now().submit(_in_process, function, *arguments)

    def _executor_now(self) -> Executor:
        if self._executor is None:
            spawn = multiprocessing.get_context("spawn")  # forked threads of a framework would hang
            self._executor = ProcessPoolExecutor(self.limit, mp_context=spawn, initializer=_begin)
        return self._executor

    @contextmanager
    def opened(self) -> Iterator[Workers]:
        """Be there for calls; whatever is still at work at the end is stopped."""
        before = {process.pid for process in multiprocessing.active_children()}
        try:
            with _environment({name: str(max(1, cores() // (self.limit or 1))) for name in _THREADS}):
                yield self
        except BaseException:
            for process in multiprocessing.active_children():
                if process.pid not in before:
                    process.terminate()
            raise
        finally:
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)


class Given:
    """Any other executor, which sees the same files as this process."""

    limit: int | None = None

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a call done by the executor."""
        return self._executor.submit(function, *arguments)


@contextmanager
def cluster(address: str) -> Iterator[Workers]:
    """Workers of a Dask cluster, by the address of its scheduler.

    Raises:
        InvalidInput: when `distributed` is not installed or the scheduler does not answer.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise InvalidInput("--cluster needs Dask: pip install hmq-fpga[cluster]") from error
    try:
        client = Client(address, timeout=f"{CONNECT_S}s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--cluster {address}: no scheduler answers there: {error}") from error
    with client, client.get_executor() as executor:
        yield Given(executor)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def exclusive() -> Iterator[None]:
    """One run at a time in a process: they share the global state of the frameworks."""
    with _busy:
        yield


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    resource_tracker.ensure_running()  # its own start would let them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """Prepare a process: a request to stop ends its run, and so does the end of its parent."""
    sys.unraisablehook = interrupt.lost
    for number in _STOPPING:
        signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _stop(number: int, frame: FrameType | None) -> None:
    """Interrupt the run, once: it cleans up after itself. Without one the process ends."""
    if not _busy.locked():
        raise SystemExit(130)
    if not interrupt.asked.is_set():
        interrupt.stop(number, frame)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(GRACE_S)
    os._exit(130)


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():  # nobody to tell
            os._exit(130)
        raise InterruptedError("stopped by a signal") from None
    finally:
        interrupt.asked.clear()
