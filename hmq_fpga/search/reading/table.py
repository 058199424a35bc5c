"""The operation table: how each of PyTorch's operations becomes layers.

An entry is a function with the operation's name; its arguments are those of the operation that it understands, by
PyTorch's names, the tensor that is read being `x`. Whatever else the operation takes must be as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmq_fpga.ir.errors import UnsupportedLayer
from hmq_fpga.search.reading.reader import Read, Reader

TABLE: dict[str, Read] = {}
ABOUT: dict[str, str] = {}  # what is said to users of the operations of an entry


def entry(*names: str, about: str) -> Callable[[Read], Read]:
    """Register a reader of operations, by default of the one whose name it has; `about`: what becomes of them."""

    def register(read: Read) -> Read:
        own = names or (read.__name__.strip("_"),)
        TABLE.update(dict.fromkeys(own, read))
        ABOUT[" ".join(f"`{name}`" for name in own if not name.startswith("_"))] = about
        return read

    return register


def refused(*names: str, reason: str) -> None:
    """Register operations that have no exact form."""

    def refuse(_r: Reader, **_arguments: Any) -> None:
        raise UnsupportedLayer(reason)

    for name in names:
        TABLE[name] = refuse
