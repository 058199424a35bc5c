"""Where the time of a whole run goes: `hmq-fpga run digits_mlp --rw 8` in a fresh folder, imports included.

    python benchmarks/stages.py --repeats 3

Each run is a process of its own. Times are elapsed and processor time, compilers included; of several runs the median
of each. Parts are exclusive: an import within a conversion counts as import alone.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRAINING = ("float", "search", "finetune")
IMPORTED = (
    "torch",
    "sklearn",
    "scipy",
    "tensorflow",
    "keras",
    "qkeras",
    "hls4ml",
    "alkaid",
    "matplotlib",
    "tensorboardX",
)
BEFORE, AFTER = "before the stages", "after the stages"
COMMANDS = (("--help",), ("doctor",))
Seconds = tuple[float, float]  # elapsed, processor


def now() -> Seconds:
    """Elapsed and processor time, children that have ended included."""
    times = os.times()
    return time.perf_counter(), sum(times[:4])


class Clock:
    """Exclusive times: what is timed within a part is not the part's."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[float]] = {}
        self.stage = BEFORE
        self._inner: list[list[float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the current stage."""
        stage, started = self.stage, now()
        self._inner.append([0.0, 0.0])
        try:
            yield
        finally:
            spent = [b - a for a, b in zip(started, now(), strict=True)]
            inner = self._inner.pop()
            entry = self.found.setdefault((stage, name), [0.0, 0.0])
            for i in range(2):
                entry[i] += spent[i] - inner[i]
                if self._inner:
                    self._inner[-1][i] += spent[i]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of a function or method."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return original(*args, **kwargs)

        setattr(owner, name, timed)

    def watch_imports(self) -> None:
        """Time what is slow to import, each the first time."""
        original: Callable[..., Any] = builtins.__import__

        def importing(name: str, *args: Any, **kwargs: Any) -> Any:
            package = name.partition(".")[0]
            if package not in IMPORTED or name in sys.modules:
                return original(name, *args, **kwargs)
            with self.part(f"import of {package}"):
                return original(name, *args, **kwargs)

        builtins.__import__ = importing


def timed_run(folder: Path) -> dict[str, Any]:
    """Do the run; the parts of its stages, and when TensorFlow was imported."""
    started, clock = now(), Clock()
    clock.watch_imports()
    with clock.part("rest"):
        from hmq_fpga.study.monitor import Bars
        from hmq_fpga.study.run import pipeline as study
        from hmq_fpga.study.run.config import make_config

        class Stages(Bars):
            @contextmanager
            def stage(self, name: str) -> Iterator[Any]:
                with super().stage(name) as listener:
                    clock.stage = name
                    if name == "rtl":  # its module is imported only now
                        watch_rtl(clock)
                    with clock.part("rest"):
                        yield listener
                    clock.stage = AFTER

        watch(clock, study)
        config = make_config({"task": "digits_mlp", "rw": 8, "out": folder})
        with Stages(folder / "tensorboard") as bars:
            study.run(config, bars)
    rows = [{"stage": stage, "part": part, "seconds": times} for (stage, part), times in clock.found.items()]
    return {"rows": rows, "total": [b - a for a, b in zip(started, now(), strict=True)]}


def watch(clock: Clock, study: Any) -> None:
    """The functions whose times are of interest."""
    from hmq_fpga.deploy.hls import project as hls
    from hmq_fpga.deploy.qkeras import model as qkeras_model
    from hmq_fpga.ir import reference

    clock.watch(qkeras_model, "to_qkeras", "QKeras building")
    clock.watch(qkeras_model, "save", "QKeras saving")
    clock.watch(qkeras_model, "load", "QKeras loading")
    clock.watch(hls, "_convert", "hls4ml conversion")
    clock.watch(hls, "_write", "hls4ml writing")
    clock.watch(hls.HlsProject, "_compiled", "g++")
    clock.watch(hls.HlsProject, "write_tb_data", "test bench data")
    clock.watch(hls.HlsProject, "predict", "C simulation")
    clock.watch(qkeras_model.QKerasSimulator, "predict", "QKeras prediction")
    clock.watch(reference, "run", "golden model")
    clock.watch(study.page, "write_page", "page")


def watch_rtl(clock: Clock) -> None:
    """The same of the module that is imported late."""
    with clock.part("rest"):
        from hmq_fpga.deploy.rtl import project as rtl

    clock.watch(rtl, "trace", "alkaid tracing")
    clock.watch(rtl, "write_verilog", "Verilog writing")
    clock.watch(rtl.Interpreter, "predict", "trace interpretation")


def measured(command: list[str]) -> tuple[Seconds, str]:
    """Times of a command, and what it printed."""
    before = now()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    elapsed, processor = (b - a for a, b in zip(before, now(), strict=True))
    return (elapsed, processor), done.stdout


def median(times: list[Seconds]) -> Seconds:
    """Of elapsed and of processor times."""
    elapsed, processor = (statistics.median(column) for column in zip(*times, strict=True))
    return elapsed, processor


def tables(runs: list[dict[str, Any]], commands: dict[str, Seconds]) -> str:
    """Markdown: stages, what is in them, commands."""
    found: dict[tuple[str, str], list[Seconds]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault((row["stage"], row["part"]), []).append(tuple(row["seconds"]))
    parts = {key: median(times) for key, times in found.items()}
    stages = dict.fromkeys([BEFORE, *(stage for stage, _ in parts)])
    sums = {stage: [sum(p[i] for (s, _), p in parts.items() if s == stage) for i in range(2)] for stage in stages}
    total = median([tuple(run["total"]) for run in runs])
    others = [sum(times[i] for stage, times in sums.items() if stage not in TRAINING) for i in range(2)]
    lines = ["| stage | elapsed, s | processor, s | of it, processor |", "|---|---|---|---|"]
    for stage, (elapsed, processor) in sums.items():
        own = sorted(((p[1], name) for (s, name), p in parts.items() if s == stage), reverse=True)
        inside = ", ".join(f"{name} {spent:.1f}" for spent, name in own if spent >= 0.05)
        lines.append(f"| {stage} | {elapsed:.1f} | {processor:.1f} | {inside} |")
    lines.append(f"| **all but training** | **{others[0]:.1f}** | **{others[1]:.1f}** | |")
    lines.append(f"| **all** | **{total[0]:.1f}** | **{total[1]:.1f}** | |")
    lines += ["", "| command | elapsed, s | processor, s |", "|---|---|---|"]
    lines += [f"| `{name}` | {elapsed:.2f} | {processor:.2f} |" for name, (elapsed, processor) in commands.items()]
    return "\n".join(lines)


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs, each in a fresh folder [3]")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(timed_run(arguments.one)))  # noqa: T201
        return
    runs = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            _, printed = measured([sys.executable, str(Path(__file__).resolve()), "--one", str(Path(scratch) / "run")])
            runs.append(json.loads(printed.splitlines()[-1]))
    commands = {}
    for words in COMMANDS:
        times = [measured([sys.executable, "-m", "hmq_fpga", *words])[0] for _ in range(5)]
        commands[" ".join(("hmq-fpga", *words))] = median(times)
    print(tables(runs, commands))  # noqa: T201


if __name__ == "__main__":
    main()
