"""The one exception that means: what the user gave is wrong."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names file, key, value and remedy."""
