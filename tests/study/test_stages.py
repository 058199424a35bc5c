import json
from dataclasses import replace

import pytest

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study.run.stages import RunFolder, Stage, digest_of, read_record, write_json


class Work:
    """Writes a file with its text; counts its calls and can be made to fail."""

    def __init__(self, name, text):
        self.name, self.text, self.calls, self.error = name, text, 0, None

    def __call__(self, new):
        self.calls += 1
        (new / self.name).write_text(self.text)
        if self.error:
            raise self.error
        return {"length": len(self.text)}


@pytest.fixture
def two():
    first, second = Work("a.txt", "one"), Work("b.txt", "two")
    return [
        Stage(name="first", settings={"x": 1}, needs=(), makes=("a.txt",), work=first),
        Stage(name="second", settings={}, needs=("first",), makes=("b.txt",), work=second),
    ]


def run_all(path, stages):
    folder = RunFolder(path)
    with folder.opened():
        folder.save()
        return [folder.run(stage) for stage in stages], folder.record


def test_done_is_not_repeated(tmp_path, two):
    assert run_all(tmp_path / "run", two)[0] == [True, True]
    ran, record = run_all(tmp_path / "run", two)
    assert ran == [False, False]
    assert record["stages"]["first"]["state"] == "done"
    assert record["stages"]["first"]["metrics"] == {"length": 3}


def test_changed_settings_repeat_what_depends_on_them(tmp_path, two):
    run_all(tmp_path, two)
    changed = replace(two[0], settings={"x": 2})
    assert run_all(tmp_path, [changed, two[1]])[0] == [True, False]  # the same output: nothing follows
    two[0].work.text = "other"
    assert run_all(tmp_path, [two[0], two[1]])[0] == [True, True]


def test_damaged_output_is_made_again(tmp_path, two):
    run_all(tmp_path, two)
    (tmp_path / "a.txt").write_text("damaged")
    assert run_all(tmp_path, two)[0] == [True, False]
    assert (tmp_path / "a.txt").read_text() == "one"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_failure_leaves_the_old_output_and_is_recorded(tmp_path, two, error):
    run_all(tmp_path, two)
    two[0].work.error, two[0].work.text = error, "half"
    broken = replace(two[0], settings={"x": 3})
    with pytest.raises(type(error)):
        run_all(tmp_path, [broken])
    assert (tmp_path / "a.txt").read_text() == "one"
    assert read_record(tmp_path)["stages"]["first"]["state"] == "failed"
    assert not list(tmp_path.glob(".new-*"))
    two[0].work.error = None
    assert run_all(tmp_path, [broken])[0] == [True]


@pytest.mark.parametrize("first_time", [True, False])
def test_killed_in_a_stage_is_repeated(tmp_path, two, first_time):
    """What SIGKILL leaves: a stage marked as running and a half-written sibling."""
    run_all(tmp_path, two[:1])
    record = json.loads((tmp_path / "run.json").read_text())
    record["stages"]["first"] = {"state": "running", "inputs": record["stages"]["first"]["inputs"]}
    write_json(tmp_path / "run.json", record)
    (tmp_path / ".new-first").mkdir()
    (tmp_path / ".new-first" / "a.txt").write_text("half")
    if first_time:
        (tmp_path / "a.txt").unlink()
    assert run_all(tmp_path, two)[0] == [True, True]
    assert not (tmp_path / ".new-first").exists()


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InvalidInput, match=r"holds 'thesis.tex' but no run"), RunFolder(tmp_path).opened():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InvalidInput, match="is a file"), RunFolder(tmp_path / "thesis.tex").opened():
        pass


def test_foreign_record_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InvalidInput, match="not a record of this version"), RunFolder(tmp_path).opened():
        pass
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InvalidInput, match="not the folder of a run"):
        read_record(tmp_path)


def test_one_process_at_a_time(tmp_path):
    with (
        RunFolder(tmp_path / "run").opened(),
        pytest.raises(InvalidInput, match="another process"),
        RunFolder(tmp_path / "run").opened(),
    ):
        pass


def test_digest_sees_names_and_contents_but_no_libraries(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x").write_text("1")
    before = digest_of(tmp_path / "f")
    (tmp_path / "f" / "lib.so").write_text("built")
    assert digest_of(tmp_path / "f") == before
    (tmp_path / "f" / "x").rename(tmp_path / "f" / "y")
    assert digest_of(tmp_path / "f") != before
