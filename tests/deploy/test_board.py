"""A network on a board: its serial line in simulation, and bitstreams for real."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga import cli
from hmq_fpga.deploy.board import build as building
from hmq_fpga.deploy.board import host
from hmq_fpga.deploy.board.boards import BOARDS, find_board
from hmq_fpga.deploy.board.build import build, clock_below
from hmq_fpga.deploy.board.project import IDLE_BITS, BoardProject
from hmq_fpga.deploy.board.simulate import SimulatedBoard
from hmq_fpga.deploy.rtl.nextpnr import DoesNotFit
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.toolchain import ToolFailed, ToolMissing
from hmq_fpga.ir.errors import InvalidInput
from tests.deploy.networks import run_folder, small_mlp
from tests.outside import needs_nextpnr

ULX3S, ICEBREAKER = BOARDS["ulx3s-85f"], BOARDS["icebreaker"]
SAMPLES = 60


@pytest.fixture(scope="module")
def rtl(tmp_path_factory) -> RtlProject:
    return RtlProject.create(small_mlp(), tmp_path_factory.mktemp("board") / "rtl")


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).random((SAMPLES, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def project(rtl, x) -> BoardProject:
    return BoardProject.create(rtl, ULX3S, rtl.folder.parent / "ulx3s-85f", x)


class Line:
    """The host's side of a simulated board, without a pseudo-terminal."""

    def __init__(self, project: BoardProject, board: SimulatedBoard):
        self.board = board
        self.layout = json.loads((project.folder / "board.json").read_text())
        with np.load(project.folder / "samples.npz") as samples:
            self.codes, self.expected = samples["codes"], samples["expected"]
        self.size = -(-self.layout["outputs"]["elements"] * self.layout["outputs"]["width"] // 8)

    def request(self, i: int) -> tuple[bytes, int]:
        return host.request(i % 256, host.pack(self.codes[i], self.layout["inputs"]))

    def answer(self, received: bytes, i: int, crc: int) -> np.ndarray | None:
        found = host.find_answer(received, i % 256, self.size, crc)
        return None if found is None else host.unpack(found, self.layout["outputs"])

    def answers(self, i: int) -> bool:
        """Whether it answers a sample, rightly."""
        frame, crc = self.request(i)
        found = self.answer(self.board.talk(frame), i, crc)
        if found is not None:
            assert_array_equal(found, self.expected[i])
        return found is not None


@pytest.fixture
def line(project):
    with project.simulated() as board:
        yield Line(project, board)


def test_codes_go_into_bytes_and_back():
    rng = np.random.default_rng(0)
    for signed, width, shift in ((False, 1, 0), (True, 1, 0), (False, 7, 2), (True, 9, 0), (True, 28, 3)):
        port = {"elements": 13, "width": width, "signed": signed, "shift": 0}
        codes = rng.integers(-(1 << width - 1) if signed else 0, 1 << width - signed, 13)
        assert_array_equal(host.unpack(host.pack(codes, port), port), codes)
        shifted = {**port, "shift": shift}
        assert_array_equal(host.unpack(host.pack(codes, port), shifted), codes << shift)
    assert host.pack(np.array([1, 2, 3]), {"width": 4}) == bytes([0x21, 0x03])


def test_the_host_script_finds_no_mismatch_in_the_simulated_board(project):
    talked = project.simulate(time_limit_s=60)
    assert (talked.samples, talked.values, talked.mismatches, talked.resent) == (SAMPLES, 5 * SAMPLES, 0, 0)
    assert project.simulate(samples=3, time_limit_s=60).samples == 3


def test_the_host_script_counts_what_differs_and_says_when_nobody_answers(project, tmp_path):
    copy = replace(project, folder=tmp_path / "copy")
    shutil.copytree(project.folder, copy.folder)
    with np.load(copy.folder / "samples.npz") as samples:
        codes, expected = samples["codes"], samples["expected"]
    expected[7, 2] += 1
    np.savez(copy.folder / "samples.npz", codes=codes, expected=expected)
    assert copy.simulate(time_limit_s=60).mismatches == 1

    layout = json.loads((copy.folder / "board.json").read_text())
    layout["outputs"]["elements"] += 2  # answers of another length
    (copy.folder / "board.json").write_text(json.dumps(layout))
    with pytest.raises(ToolFailed, match=r"host\.py failed with exit code 2; its log is .*host\.log"):
        copy.simulate(samples=1, timeout_s=0.02, time_limit_s=60)
    assert "no answer in 10 tries" in (copy.folder / "host.log").read_text()


def test_every_flipped_bit_of_a_request_ends_in_silence_and_the_next_one_is_answered(line):
    frame, crc = line.request(0)
    for bit in range(8 * len(frame)):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        assert line.board.talk(bytes(broken)) == b""
        line.board.rest()
        assert line.answers(1 + bit % (SAMPLES - 1))
    assert line.answer(line.board.talk(frame), 0, crc) is not None


def test_part_of_a_frame_is_dropped_after_a_pause(line):
    frame, crc = line.request(3)
    for size in range(1, len(frame)):
        assert line.board.talk(frame[:size]) == b""
        line.board.rest()
        assert line.answers(size)
    # without the pause it takes the next frame's bytes for its own, and needs one more
    assert line.board.talk(frame[:-1]) == b""
    assert not line.answers(4)
    assert line.answers(4)
    # a pause that is shorter than that is none
    assert line.answer(line.board.talk(frame, pause_bits=IDLE_BITS // 2), 3, crc) is not None
    assert line.board.talk(frame, pause_bits=IDLE_BITS + 8) == b""


def test_random_bytes_get_no_answer(line):
    rng = np.random.default_rng(1)
    for i in range(40):
        head = host.REQUEST if i % 2 else b""
        assert line.board.talk(head + rng.bytes(int(rng.integers(1, 60)))) == b""
        line.board.rest()
        assert line.answers(i)


def test_another_length_gets_no_answer(line):
    for size in (0, 1, 3, 258):
        assert line.board.talk(host.request(1, bytes(size))[0]) == b""
        line.board.rest()
    assert line.answers(0)


@pytest.mark.parametrize("flips", [0.0005, 0.004])
def test_noise_on_the_line_costs_answers_and_never_makes_a_wrong_one(project, flips):
    with project.simulated(flips=flips) as board:
        line = Line(project, board)
        answered = []
        for i in range(400):
            answered.append(line.answers(i % SAMPLES))
            if not answered[-1]:
                board.rest()
    assert 0 < sum(answered) < 400


def test_the_host_script_sends_again_what_noise_has_taken(project):
    talked = project.simulate(samples=30, flips=0.001, timeout_s=0.1, time_limit_s=60)
    assert (talked.samples, talked.mismatches) == (30, 0)
    assert talked.resent > 0


def test_a_network_without_registers_has_a_board_too(rtl, x, tmp_path):
    flat = RtlProject.create(rtl.net, tmp_path / "rtl", latency_cutoff=None)
    project = BoardProject.create(flat, ICEBREAKER, tmp_path / "board", x)
    with project.simulated() as board:
        line = Line(project, board)
        assert all(line.answers(i) for i in range(SAMPLES))


def test_what_cannot_be_had_is_refused(rtl, x, tmp_path):
    with pytest.raises(InvalidInput, match=r"board 'arty' is not known; there are ulx3s-12f, .*icebreaker"):
        find_board("arty")
    with pytest.raises(InvalidInput, match="9000000 baud cannot be had from 12 MHz within 2 %"):
        BoardProject.create(rtl, ICEBREAKER, tmp_path / "board", x, baud=9_000_000)
    assert not (tmp_path / "board").exists()


def test_without_nextpnr_the_extra_is_named(rtl, x, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match=r"nextpnr-ice40 not found.* pip install 'hmq-fpga\[route\]'"):
        build(rtl, ICEBREAKER, tmp_path / "board", x)


def test_the_command_simulates_the_board_with_the_runs_samples(rtl, x, tmp_path, monkeypatch, capsys):
    run = run_folder(rtl, tmp_path / "run", latency_cutoff=5.0)
    monkeypatch.setattr("hmq_fpga.study.run.pipeline.samples_of", lambda folder, data: x)
    options = ["board", str(run), "--board", "icebreaker", "--simulate", "--samples", "9"]
    assert cli.app(options, standalone_mode=False) == 0
    assert capsys.readouterr().out == "9 samples, 45 output codes, 0 mismatches\n"
    assert (run / "board" / "icebreaker-simulated" / "host.py").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--board arty", "board 'arty' is not known"),
        ("--board icebreaker --simulate --mhz 20", "--baud, --mhz and --gates are for bitstreams, not for --simulate"),
        ("--board icebreaker --samples 5", "--samples is for --simulate"),
    ],
)
def test_options_that_do_not_go_together_are_told(options, message, tmp_path):
    with pytest.raises(InvalidInput, match=message):
        cli.app(["board", str(tmp_path), *options.split()], standalone_mode=False)


@pytest.mark.parametrize("name", list(BOARDS))
def test_every_port_of_the_top_level_has_its_pin(name, rtl, x, tmp_path):
    board = BOARDS[name]
    project = BoardProject.create(rtl, board, tmp_path / name, x[:1])
    ports = set(re.findall(r"^    (?:in|out)put wire (?:\[\d+:0\] )?(\w+)", _top(project), re.M))
    pins = (project.folder / board.pin_file).read_text()
    assert ports == set(re.findall(r'(?:LOCATE COMP "|set_io )(\w+)', pins))


def _top(project: BoardProject) -> str:
    return (project.folder / "rtl" / "board_top.v").read_text()


@needs_nextpnr
@pytest.mark.parametrize("board", [ULX3S, ICEBREAKER])
def test_a_pll_makes_a_clock_of_at_most_what_is_wanted(board):
    for wanted in (31.4, 77.7):
        clock = clock_below(board, wanted, 60)
        assert 0.9 * wanted < clock.mhz <= wanted
        assert "module board_clock" in clock.verilog and clock.divider == 1


def test_below_what_a_pll_makes_the_oscillator_is_divided():
    assert [clock_below(ICEBREAKER, mhz, 60).mhz for mhz in (11.9, 6, 5.9, 0.4)] == [6, 6, 3, 0.375]
    assert [clock_below(ULX3S, mhz, 60).divider for mhz in (16, 12.5, 7)] == [2, 2, 4]


@needs_nextpnr
def test_a_bitstream_at_a_divided_clock_answers(rtl, x, tmp_path):
    made, built = build(rtl, ICEBREAKER, tmp_path / "board", x, mhz=7, baud=1_000_000, time_limit_s=300)
    assert built.clock_mhz == 6 < built.fmax_mhz
    with made.gates(made.folder / "routed.json") as gates:
        talked = made.talk(gates, samples=3, time_limit_s=100)
    assert (talked.samples, talked.mismatches) == (3, 0)


@needs_nextpnr
def test_a_bitstream_of_a_board_with_a_pll(rtl, x, tmp_path):
    steps: list[str] = []
    _, built = build(rtl, ICEBREAKER, tmp_path / "board", x, mhz=20, time_limit_s=300, on_step=steps.append)
    assert 18 < built.clock_mhz <= 20 < built.fmax_mhz
    assert built.load == f"openFPGALoader -b ice40_generic {tmp_path / 'board' / 'bitstream.bin'}"
    assert built.used["ICESTORM_PLL"] == (1, 1)
    assert bytes.fromhex("7eaa997e") in (tmp_path / "board" / "bitstream.bin").read_bytes()[:64]
    assert json.loads((tmp_path / "board" / "built.json").read_text())["clock_mhz"] == built.clock_mhz
    assert [step.split()[0] for step in steps] == ["synthesizing", "placing", "packing"]
    assert f".CLOCKS_PER_BIT({round(built.clock_mhz * 1e6 / 115_200)})" not in _top_of(tmp_path)
    assert f"CLOCKS_PER_BIT = {round(built.clock_mhz * 1e6 / 115_200)}" in _top_of(tmp_path)


def _top_of(folder: Path) -> str:
    return (folder / "board" / "rtl" / "board_top.v").read_text()


@needs_nextpnr
def test_a_bitstream_of_an_ecp5_whose_clock_has_to_be_slower(rtl, x, tmp_path, monkeypatch):
    """The first placement says that the oscillator is too fast, the second is at a PLL's clock below."""
    found = iter([30.0, 40.0])
    monkeypatch.setattr(building, "_fmax", lambda report: next(found))
    board = BOARDS["orangecrab-25f"]
    made, built = build(rtl, board, tmp_path / "board", x, baud=1_500_000, time_limit_s=300)
    assert built.fmax_mhz == 40.0
    assert 27 < built.clock_mhz < 30
    assert built.used["EHXPLLL"] == (1, 2)
    with made.gates(made.folder / "routed.json") as gates:
        talked = made.talk(gates, samples=3, time_limit_s=100)
    assert (talked.samples, talked.mismatches) == (3, 0)
    assert b"LFE5U-25F" in (tmp_path / "board" / "bitstream.bit").read_bytes()[:200]


@needs_nextpnr
def test_what_does_not_fit_is_told_in_numbers(rtl, x, tmp_path):
    small = replace(ICEBREAKER, title="small", options=("--lp384", "--package", "qn32"), clock="13", rx="1", tx="2")
    with pytest.raises(DoesNotFit, match=r"does not fit small: \d+ ICESTORM_LC of 384; give a larger board"):
        build(rtl, small, tmp_path / "board", x, time_limit_s=300)
