"""How cost grows with the number of parameters: time and memory of each step from search to RTL.

    python benchmarks/scaling.py --family mlp cnn

The networks are generated: an `mlp` has three hidden layers of equal width, a `cnn` three strided convolutions of equal
width and a dense layer; 4-bit weights and 8-bit activations, thresholds of least error, no training. Each measurement
has a process of its own, which does the same on a tiny network first, so that imports and first calls do not count.
Times are processor time, compilers included. Memory is the growth of the resident set to its peak, as Linux
keeps it; of the compiler its largest process. Rows are kept in `scaling.json`, and what is there already is
not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.toolchain import ToolFailed
from hmq_fpga.deploy.toolchain import run as run_tool
from hmq_fpga.ir.network import QNet
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Task

HERE = Path(__file__).parent
ROWS = HERE / "scaling.json"
SIZES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
FAMILIES = {"mlp": "three hidden layers of equal width", "cnn": "three strided 3x3 convolutions of equal width"}
STEPS = {
    "search": "one step of HMQ, batch of 64",
    "freeze": "`freeze`",
    "convert": "QKeras model and hls4ml project",
    "compile": "g++ on the C simulation",
    "rtl": "RTL by alkaid",
    "estimate": "`model` estimate",
}
TINY = 100  # parameters of the network that warms a process up
WARM_UP, COUNTED = 3, 15  # steps of a search
REPEATED_S, REPEATS = 1.0, 20  # what is short is repeated up to either
MIB = 2**20


def mlp(width: int) -> nn.Module:
    """Some 2 w² parameters."""
    sizes = (16, width, width, width, 10)
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn(width: int) -> nn.Module:
    """Some 18 w² parameters, on 16x16 images."""
    channels = (1, width, width, width)
    layers = [layer for n, m in pairwise(channels) for layer in (nn.Conv2d(n, m, 3, stride=2, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


def generate(family: str, parameters: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of a family whose parameters come closest, and the shape of its input."""
    build, shape = {"mlp": (mlp, (16,)), "cnn": (cnn, (1, 16, 16))}[family]
    torch.manual_seed(0)
    widths = range(1, 1000)
    sizes = [_size(family, width) for width in widths]
    return build(widths[int(np.argmin([abs(size - parameters) for size in sizes]))]), shape


def _size(family: str, w: int) -> int:
    return 2 * w * w + 29 * w + 10 if family == "mlp" else 18 * w * w + 52 * w + 10


