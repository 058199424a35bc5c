"""Errors that a user can mend; the command line turns each into one line and exit code 2."""


class InvalidInput(ValueError):
    """Bad data, model, configuration or file: the message says what, where, and the remedy."""


class UnsupportedLayer(InvalidInput, TypeError):
    """A module or operation outside the supported set; the message names its path and type."""
