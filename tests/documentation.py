"""The README and the pages of `docs/`: their blocks and tables. `python -m tests.documentation` copies the tables anew.

Every fenced block has a language: `python` is run, or with a title is a file; `sh` holds a command a line; `yaml` is a
file of settings; `text` is output. A comment before a block says why it is not run here, or what it needs. A table
between `<!-- table: SOURCE -->` and `<!-- end of table -->` is a copy.
"""

import re
from pathlib import Path
from typing import NamedTuple

from hmq_fpga.search.reading import supported

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs" / "pages").glob("*.md"))]
NOT_RUN, NEEDS, OUTPUT = "not run", "needs", "output of"
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|needs|output of): (?P<told>[^>]+) -->\n)?"
    r'^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
COPY = re.compile(r"(?<=<!-- table: )([^>]+)( -->\n)(.*?)(?=<!-- end of table -->)", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    mark: str
    told: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = [_block(page, text, match) for match in _BLOCK.finditer(text)]
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE)), page
    return found


def _block(page: Path, text: str, match: re.Match[str]) -> Block:
    parts = {name: value or "" for name, value in match.groupdict().items()}
    return Block(page=page, line=text.count("\n", 0, match.start("text")) + 1, **parts)


def source(name: str) -> str:
    """The table that a copy is of: of operations, or the first of a page of results, or of a section of it."""
    if name == "operations":
        rows = [f"| {names} | {becomes} |" for names, becomes in supported().items()]
        return "\n".join(["| PyTorch | becomes |", "|---|---|", *rows, ""])
    path, _, section = name.partition(", ")
    text = (ROOT / path).read_text()
    if section:
        text = text[text.index(f"# {section}\n") :]
    return re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0]


def copied(text: str) -> str:
    """A page with its copies made anew."""
    return COPY.sub(lambda match: f"{match[1]}{match[2]}\n{source(match[1])}\n", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(copied(page.read_text()))
