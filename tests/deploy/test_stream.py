import json
from pathlib import Path

import numpy as np
import pytest
from cocotb_tools.runner import get_runner

from hmq_fpga.deploy.rtl.project import STREAM, RtlProject
from hmq_fpga.ir import reference
from tests.deploy.networks import small_mlp

WORDS = 60
STALLS = [(0.0, 0.7), (0.5, 0.5), (0.7, 0.0), (0.0, 0.97)]  # how often master and slave make each other wait


def plans(latency: int, words: list[int]) -> dict:
    """What to try, by name; all in one start of the simulator."""
    rng = np.random.default_rng(4)
    at_once = [0] * WORDS
    found = {
        "nobody stalls": plan(words, at_once, [1] * (WORDS + latency + 3)),
        "never ready": plan(words, at_once, [0] * 80),
        "reset": plan(words, at_once, [0] * 7 + [1] * 120, [6]),
    }
    for master, slave in STALLS:
        waits = [int(n) for n in rng.geometric(1 - master, WORDS) - 1]
        ready = [int(r) for r in rng.random(600) >= slave] + [1] * 400
        found[f"stalls {master} {slave}"] = plan(words, waits, ready)
    return found


def plan(words, waits, ready, resets=()) -> dict:
    return {"words": words, "waits": waits, "ready": ready, "resets": list(resets)}


class Seen:
    """What went into the core and came out, and in which cycles."""

    def __init__(self, seen: dict):
        self.taken = seen["taken"]
        self.cycles, self.words, self.lasts = ([given[i] for given in seen["given"]] for i in range(3))


@pytest.fixture(scope="module", params=[1.0, None], ids=["pipelined", "combinational"])
def core(request, tmp_path_factory):
    """The project, the words that must come out, and what was seen of each plan."""
    folder = tmp_path_factory.mktemp("axis")
    project = RtlProject.create(small_mlp(), folder / "rtl", latency_cutoff=request.param)
    assert (project.latency_cycles > 2) == (request.param is not None)
    words, expected = samples(project)
    return project, expected, simulate(project, plans(project.latency_cycles, words), folder)


def samples(project: RtlProject) -> tuple[list[int], list[int]]:
    """Words in, and the words that must come out."""
    net = project.net
    codes = np.random.default_rng(3).integers(0, net.input.format.hi, (WORDS, 4), endpoint=True)
    outputs = reference.run(net, net.input.format.decode(codes)) >> project.output_port.shift
    ports = (codes, project.input_port), (outputs, project.output_port)
    words, expected = ([pack(row, port.width) for row in rows] for rows, port in ports)
    return words, expected


def pack(fields, width: int) -> int:
    return sum((int(field) % (1 << width)) << (i * width) for i, field in enumerate(fields))


def simulate(project: RtlProject, plans: dict, folder: Path, **parameters: int) -> dict[str, Seen]:
    (folder / "plans.json").write_text(json.dumps(plans))
    runner = get_runner("icarus")
    build_dir = folder / "icarus"
    runner.build(sources=project.stream_sources, hdl_toplevel=STREAM, build_dir=build_dir, parameters=parameters)
    files = {"AXIS_PLANS": str(folder / "plans.json"), "AXIS_OUTPUTS": str(folder / "outputs.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        runner.test(test_module="cocotb_axis", hdl_toplevel=STREAM, test_dir=folder, extra_env=files)
    return {name: Seen(seen) for name, seen in json.loads((folder / "outputs.json").read_text()).items()}


def test_nobody_stalls_and_a_sample_goes_through_at_every_clock(core):
    project, expected, seen = core
    free = seen["nobody stalls"]
    assert free.taken == list(range(WORDS))
    first = project.latency_cycles + 1
    assert free.cycles == list(range(first, first + WORDS))
    assert free.words == expected
    assert free.lasts == [int(i % 3 == 2) for i in range(WORDS)]


def test_random_stalls_on_both_sides_lose_and_repeat_nothing(core):
    _, expected, seen = core
    for master, slave in STALLS:
        stalled = seen[f"stalls {master} {slave}"]
        assert len(stalled.taken) == WORDS
        assert stalled.words == expected
        assert stalled.lasts == [int(i % 3 == 2) for i in range(WORDS)]


def test_a_slave_that_never_takes_anything_stops_the_master_for_good(core):
    project, _, seen = core
    stuck = seen["never ready"]
    assert stuck.taken == list(range(project.latency_cycles + 2))
    assert stuck.words == []


def test_reset_drops_what_is_inside(core):
    _, expected, seen = core
    reset = seen["reset"]
    lost = sum(cycle < 6 for cycle in reset.taken)
    assert lost >= 2
    assert reset.words == expected[lost:]


def test_a_single_place_is_enough(tmp_path):
    project = RtlProject.create(small_mlp(), tmp_path / "rtl")
    words, expected = samples(project)
    period = project.latency_cycles + 2
    plans = {"one": plan(words[:10], [0] * 10, [1] * 10 * period)}
    seen = simulate(project, plans, tmp_path, DEPTH=1)["one"]
    assert np.diff(seen.taken).tolist() == [period] * 9
    assert seen.words == expected[:10]
