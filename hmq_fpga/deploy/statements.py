"""Source text compared by what it says: statement by statement, whatever its layout, comments and pragmas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path

MOST = 20  # differences of one file that are told
_LONGEST = 120  # characters of a value that are told
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*#\s*pragma[^\n]*", re.DOTALL | re.MULTILINE)
_SHELL_COMMENT = re.compile(r"^\s*#(?!!)[^\n]*", re.MULTILINE)
_SCRIPTS = (".sh", ".tcl", ".yml", ".ys", ".json", ".xdc", ".sdc")
Named = Callable[[str, str], str]  # a statement and the block it stands in, to the tensor that it is about


def differences(expected: Path, actual: Path, shown: str, named: Named) -> list[str]:
    """One line for each statement of a file that another file should have and has otherwise.

    Args:
        expected: what should be there.
        actual: what is.
        shown: its name for people.
        named: gives the tensor of a statement.
    """
    if not actual.is_file():
        return [f"{shown}: is missing"]
    right, found = expected.read_bytes(), actual.read_bytes()
    if right == found:
        return []
    try:
        rights, founds = (list(_statements(data.decode(), expected.suffix)) for data in (right, found))
    except UnicodeDecodeError:
        return [f"{shown}: is no text"]
    lines: list[str] = []
    for tag, i, j, k, m in SequenceMatcher(None, rights, founds, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        for n in range(max(j - i, m - k)):
            block, wanted = rights[i + n] if i + n < j else ("", "")
            other, has = founds[k + n] if k + n < m else ("", "")
            tensor = named(wanted or has, block or other)
            lines.append(f"{shown}: {tensor + ': ' if tensor else ''}{_told(wanted, has)}")
    return lines[:MOST]


def _statements(text: str, suffix: str) -> Iterator[tuple[str, str]]:
    """Statements, each behind the line that opens its block."""
    if suffix in _SCRIPTS:
        yield from (("", line.strip()) for line in _SHELL_COMMENT.sub("", text).splitlines() if line.strip())
        return
    blocks = [""]
    for piece in re.findall(r"[^;{}\n]*\n(?=\s*#)|[^;{}]*[;{}]|[^;{}]+$", _COMMENT.sub("\n", text)):
        statement = " ".join(piece.split())
        if statement and statement != ";":
            yield blocks[-1], statement
        if statement.endswith("{"):
            blocks.append(statement[:-1].strip() or blocks[-1])
        elif statement.endswith("}") and len(blocks) > 1:
            blocks.pop()


def _told(wanted: str, has: str) -> str:
    """What differs between two statements."""
    if not wanted or not has:
        return f"{_short(has)!r} is too much" if has else f"{_short(wanted)!r} is missing"
    rights, founds = (re.findall(r"[^\s,<>()\[\];{}]+(?:<[^<>]*>)?|<[^<>]*>", text) for text in (wanted, has))
    if len(rights) != len(founds):
        return f"{_short(has)!r} in place of {_short(wanted)!r}"
    at = [n for n, (a, b) in enumerate(zip(rights, founds, strict=True)) if a != b]
    if not at:
        return f"{_short(has)!r} in place of {_short(wanted)!r}"
    first = at[0]
    more = f", and {len(at) - 1} more" if len(at) > 1 else ""
    where = f" (item {first})" if len(rights) > 12 else f" in {_short(wanted)!r}"
    return f"{founds[first]}, expected {rights[first]}{where}{more}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
