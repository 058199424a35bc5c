"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hmq_fpga.ir.errors import InvalidInput

LONGEST = 255  # bytes of a name, on the file systems of today


def check_path(folder: Path) -> None:
    """Raise `InvalidInput` for what no file system or no compiler takes for a folder's name."""
    if any(c in str(folder.absolute()) for c in "\n\r"):
        raise InvalidInput(f"{str(folder)!r}: no compiler takes a path with line breaks; give another folder")
    if (size := len(os.fsencode(folder.name))) > LONGEST:
        raise InvalidInput(f"{folder}: a name of {size} bytes; file systems take up to {LONGEST}; give another folder")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled; it takes its place once the block has ended without an error.

    An earlier `folder` stays as it was until then, and an error leaves nothing of the new one behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(scratch / "old")  # renamed, not emptied: half a folder is never left
        new.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
