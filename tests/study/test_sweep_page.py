import json
import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.pages.sweep_page import write_sweep_page
from hmq_fpga.study.sweep import pareto, table
from hmq_fpga.study.sweep.view import SweepView
from tests.study.pages import HOSTILE, make_run

COLOURS = """[getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector("#chart text")).fill]"""
A4 = 680  # CSS pixels between the margins
PHONE = {"width": 360, "height": 740}


def make_sweep(folder, *, name="digits_mlp", layer="fc", mismatches=0):
    """Two rates with two seeds each, one of them failed, as they are stored."""
    folder.mkdir()
    runs, errors = [], {}
    for number, (rw, seed) in enumerate([(8.0, 0), (8.0, 1), (12.0, 0), (12.0, 1)]):
        run = f"hmq-rw{rw:g}-ra4-seed{seed}"
        path = make_run(folder / run, name=name, layer=layer, mismatches=mismatches)
        record = json.loads((path / "run.json").read_text())
        record["config"] |= {"rw": rw, "seed": seed}
        record["stages"] = {"parity": {"state": "done", "seconds": 1.0}}
        record["metrics"] |= {
            "qnet_accuracy": 0.95 - 0.005 * number,
            "rw_actual": rw + 0.1 * seed,
            "bops": 90000 - number,
        }
        record["metrics"] |= {"parity_passed": not mismatches, "zero_weights": 0.25}
        (path / "run.json").write_text(json.dumps(record))
        (path / "report.html").touch()
        runs.append({"folder": run, "config": record["config"]})
    errors[run] = f"{HOSTILE} went wrong"
    settings = {
        "task": name,
        "rw": [8, 12],
        "ra": [4],
        "methods": ["hmq"],
        "seeds": [0, 1],
        "settings": {"zeros": None},
    }
    table.write_sweep(folder, {"settings": settings, "runs": runs, "errors": errors})
    return folder


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


class Visit:
    """A page in the browser, with all that it says and asks for."""

    def __init__(self, browser, file):
        self.page = browser.new_page(viewport=PHONE)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        assert self.asked == [file.as_uri()]

    def circles(self):
        return self.page.locator("#chart circle.run")


def test_page_works_on_a_phone_without_network(browser, tmp_path):
    visit = Visit(browser, write_sweep_page(make_sweep(tmp_path / "sweep")))
    page = visit.page
    assert page.locator("h1").inner_text() == "digits_mlp"
    assert visit.circles().count() == 3
    visit.circles().first.click()
    assert page.locator("#detail").inner_text().startswith("hmq-rw8-ra4-seed0 · bit-exact · actual R_w 8")
    before = page.locator("#chart").inner_html()
    page.select_option("#x", label="bits · MACs")
    assert page.locator("#chart").inner_html() != before
    assert visit.circles().count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.locator("td.good").count() == 2 + 3  # two rates, three runs
    assert "R_w 8" in page.locator(".choice").inner_text()
    bottom = page.locator(".choice").bounding_box()
    assert bottom["y"] + bottom["height"] < PHONE["height"]  # the first screen answers
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate(COLOURS))
    assert not set(colours[0]) & set(colours[1])
    page.emulate_media(media="print")
    page.set_viewport_size({"width": A4, "height": 1000})
    wide = page.evaluate("[...document.querySelectorAll('.wide')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(inside <= outside for inside, outside in wide), wide
    assert page.locator("#chart svg").bounding_box()["height"] > 100
    assert len(page.pdf()) > 10_000
    page.locator("table a").first.click()
    assert page.url.endswith("/hmq-rw8-ra4-seed0/report.html")
    assert visit.said == []


def test_hostile_strings_are_text(browser, tmp_path):
    visit = Visit(browser, write_sweep_page(make_sweep(tmp_path / "sweep", name=HOSTILE, layer=HOSTILE)))
    assert visit.page.locator("h1").inner_text() == HOSTILE
    assert visit.page.locator("script").count() == 2  # the data and ours
    assert visit.circles().count() == 3
    assert f"{HOSTILE} went wrong" in visit.page.locator("td.error").inner_text()
    assert visit.said == []


def test_a_script_that_is_not_ours_is_refused(browser, tmp_path):
    file = write_sweep_page(make_sweep(tmp_path / "sweep"))
    file.write_text(file.read_text().replace("</body>", "<script>alert(1)</script></body>"))
    visit = Visit(browser, file)
    assert len(visit.said) == 1
    assert "Content Security Policy" in visit.said[0]


def test_broken_parity_stands_at_the_top(tmp_path):
    text = write_sweep_page(make_sweep(tmp_path / "sweep", mismatches=3)).read_text()
    assert "3 of 4 runs finished, 3 not bit-exact" in text
    assert "✓" not in text


def test_same_bytes_for_the_same_sweep(tmp_path):
    def made(folder):
        write_sweep_page(folder)
        table.write_table(folder)
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    first = made(make_sweep(tmp_path / "a"))
    assert made(tmp_path / "a") == first
    assert made(make_sweep(tmp_path / "b")) == first
    assert {
        f"{name}.{kind}"
        for name in ("accuracy_rw", "accuracy_lut", "accuracy_bops", "formats", "search")
        for kind in ("svg", "png")
    } == {path.name for path in first if path.parent.name == "figures"}


def test_a_sweep_that_has_just_begun(browser, tmp_path):
    folder = make_sweep(tmp_path / "sweep")
    for run in folder.glob("hmq-*"):
        shutil.rmtree(run)
    visit = Visit(browser, write_sweep_page(folder))
    assert "0 of 4 runs finished" in visit.page.locator(".verdict").inner_text()
    assert visit.said == []


def test_live_table_says_what_is_done_and_what_is_at_work(tmp_path, capsys, monkeypatch):
    folder = make_sweep(tmp_path / "sweep")
    names = [f"hmq-rw{rw}-ra4-seed{seed}" for rw in (8, 12) for seed in (0, 1)]
    running = json.loads((folder / names[1] / "run.json").read_text())
    running["stages"]["search"] = {"state": "running"}
    (folder / names[1] / "run.json").write_text(json.dumps(running))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with SweepView() as view:
        view.begin(folder, names)
        view.look(names[:3])
        view.ended(names[0], None)
        view.ended(names[2], "[bold]it broke")
    shown = capsys.readouterr().err
    for words in ("2 of 4 runs", "R_w 8.00  95  bit-exact", "[bold]it broke", "search"):
        assert words in shown, words


def test_regression_is_judged_by_its_error(browser, tmp_path):
    folder = make_sweep(tmp_path / "sweep")
    for path in folder.glob("hmq-*/run.json"):
        record = json.loads(path.read_text())
        record["metrics"] |= {"float_accuracy": None, "qnet_accuracy": None, "float_mse": 0.011, "qnet_mse": 0.0125}
        path.write_text(json.dumps(record))
    visit = Visit(browser, write_sweep_page(folder))
    assert "test squared error" in visit.page.locator("table").first.inner_text()
    assert "0.0125" in visit.page.locator("table").first.inner_text()
    assert visit.circles().count() == 3
    assert visit.said == []
    assert table.write_table(folder)[0]["qnet_mse"] == 0.0125


def test_damaged_sweep_is_named(tmp_path):
    folder = make_sweep(tmp_path / "sweep")
    (folder / "sweep.json").write_text("{")
    with pytest.raises(InvalidInput, match="not the folder of a sweep"):
        write_sweep_page(folder)


MORE = pareto.Axis(key="a", label="a", better="more")
LESS = pareto.Axis(key="b", label="b", better="less")


def test_front_is_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), None, (3.0, 6.0), (3.0, 6.0), (0.5, 5.0)]
    assert pareto.front(points, MORE, LESS) == [1, 4, 5]
    assert pareto.front(points, LESS, LESS) == [6, 1]
    assert pareto.front([], MORE, LESS) == []


