"""A grid of runs: one float baseline per seed, shared; each run in an ordinary folder; one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hmq_fpga.deploy.toolchain import GXX, ToolFailed
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study import interrupt
from hmq_fpga.study.monitor import Bars
from hmq_fpga.study.pages.sweep_page import write_sweep_page
from hmq_fpga.study.run.config import BOUNDS, RunConfig, labelled, make_config, read_settings
from hmq_fpga.study.run.pipeline import check_run, require_device, run, train_baseline
from hmq_fpga.study.run.stages import check_ours
from hmq_fpga.study.sweep import table
from hmq_fpga.study.workers import Given, Processes, Workers, cluster, cores, exclusive

RATES = (4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 15.5)
POLL_S = 0.5  # between two looks at the runs
PATIENCE_S = 60.0  # for a process of an earlier sweep to leave a run's folder
ATTEMPTS = 2  # at a run whose process died


class SweepConfig(BaseModel):
    """What to compare.

    Attributes:
        task: a name that `hmq-fpga tasks` lists, or `FILE.py:FUNCTION`.
        rw, weight_bits, bops, luts, ebops: bounds, as of a run; where none is given, seven R_w.
        ra: targets R_a.
        methods: search methods.
        seeds: of everything random.
        out: folder of the sweep.
        settings: of every run, as in `RunConfig`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    rw: tuple[float, ...] = ()
    weight_bits: tuple[float, ...] = ()
    bops: tuple[float, ...] = ()
    luts: tuple[float, ...] = ()
    ebops: tuple[float, ...] = ()
    ra: tuple[float, ...] = Field(default=(4.0,), min_length=1)
    methods: tuple[str, ...] = Field(default=("hmq",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    out: Path | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator(*BOUNDS, "ra", "methods", "seeds", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        """Without repetitions; one value stands for a list of it."""
        return tuple(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else (value,)

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.out or RunConfig(task=self.task).folder.parent / "sweep"

    def runs(self) -> dict[str, RunConfig]:
        """The configuration of each run, by the name of its folder in the sweep's, in the order of the table.

        Raises:
            InvalidInput: naming the setting that is wrong.
        """
        base, settings = self.folder.resolve(), dict(self.settings)
        if data := settings.get("data"):
            settings["data"] = Path(data).resolve()  # workers may have another working directory
        given = {name: values for name in BOUNDS if (values := getattr(self, name))} or {"rw": RATES}
        bounds = [dict(zip(given, values, strict=True)) for values in product(*given.values())]
        names = {
            f"{method}-{labelled(bound)}-ra{ra:g}-seed{seed}": {"method": method, **bound, "ra": ra, "seed": seed}
            for method, bound, ra, seed in product(self.methods, bounds, self.ra, self.seeds)
        }
        return {
            name: make_config({"task": _task(self.task), **settings, **point, "out": base / name})
            for name, point in names.items()
        }


def make_sweep(settings: Mapping[str, Any]) -> SweepConfig:
    """A checked configuration, of the sweep's own settings and of those of its runs.

    Raises:
        InvalidInput: naming the setting that is wrong.
    """
    plural = {"method": "methods", "seed": "seeds"}
    settings = {plural.get(key, key): value for key, value in settings.items()}
    own = {key: settings[key] for key in SweepConfig.model_fields if key in settings}
    rest = {key: value for key, value in settings.items() if key not in own}
    try:
        config = SweepConfig(**own, settings=rest)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"setting {first['loc'][0]!r}: {first['msg']} (got {first['input']!r})") from error
    config.runs()
    return config


def load_sweep(path: Path, overrides: Mapping[str, Any]) -> SweepConfig:
    """A `CONFIG.yaml` of a run, whose `rw`, `ra`, `methods` and `seeds` may be lists, with settings on top.

    Raises:
        InvalidInput: when it cannot be read, or naming the setting that is wrong.
    """
    return make_sweep({**read_settings(path), **overrides})


class SweepMonitor(Protocol):
    """Shows the progress of a sweep."""

    def begin(self, folder: Path, names: list[str]) -> None:
        """Learn of the runs."""

    def look(self, working: list[str]) -> None:
        """Learn every half second or so which runs have been handed to workers."""

    def ended(self, name: str, error: str | None) -> None:
        """Learn that a run has ended."""


@dataclass(frozen=True)
class Job:
    """A run, or with `shared` None a float baseline; `after` is done before it."""

    name: str
    config: RunConfig
    shared: Path | None = None
    after: str | None = None


def sweep(
    config: SweepConfig,
    *,
    jobs: int = 1,
    address: str | None = None,
    executor: Executor | None = None,
    monitor: SweepMonitor | None = None,
) -> list[dict[str, Any]]:
    """Do all runs that have not been done, and write `table.json`, `table.csv`, figures and the page.

    A run that fails stands in the table with its error in one line, and the others go on.

    Args:
        config: what to compare.
        jobs: processes of this machine. They import the main module: a script calls this under
            `if __name__ == "__main__":`.
        address: of a Dask scheduler, in place of these processes. Its workers see the same files.
        executor: any other executor in their place; no two runs share a process at the same time.
        monitor: hears how it goes.

    Returns:
        The rows of the table; see `table.rows`.

    Raises:
        InvalidInput: for what would fail every run, before anything is written.
    """
    runs = config.runs()
    first = next(iter(runs.values()))
    if address is None and executor is None:
        require_device(first.device)
    check_run(first.model_copy(update={"device": "cpu"}), config.methods)
    GXX.require()
    folder = config.folder
    check_ours(folder, table.SWEEP, "sweep")
    with _workers(jobs, address, executor) as workers, _alone(folder):
        errors: dict[str, str] = {}
        content = {
            "settings": config.model_dump(mode="json", exclude={"out"}),
            "runs": [
                {"folder": name, "config": run.model_dump(mode="json", exclude={"out"})} for name, run in runs.items()
            ],
            "errors": errors,
        }
        table.write_sweep(folder, content)
        if monitor:
            monitor.begin(folder, list(runs))
        for name, error in perform(_jobs(folder.resolve(), runs), workers, monitor):
            if name not in runs:
                continue
            if error:
                errors[name] = error
                table.write_sweep(folder, content)
            table.write_table(folder)
            if monitor:
                monitor.ended(name, error)
        found = table.write_table(folder)
        write_sweep_page(folder)
    return found


def _jobs(folder: Path, runs: Mapping[str, RunConfig]) -> list[Job]:
    """The baselines of all seeds, then the runs."""
    baselines = {run.seed: f"float-seed{run.seed}" for run in runs.values()}
    first = {run.seed: run for run in reversed(list(runs.values()))}
    return [Job(name, first[seed].model_copy(update={"out": folder / name})) for seed, name in baselines.items()] + [
        Job(name, run, shared=folder / baselines[run.seed], after=baselines[run.seed]) for name, run in runs.items()
    ]


def perform(jobs: list[Job], workers: Workers, monitor: SweepMonitor | None) -> Iterator[tuple[str, str | None]]:
    """Have the jobs done; yields each name as it ends, with its error."""
    done: set[str] = set()
    deaths: Counter[str] = Counter()
    working: dict[Future[str | None], Job] = {}
    waiting = list(jobs)
    while waiting or working:
        interrupt.check()
        room = (workers.limit or len(jobs)) - len(working)
        ready = [job for job in waiting if job.after is None or job.after in done][:room]
        if suspects := [job for job in waiting if deaths[job.name]]:  # alone, to know whose process dies
            ready = [] if working else suspects[:1]
        for job in ready:
            waiting.remove(job)
            working[workers.submit(_do, job.config, job.shared)] = job
        if monitor:
            monitor.look([job.name for job in working.values()])
        for future in wait(working, timeout=POLL_S, return_when=FIRST_COMPLETED).done:
            job = working.pop(future)
            try:
                error = future.result()
            except BrokenExecutor:
                deaths[job.name] += 1
                if deaths[job.name] < ATTEMPTS:
                    waiting.insert(0, job)
                    continue
                error = "its process died; out of memory?"
            except Exception as failure:  # of the executor: every run is to have its line
                error = _line(failure)
            done.add(job.name)
            yield job.name, error


def _do(config: RunConfig, shared: Path | None) -> str | None:
    """Do a job in this process; returns the error in one line, or None."""
    with exclusive(), Bars(config.folder / "tensorboard", quiet=True) as bars:
        try:
            if shared is None:
                train_baseline(config, bars, patience_s=PATIENCE_S)
            else:
                run(config, bars, shared=shared, patience_s=PATIENCE_S)
        except Exception as error:  # the other runs go on
            return _line(error)
    return None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, (InvalidInput, ToolFailed, FloatingPointError))
    return text if known and text else f"{type(error).__name__}: {text}"


def _workers(jobs: int, address: str | None, executor: Executor | None) -> AbstractContextManager[Workers]:
    if executor is not None:
        return nullcontext(Given(executor))
    if address is not None:
        return cluster(address)
    if jobs < 1:
        raise InvalidInput(f"--jobs {jobs}: give at least 1; this machine has {cores()} cores")
    return Processes(jobs).opened()


def _task(name: str) -> str:
    """The task's name, with the full path of a user's file."""
    file, separator, function = name.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if separator else name


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise InvalidInput(f"{folder}: another sweep is running here; wait for it or give another --out") from None
