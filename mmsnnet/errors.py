"""Mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in a command, a config or a file. Its message is one line that names what to change.

    The tools print that line without a traceback, wherever the error is raised: while building, in a loop, in a worker
    of a data loader.
    """


class SettingError(UserError, ValueError):
    """A setting is wrong, or contradicts another setting or the data."""


class DataError(UserError, ValueError):
    """A file of the data cannot be read, or its values have no clear meaning."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that a setting or another file names does not exist."""
