"""Where two models differ, in lines that name the place and both values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def settings(expected: Any, actual: Any, where: str = "", *, aside: tuple[str, ...] = ()) -> Iterator[str]:
    """One line for each entry that differs in nested dictionaries and lists; keys named `aside` do not count."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in [*expected, *(key for key in actual if key not in expected)]:
            if key in aside:
                continue
            if key in expected and key in actual:
                yield from settings(expected[key], actual[key], f"{where}.{key}" if where else key, aside=aside)
            else:
                yield f"{where}: {key} is {'missing' if key in expected else 'too much'}"
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for i, (wanted, has) in enumerate(zip(expected, actual, strict=True)):
            yield from settings(wanted, has, f"{where}[{i}]", aside=aside)
    elif expected != actual:
        yield f"{where.removeprefix('layers.')} is {actual!r}, expected {expected!r}"


def values(where: str, expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> list[str]:
    """A line where arrays differ: the first element, and how many more."""
    if expected.shape != actual.shape:
        return [f"{where}: a weight of shape {actual.shape}, expected {expected.shape}"]
    at = np.argwhere(expected != actual)
    if not len(at):
        return []
    index = tuple(at[0].tolist())
    more = f", and {len(at) - 1} more" if len(at) > 1 else ""
    return [f"{where}: weight {list(index)} is {actual[index]}, expected {expected[index]}{more}"]