def sweep_rows(*choices):
    """Rows of `(R_w, accuracies, LUTs)`."""
    common = {"state": "done", "method": "hmq", "ra_target": 4, "parity_passed": True, "bops": 1}
    return [
        {**common, "rw_target": rw, "qnet_accuracy": accuracy, "trace_lut": lut}
        for rw, accuracies, lut in choices
        for accuracy in accuracies
    ]


def test_the_cheapest_within_the_standard_error_is_recommended():
    rows = sweep_rows(
        (4, (0.99, 0.97), 900), (8, (0.978, 0.975), 500), (10, (0.96, 0.95), 400), (12, (0.93, 0.93), 300)
    )
    choice = pareto.recommended(rows)
    assert choice.error == pytest.approx(((2 + 0.045 + 0.5 + 0) / 4 / 2) ** 0.5)  # of variances within the choices
    assert [g.asked for g in (choice.taken, choice.best, choice.cheaper)] == ["R_w 8", "R_w 4", "R_w 10"]
    assert choice.lost() == pytest.approx(97.65 - 95.5)
    one = pareto.recommended(sweep_rows((4, (0.98,), 900), (8, (0.98,), 500), (10, (0.97,), 400)))
    assert (one.taken.asked, one.error, one.lost()) == ("R_w 8", None, pytest.approx(1.0))
    broken = [row | {"parity_passed": row["rw_target"] != 8} for row in rows]
    assert pareto.recommended(broken).taken.asked == "R_w 4"
    unknown = [row | {"trace_lut": None, "bops": row["trace_lut"]} for row in rows]
    assert pareto.recommended(unknown).cost == pareto.BOPS
    assert pareto.recommended([row | {"state": "open"} for row in rows]) is None


def test_spread_of_a_group_needs_every_seed():
    rows = [{"state": "done", "method": "m", "rw_target": 8, "ra_target": 4, "a": a} for a in (1.0, 4.0, None)]
    (group,) = pareto.groups(rows[:2])
    assert group.spread(MORE) == (2.5, 1.0, 4.0)
    (group,) = pareto.groups(rows)
    assert group.spread(MORE) is None


def test_luts_of_one_stage_only():
    rows = [{"trace_lut": 5, "csynth_lut": 7}, {"trace_lut": 6}]
    assert pareto.lut_axis(rows).key == "trace_lut"
    assert pareto.lut_axis(rows[:1]).key == "csynth_lut"
    assert pareto.lut_axis([{}]) is None


def test_clock_and_latency_are_axes_of_their_own():
    axes = {
        axis.key: axis
        for axis in pareto.axes([{"qnet_accuracy": 0.9, "route_fmax_mhz": 90.0, "route_latency_ns": 50.0}])
    }
    assert (axes["route_fmax_mhz"].better, axes["route_fmax_mhz"].label) == ("more", "Fmax, MHz (route)")
    assert (axes["route_latency_ns"].better, axes["route_latency_ns"].label) == ("less", "latency, ns (route)")
