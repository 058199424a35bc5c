"""What README and docs show is run, what they copy is the same, and what results pages say is in the stored rows."""

import argparse
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO

import click
import pytest

import hmq_fpga
from hmq_fpga import cli
from hmq_fpga.study.run.config import load_config
from hmq_fpga.study.sweep.grid import load_sweep
from tests import documentation, outside
from tests.documentation import NEEDS, NOT_RUN, OUTPUT, PAGES, README, ROOT

BENCHMARKS = ROOT / "benchmarks"
DEMO = "hmq-fpga run digits_mlp --rw 8"
SHELL = ("source .venv/bin/activate",)
OTHERS = {"--nthreads", "--nproc-per-node"}  # options of Dask and of torchrun
SWEEP = "sweep.yaml"
EXTRAS = {"qkeras", "qonnx", "rtl", "route", "da", "cluster", "hgq2", "docs"}  # which that page lists, too
ALL = [block for page in PAGES for block in documentation.blocks(page)]
FILES = {block.title: block.text for block in ALL if block.title}
SCRIPT_OF = {"speed": "step_time"}  # pages that have not the name of their script
SCRIPTS = [script for script in sorted(BENCHMARKS.glob("*.py")) if "__main__" in script.read_text()]
IMAGE = re.compile(r"^!\[.*\)$", re.MULTILINE)


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def call(command):
    """Run a command of ours in this process; what it prints."""
    with redirect_stdout(StringIO()) as printed:
        code = cli.app(shlex.split(command)[1:], standalone_mode=False)
    assert not code, command
    return printed.getvalue()


def parsed(words):
    """A command of ours is one that the command line takes."""
    verb, *arguments = words
    command = cli.app.commands[verb]
    if not arguments:  # the verb alone is spoken of
        return
    with click.Context(cli.app) as parent:
        command.make_context(verb, list(arguments), parent=parent)


class Taken(Exception):
    """A script's arguments were taken."""


