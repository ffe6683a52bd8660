"""Errors that a user can correct."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral


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


def check_keys(setting: str, given: Mapping[str, object], known: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Check the keys of a dict in a config.

    Raises:
        SettingError: a key is unknown, or one of ``needed`` is missing.
    """
    for key in given:
        if key not in known:
            raise SettingError(f"{setting} has an unknown key {key!r}; it takes {', '.join(known)}")
    for key in needed:
        if key not in given:
            raise SettingError(f"{setting} needs {key!r}")


def check_whole_number(setting: str, value: object, least: int | None = None) -> None:
    """Check a whole number in a config; True and 2.0 are none.

    Raises:
        SettingError: ``value`` is no whole number, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        raise SettingError(
            f"{setting} must be a whole number{'' if least is None else f' of at least {least}'}, got {value!r}"
        )


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
