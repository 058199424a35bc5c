"""Errors that a user can mend; the command line turns each into one line and exit code 2."""

from typing import NoReturn


class InvalidInput(ValueError):
    """Bad data, model, configuration or file: the message says what, where, and the remedy."""


class UnsupportedLayer(InvalidInput, TypeError):
    """A module or operation outside the supported set; the message names its path and type."""


def assert_never(value: NoReturn) -> NoReturn:
    """End a `match` over a closed set; `typing.assert_never` is missing in Python 3.10.

    The type checker reports each case that is left over. None is reached at run time.
    """
    raise AssertionError(f"not of the closed set: {value!r}")