def taken(script, arguments, monkeypatch):
    """A script parses its arguments first, and is stopped then."""

    def stop(parser, *given):
        parse(parser, *given)
        raise Taken

    parse = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(str(BENCHMARKS))
        with pytest.raises(Taken):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def checked(command, monkeypatch):
    """A command that is not run here is right all the same."""
    words = shlex.split(command)
    match words:
        case ["hmq-fpga", *arguments]:
            parsed(arguments)
        case ["torchrun", *arguments]:
            parsed(arguments[arguments.index("hmq_fpga") + 1 :])
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        case ["pip", "install", what]:
            for extra in what[what.index("[") + 1 : -1].split(","):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), command
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), command
        case ["python", script, *arguments]:
            taken(script, arguments, monkeypatch)
        case _:
            assert command in SHELL, command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that the pages show."""
    folder = tmp_path_factory.mktemp("shown")
    for title, text in FILES.items():
        (folder / title).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "dont_write_bytecode", True)
        yield folder


@pytest.fixture(scope="module")
def demo(place):
    """What the demo prints."""
    return call(DEMO)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_blocks_are_run(page, place, demo, monkeypatch):
    """In the order of the page; those of Python share their names."""
    scope = {}
    for block in documentation.blocks(page):
        if (block.mark, block.told) == (NEEDS, "qkeras") and not outside.has_qkeras():
            continue
        match block.language:
            case "python" if not block.title and block.mark != NOT_RUN:
                exec(compile(block.text, block.place, "exec"), scope)
            case "python":
                compile(block.text, block.place, "exec")
            case "sh":
                for command in block.text.splitlines():
                    if command.startswith("hmq-fpga") and block.mark != NOT_RUN:
                        call(command)
                    else:
                        checked(command, monkeypatch)
            case "yaml":
                (load_sweep if block.title == SWEEP else load_config)(place / block.title, {})
            case language:
                assert language == "text", block.place


def test_the_programs_results(place, demo):
    """What the examples leave is what they are said to leave."""
    folder = place / "hls_projects" / "digits_mlp" / "hmq-rw8-seed0"
    text = (ROOT / "docs" / "pages" / "start.md").read_text()
    shown = re.findall(r"^\| (`[\w.]+/?`(?:, `[\w.]+/?`)*) \|", text, re.MULTILINE)
    listed = [name for names in shown for name in re.findall(r"`([^`]+)`", names)]
    left_out = set() if outside.has_qkeras() else {"qkeras/"}
    assert len(listed) > 10
    assert [name for name in listed if not (folder / name).exists() and name not in EXTRAS | left_out] == []


def test_outputs_are_of_the_form_that_is_shown(demo):
    """Line by line the same labels: figures differ from machine to machine."""
    (shown,) = [block for block in documentation.blocks(README) if block.mark == OUTPUT]
    assert shown.told == DEMO
    labels = [line.split()[0] for line in demo.splitlines() if not line.startswith("left out")]
    assert [line.split()[0] for line in shown.text.splitlines()] == labels


def test_commands_in_the_text_are_right(monkeypatch):
    """Inline too, and every option is one of ours."""
    options = {name for verb in cli.app.commands.values() for option in verb.params for name in option.opts}
    options |= {name for verb in cli.app.commands.values() for option in verb.params for name in option.secondary_opts}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text):
            words = " ".join(span.split())
            if words.startswith(("hmq-fpga ", "make ", "python ")):
                checked(words, monkeypatch)
            elif words.startswith("--"):
                assert words.split()[0] in options | OTHERS | {"--help"}, (page.name, words)


def test_messages_are_the_programs():
    """What troubleshooting quotes is in the code, piece by piece."""
    text = (ROOT / "docs" / "pages" / "troubleshooting.md").read_text().split("\n\n| What you see")[0]
    code = "".join(path.read_text() for path in (ROOT / "hmq_fpga").rglob("*.py"))
    quoted = [span for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for span in re.findall("`(.*?)`", cell)]
    pieces = [piece.strip() for span in quoted for piece in span.split("…") if piece.strip()]
    assert len(pieces) > 10
    assert [piece for piece in pieces if piece not in code] == []


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "pages" / "api.md").read_text()
    listed = dict(re.findall(r"^::: (\S+)\n    options: {heading: hmq_fpga\.(\w+)}$", text, re.MULTILINE))
    assert listed == {home.replace(":", "."): name for name, home in hmq_fpga._HOME.items()}


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_tables_are_copies(page):
    """Else run `python -m tests.documentation`."""
    assert documentation.copied(page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_figures_name_their_command_seeds_and_machine(page):
    text = page.read_text()
    shown = [*IMAGE.finditer(text), *(copy for copy in documentation.COPY.finditer(text) if "benchmarks/" in copy[1])]
    for match in shown:
        text = match.string[match.end() :].removeprefix("<!-- end of table -->")
        caption = text.lstrip().partition("\n\n")[0]
        assert re.match(r"\*Made by `[^`]+`", caption), caption
        assert "seed" in caption, caption
        assert re.search("x86-64|any machine|GPU", caption), caption


@pytest.mark.parametrize(
    "page",
    [
        *ROOT.glob("*.md"),
        ROOT / "hls_projects" / "README.md",
        *BENCHMARKS.glob("*.md"),
        *PAGES[1:],
        *ROOT.glob("notebooks/*.ipynb"),
    ],
    ids=lambda page: page.stem,
)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_still_runs(script, monkeypatch, capsys):
    """As far as its help: what it imports is there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert "usage" in capsys.readouterr().out


def test_make_results_makes_every_page(monkeypatch):
    """By options that the scripts take."""
    commands = re.findall(r"^\t\$\(BIN\)/(python benchmarks/.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        checked(command, monkeypatch)
    scripts = {command.split()[1] for command in commands}
    stems = (page.stem for page in BENCHMARKS.glob("*.md"))
    assert scripts >= {f"benchmarks/{SCRIPT_OF.get(stem, stem)}.py" for stem in stems}


@pytest.mark.parametrize("page", sorted(BENCHMARKS.glob("*.md")), ids=lambda page: page.stem)
def test_results_are_of_the_stored_rows(page, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows, text = json.loads(page.with_suffix(".json").read_text()), page.read_text()
    assert "Made by `python benchmarks/" in " ".join(text.split())
    assert "seed" in text
    assert text == importlib.import_module(SCRIPT_OF.get(page.stem, page.stem)).page(rows)
