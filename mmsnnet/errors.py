"""Errors that a user can correct."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a command, a config or a file.

    The message is one line that names what to change. The tools print it without a traceback, even if it is raised in a
    training loop or in a worker of a data loader.
    """


class SettingError(UserError, ValueError):
    """A setting is wrong, or contradicts another setting or the data."""


class DataError(UserError, ValueError):
    """A file of the data cannot be read, or its values have no clear meaning."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that a setting or another file names does not exist."""


class MissingPackageError(UserError, ImportError):
    """A package that an extra of mmsnnet installs is missing."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra to install if an import in the block fails; also a decorator.

    Raises:
        MissingPackageError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise MissingPackageError(f"{package} is missing: pip install 'mmsnnet[{extra}]'") from error
