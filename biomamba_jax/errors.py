"""The one exception that users are meant to read: what is wrong, where, and the remedy, in one line."""


class UserError(Exception):
    """Bad input, an impossible setting or a missing extra. The commands print its message and exit with status 1."""