def data(shape: tuple[int, ...], loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Task:
    """Noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1024, *shape, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    return Task(x_train=x, y_train=y, x_val=x[:64], y_val=y[:64], custom_loss=loss)


def quantized(family: str, parameters: int) -> QModel:
    """A network with a scheme."""
    model, shape = generate(family, parameters)
    searched = instrument(model, shape, input_signed=False)
    return find_scheme(searched, data(shape), Budget(), Target(weight_rate=8), method="uniform")[0]


class Enough(Exception):
    """The search has taken its steps."""


def search_step(family: str, parameters: int) -> dict[str, float]:
    """Seconds of a step, from one call of the loss to the next."""
    times: list[float] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        times.append(time.process_time())
        if len(times) > WARM_UP + COUNTED:
            raise Enough
        return F.cross_entropy(outputs, targets)

    model, shape = generate(family, parameters)
    searched = instrument(model, shape, input_signed=False)
    try:
        find_scheme(searched, data(shape, loss), Budget(search_steps=10**6), Target(weight_rate=8))
    except Enough:
        return {"seconds": statistics.median(b - a for a, b in pairwise(times[WARM_UP:]))}
    raise AssertionError("the search ended by itself")


def compilation(folder: Path) -> dict[str, float]:
    """Of a project, from a small process: a child's peak is no less than the resident set it was forked from."""
    program = (
        "import json, pathlib, resource, sys\n"
        "from hmq_fpga.deploy.hls.project import HlsProject\n"
        "HlsProject.load(pathlib.Path(sys.argv[1])).compile()\n"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps({'seconds': usage.ru_utime + usage.ru_stime, 'mib': usage.ru_maxrss / 1024}))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def prepared(step: str, family: str, parameters: int, folder: Path) -> Callable[[], Any]:
    """A step with all that it needs at hand."""
    if step == "search":
        return lambda: search_step(family, parameters)
    if step == "freeze":
        model = quantized(family, parameters)
        return lambda: freeze(model)
    numbers = count()
    net = freeze(quantized(family, parameters))
    fresh = lambda: folder / f"{parameters}-{next(numbers)}"  # noqa: E731
    match step:
        case "convert":
            from hmq_fpga.deploy.backends import HLS, QKERAS
            from hmq_fpga.deploy.settings import Hardware

            return lambda: [b.create(net, fresh(), Hardware(), None) for b in (QKERAS, HLS)]
        case "compile":
            written = HlsProject.create(net, fresh()).folder
            return lambda: compilation(written)
        case "rtl":
            from hmq_fpga.deploy.rtl.project import RtlProject

            return lambda: RtlProject.create(net, fresh())
        case _:
            from hmq_fpga.deploy.rtl.estimate import estimate

            return lambda: estimate(QNet(net.ops, net.outputs))  # nothing cached


def measure(step: str, family: str, parameters: int) -> dict[str, Any]:
    """Seconds and MiB, or why there are none."""
    from hmq_fpga.deploy.rtl.trace import NotUnrolled

    torch.set_num_threads(1)
    model, _ = generate(family, parameters)
    entry: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    with tempfile.TemporaryDirectory() as scratch:
        if step != "compile":
            with suppress(NotUnrolled):  # so small a network may be constant
                prepared(step, family, TINY, Path(scratch))()
        work = prepared(step, family, parameters, Path(scratch))
        before = _reset_peak()
        times: list[float] = []
        while not times or (sum(times) < REPEATED_S and len(times) < REPEATS):
            started = _seconds()
            try:
                result = work()
            except NotUnrolled as refused:
                return entry | {"seconds": None, "mib": None, "refused": str(refused)}
            times.append(_seconds() - started)
            if len(times) == 1:
                entry["mib"] = (_status("VmHWM") - before) / MIB
            if isinstance(result, dict):  # it measures for itself
                return entry | result
    return entry | {"seconds": statistics.median(times)}


def _seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _status(key: str) -> int:
    """A figure of `/proc/self/status`, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _reset_peak() -> int:
    """Give freed memory back and forget the peak; returns the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def apart(step: str, family: str, parameters: int, limit_s: float) -> dict[str, Any]:
    """`measure` in a process of its own, within a time limit."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", step, family, str(parameters)]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        try:
            code = run_tool(command, cwd=Path.cwd(), log=log, time_limit_s=limit_s)
        except ToolFailed:
            return {"parameters": parameters, "seconds": None, "mib": None, "refused": f"more than {limit_s:g} s"}
        if code:
            raise RuntimeError(f"{step}, {family}, {parameters} parameters:\n{log.read_text()[-3000:]}")
        return json.loads(log.read_text().splitlines()[-1])


def exponent(rows: list[dict[str, Any]], key: str) -> float | None:
    """Slope of least squares on logarithms, over the larger half of the sizes."""
    points = sorted((row["parameters"], row[key]) for row in rows if row[key])
    points = points[len(points) // 2 :]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each family seconds and MiB of each step by parameters, with exponents."""
    lines: list[str] = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        sizes = sorted({row["asked"] for row in own})
        for key, title, scale in (("seconds", "processor time, ms", 1000), ("mib", "memory, MiB", 1)):
            lines += [f"| {family}, {title} | " + " | ".join(map(_short, sizes)) + " | exponent |"]
            lines += ["|---|" + "---|" * (len(sizes) + 1)]
            for step, what in STEPS.items():
                found = {row["asked"]: row for row in own if row["step"] == step}
                if not found:
                    continue
                values = [found[size][key] if size in found else None for size in sizes]
                slope = exponent(list(found.values()), key)
                cells = ["–" if value is None else _figure(scale * value) for value in values]
                lines.append(f"| {what} | " + " | ".join(cells) + f" | {'–' if slope is None else f'{slope:.2f}'} |")
            lines.append("")
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    """The tables, and how they were made."""
    lines = [
        "# How cost grows with the number of parameters",
        "",
        "![time and memory against parameters](scaling.svg)",
        "",
        "Generated networks: an `mlp` has 16 inputs, three hidden layers of equal width and 10 outputs; a `cnn`",
        "16x16 inputs, three 3x3 convolutions of stride 2 and equal width, and a dense layer. 4-bit weights (R_w =",
        "8) and 8-bit activations, not trained; seed 0. Made by `python benchmarks/scaling.py`; one measurement",
        "each, in a process of its own, on one thread; two cores of x86-64 that were busy with other work. Time is",
        "processor time, g++'s included; what takes less than a second is repeated, and the median taken. Memory is",
        "the growth of the resident set to its peak; of g++ it is all of its largest process. A dash is a size that",
        "was refused or not measured.",
        "",
        "An exponent is the slope of the least-squares line through the logarithms of parameters and cost, over the",
        "larger half of the sizes measured, since the small ones show constant cost: 1 is linear, less means that a",
        "constant part still counts.",
        "",
        table(rows),
        "RTL grows fastest: alkaid searches a whole matrix for partial sums to share. It stays bounded, since",
        "`SIZE_LIMIT` refuses larger networks at once, and `run` then has the `model` estimate alone. g++ is",
        "constant on an `mlp`: the code is templates, a number of them per layer, and weights are read from files.",
        "Of a `cnn` in `io_parallel` hls4ml writes an assignment for each value of each window, so that code grows",
        "with the width.",
    ]
    return "\n".join(lines) + "\n"


def _short(size: int) -> str:
    return f"{size // 1000:,}k" if size < 10**6 else f"{size // 10**6}M"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against parameters, log-log, with the exponents."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(12, 4 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), 2, squeeze=False)
    for family, panels in zip(families, grid, strict=True):
        for axes, key, label in zip(panels, ("seconds", "mib"), ("processor time, s", "memory, MiB"), strict=True):
            for step in STEPS:
                own = [row for row in rows if (row["family"], row["step"]) == (family, step)]
                points = sorted((row["parameters"], row[key]) for row in own if row[key])
                if not points:
                    continue
                slope = exponent(own, key)
                name = step if slope is None else f"{step}, {slope:.2f}"
                axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
            axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=label, title=FAMILIES[family])
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", title="step, exponent", loc="center left", bbox_to_anchor=(1, 0.5))
    with mpl.rc_context({"svg.hashsalt": "scaling"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure what is missing, then write the page and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--step", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--limit", type=float, default=600, help="seconds of one measurement [600]")
    parser.add_argument("--one", nargs=3, metavar=("STEP", "FAMILY", "PARAMETERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        step, family, parameters = arguments.one
        print(json.dumps(measure(step, family, int(parameters))))  # noqa: T201
        return
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    for family in arguments.family:
        for step in arguments.step:
            over = False  # a step past its limit is not tried on larger networks
            for size in sorted(arguments.sizes):
                key = {"family": family, "step": step, "asked": size}
                row = next((row for row in rows if key.items() <= row.items()), None)
                if row is None and not over:
                    row = key | apart(step, family, size, arguments.limit)
                    rows.append(row)
                    ROWS.write_text(json.dumps(rows, indent=1) + "\n")
                over = over or row is None or row["seconds"] is None
    draw(rows, HERE / "scaling.svg")
    (HERE / "scaling.md").write_text(page(rows))


if __name__ == "__main__":
    main()
