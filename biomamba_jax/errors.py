"""The exception for errors that a user can correct."""


class UserError(ValueError):
    """Bad input, an impossible setting or a missing extra.

    The message is one line: what is wrong, where, and the remedy. The commands print it and exit with status 1.
    """
