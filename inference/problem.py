"""The one exception that a user of the package sees."""


class Problem(Exception):
    """What is wrong, where, and what to do about it; shown as it stands, without a traceback."""
