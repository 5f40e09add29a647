"""The one kind of error that a user can mend: commands print its line and exit with 2."""


class InputError(ValueError):
    """Bad configuration or input. The message is one line: what was found, where, what was expected, what to do."""
