"""The kinds of error that a command tells apart by its exit code."""


class InputError(ValueError):
    """Bad configuration or input: exit 2. One line: what was found, where, what was expected, what to do."""


class DivergedError(RuntimeError):
    """The loss is no longer a number; the last checkpoint is from before."""


class RunFailedError(RuntimeError):
    """A run that ended badly and has said why, its traceback in train.log: exit 1."""
