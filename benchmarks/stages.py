"""Where the time of a whole run goes: `hmq-fpga run digits_mlp --rw 8` in a fresh folder, imports included.

    python benchmarks/stages.py

Rows are kept in `stages.json`: a run or a command each, in a process of its own. Those already there are not repeated;
remove the file to measure anew. Times are processor time, compilers included. Parts are exclusive: an import within a
conversion counts as import alone.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import json
import os
import subprocess
import sys
import tempfile
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
RUN = "hmq-fpga run digits_mlp --rw 8"
COMMANDS = ("hmq-fpga --help", "hmq-fpga doctor")
SHOWN_S = 0.05  # shorter parts are not named
HERE = Path(__file__).parent
ROWS = HERE / "stages.json"
Row = dict[str, Any]


def now() -> float:
    """Processor time, children that have ended included."""
    return sum(os.times()[:4])


class Clock:
    """Exclusive times: what is timed within a part is not the part's."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], float] = {}
        self.stage = BEFORE
        self._inner: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the current stage."""
        key, started = (self.stage, name), now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = now() - started
            self.found[key] = self.found.get(key, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

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


def timed_run(folder: Path) -> Row:
    """Do the run; the parts of its stages, processor seconds."""
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
    parts = [{"stage": stage, "part": part, "seconds": round(s, 3)} for (stage, part), s in clock.found.items()]
    return {"seconds": round(now() - started, 3), "parts": parts}


def watch(clock: Clock, study: Any) -> None:
    """The functions whose times are of interest."""
    from hmq_fpga.deploy import samples
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
    clock.watch(samples, "made_samples", "making samples")
    clock.watch(study.page, "write_page", "page")


def watch_rtl(clock: Clock) -> None:
    """The same of the module that is imported late."""
    with clock.part("rest"):
        from hmq_fpga.deploy.rtl import project as rtl

    clock.watch(rtl, "trace", "alkaid tracing")
    clock.watch(rtl, "write_verilog", "Verilog writing")
    clock.watch(rtl.Interpreter, "predict", "trace interpretation")


def measure(*, command: str, turn: int) -> Row:  # noqa: ARG001
    """A turn of a run, with its parts, or of a command."""
    if command == RUN:
        with tempfile.TemporaryDirectory() as scratch:
            printed = called(str(Path(__file__).resolve()), "--one", str(Path(scratch) / "run"))
        row: Row = json.loads(printed.splitlines()[-1])
        return row
    started = now()
    called("-m", "hmq_fpga", *command.split()[1:])
    return {"seconds": round(now() - started, 3)}


def called(*arguments: str) -> str:
    """What Python prints, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def page(rows: list[Row]) -> str:
    """Stages of the quickest run and what is in them, and the quickest of each command."""
    turns = {command: [row for row in rows if row["command"] == command] for command in (RUN, *COMMANDS)}
    quickest = {command: min(own, key=lambda row: row["seconds"]) for command, own in turns.items()}
    parts = quickest[RUN]["parts"]
    lines = [
        "# Where the time of a run goes",
        "",
        f"`{RUN}` in a fresh folder, imports included, one thread: processor seconds, g++'s included, of the",
        f"quickest of {len(turns[RUN])} runs, since other work on the machine only adds. Parts are exclusive: an",
        "import within a stage counts as import alone. Made by `python benchmarks/stages.py`; seed 0; two cores of",
        "x86-64, Python 3.11.",
        "",
        "| stage | processor, s | of it |",
        "|---|---|---|",
    ]
    for stage in dict.fromkeys([BEFORE, *(part["stage"] for part in parts)]):
        own = sorted((part for part in parts if part["stage"] == stage), key=lambda part: -part["seconds"])
        inside = ", ".join(f"{part['part']} {part['seconds']:.1f}" for part in own if part["seconds"] >= SHOWN_S)
        lines.append(f"| {stage} | {_seconds(own):.1f} | {inside} |")
    others = [part for part in parts if part["stage"] not in TRAINING]
    lines += [f"| **all but training** | **{_seconds(others):.1f}** | |"]
    lines += [f"| **all** | **{quickest[RUN]['seconds']:.1f}** | |"]
    lines += ["", "| command | turns | processor, s, the quickest |", "|---|---|---|"]
    lines += [f"| `{name}` | {len(turns[name])} | {quickest[name]['seconds']:.2f} |" for name in COMMANDS]
    return "\n".join([*lines, "", *DECISIONS]) + "\n"


def _seconds(parts: list[dict[str, Any]]) -> float:
    return sum(part["seconds"] for part in parts)


DECISIONS = (
    "Neither command imports torch or TensorFlow, which a test checks; a run imports TensorFlow when it writes",
    "the QKeras model. Keras lets AutoGraph rewrite the source of QKeras's layers to learn their shapes, which",
    "took most of the time of building the model: `to_qkeras` switches it off for these calls; outputs and",
    "files are the same. The C simulation is compiled as hls4ml does, with `-O3`: more than half of that time",
    "is spent on templates before anything is optimized, so lower levels gain little and slow the simulation of",
    "large networks down. One file in place of two, or a precompiled header, would gain more and depart from",
    "hls4ml's project.",
)


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs, each in a fresh folder [3]")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(timed_run(arguments.one)))  # noqa: T201
        return
    from common import fill  # it imports torch, whose import is timed

    wanted = ({"command": c, "turn": n} for c in (*COMMANDS, RUN) for n in range(arguments.repeats))
    (HERE / "stages.md").write_text(page(fill(ROWS, wanted, measure)))


if __name__ == "__main__":
    main()
