import json
import re

import pytest

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.pages import run_plots as plots
from hmq_fpga.study.pages.run_page import write_page
from tests.study.pages import HOSTILE, Page, make_run, tensor


def page_of(folder):
    return Page(write_page(folder).read_text(encoding="utf-8"))


def test_says_what_came_out(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    for words in (
        "✓ Bit-exact qkeras and csim equal the integer reference in every value of 540 test samples",
        "accuracy, quantized 95.37 % float 96.48 %",
        "8.587 asked for 8",
        "4.25 asked for 4",
        "fc.weight weight ap_fixed<3,-1> 3 2 -2 2 -4 4 096",
        "quartiles and median (box)",
        "fc.weight 4 → 3.",
        "csynth Vitis HLS xcvu13p 5 12 345 – 0 – 12 1",
        "hmq-fpga run config.yaml , where config.yaml is",
        "task: digits_mlp rw: 8.0 ra: 4.0 bits: [2, 3, 4] method: hmq seed: 3",
        "5b5b",
        "torch 2.13.0",
        "search done 12.3 parity failed –",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 3
    assert "data:" not in page.text


def test_begins_with_accuracy_and_what_it_costs(tmp_path):
    run = make_run(tmp_path / "run")
    cost = "accuracy, quantized 95.37 % float 96.48 % LUT 12 345 csynth, by Vitis HLS latency, cycles 12 60 ns at 5 ns"
    assert cost in page_of(run).text
    (run / "resources.json").write_text("[]")
    record = json.loads((run / "run.json").read_text())
    record["metrics"]["bops"] = 239616
    (run / "run.json").write_text(json.dumps(record))
    assert "float 96.48 % bits · MACs 239 616 7 488 multiplications" in page_of(run).text


def test_says_what_the_hardware_puts_out(tmp_path):
    run = make_run(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["metrics"]["outputs"] = "values before Tanh; apply Tanh"
    (run / "run.json").write_text(json.dumps(record))
    assert "Outputs of the hardware: values before Tanh; apply Tanh" in page_of(run).text


def test_broken_parity_stands_at_the_top(tmp_path):
    page = page_of(make_run(tmp_path / "run", mismatches=12))
    assert "✗ Not bit-exact csim: 12 of 5 400 values differ, tensor “fc” first." in page.text
    assert "✓" not in page.text
    assert page.text.index("✗") < page.text.index("accuracy")


def test_needs_nothing_from_elsewhere(tmp_path):
    run = make_run(tmp_path / "run")
    page = page_of(run)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    for key, value in page.attributes:
        assert not key.startswith("on")
        assert key != "src"
        if key in ("href", "xlink:href"):
            assert value.startswith("#")
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for key, value in page.attributes if key == "xlink:href"}
    assert used <= set(ids)


def test_hostile_names_are_text(tmp_path):
    run = make_run(tmp_path / "run", name=HOSTILE, layer=HOSTILE, mismatches=1)
    page = page_of(run)
    assert "script" not in page.tags
    assert page.tags.count("style") == 1 + 3  # the page's own, and one of each figure
    assert page.text.count('alert("1")') >= 8  # title, heading, verdict, table, figure, notes, settings
    assert "{{ 7 * 7 }}" in page.text


def test_same_bytes_for_the_same_run(tmp_path):
    first = write_page(make_run(tmp_path / "a")).read_bytes()
    assert write_page(tmp_path / "a").read_bytes() == first
    assert write_page(make_run(tmp_path / "b")).read_bytes() == first
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".html"] + [".json"] * 7


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("scheme", "parity", "resources", "search", "finetune"):
        (run / f"{name}.json").unlink()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "metrics": {}, "stages": {}}))
    page = page_of(run)
    assert "Parity was not checked" in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize("missing", ["step", "loss", "rate_target", "rate_expected", "rate_actual", "temperature"])
def test_history_may_lack_a_key(tmp_path, missing):
    run = make_run(tmp_path / "run")
    history = json.loads((run / "search.json").read_text())
    del history[missing]
    (run / "search.json").write_text(json.dumps(history))
    assert page_of(run).tags.count("svg") == (2 if missing == "step" else 3)


@pytest.mark.parametrize("name", ["run", "scheme", "parity", "resources", "search"])
def test_a_damaged_file_is_named(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / f"{name}.json").write_text("{")
    with pytest.raises(InvalidInput, match="run"):
        write_page(run)
    assert not (run / "report.html").exists()


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_long_names_leave_room_for_the_figure():
    path = "encoder.stage3.block7.branch2.conv1.weight"
    words = texts(plots.formats_figure([tensor(path, "weight", 3, 0)]))
    assert any(word.startswith("…") and path.endswith(word[1:]) for word in words)


def test_figure_shows_values_against_their_format():
    tensors = [tensor("a", "weight", 4, 0), tensor("b", "input", 8, 1)]
    boxes = {"tensors": {"a": {"log2": [-20, -12, -3, -2, -1, 4]}, "b": {"log2": []}}}
    drawn = plots.formats_figure(tensors, boxes)
    plain = plots.formats_figure(tensors)
    assert "−12" in set(texts(drawn)) - set(texts(plain))  # the axis reaches over all values
    assert drawn.count('id="formats-line2d') > plain.count('id="formats-line2d')


def test_figure_shows_every_tensor_with_its_bits():
    tensors = [tensor(f"layer{i}", "weight", bits, -i) for i, bits in enumerate([2, 5, 8])]
    words = texts(plots.formats_figure(tensors))
    positions = [words.index(f"layer{i}") for i in range(3)]
    assert positions == sorted(positions)
    assert {"2", "5", "8", "weight"} <= set(words)
    assert "activation" not in words
