"""Write files and folders atomically: a crash leaves the old one or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmsnnet.errors import SettingError, UserError
from mmsnnet.files.locking import locked

# Errors that only writing has: no room, no quota, read-only, too large.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class OutputError(UserError, OSError):
    """A file or folder cannot be written."""

    def __str__(self) -> str:
        return str(self.strerror)  # without Python's number


@contextmanager
def output_errors(path: object, cure: str | Callable[[], str], errors: Collection[int] = ()) -> Iterator[None]:
    """Name the file and the cure where a write fails.

    Args:
        path: of the file; None for the one that the error names.
        cure: what the user can do, or a function that tells it after the error.
        errors: the numbers of the errors that concern the file; all if empty.

    Raises:
        OutputError: for such an error. Errors that users can correct stay as they are.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError) or (errors and error.errno not in errors):
            raise
        subject = f"{path or error.filename or 'a file of the run'} cannot be written ({error.strerror or error})"
        raise OutputError(error.errno, f"{subject}: {cure() if callable(cure) else cure}") from error


def check_output(path: str | os.PathLike[str], option: str = "output", is_folder: bool = False) -> None:
    """Try to write beside a file, or into a folder, before work begins; create folders.

    Raises:
        OutputError: nothing can be written there; the message names the option to set.
    """
    place = Path(os.path.realpath(path))
    with output_errors(path, f"make room or allow writing there, or set another {option}"):
        if not is_folder and place.exists() and not place.is_file():  # a rename would replace a device
            raise OSError(errno.EISDIR, "it is a folder" if place.is_dir() else "it is no ordinary file")
        _try_to_write(place if is_folder else place.parent)
        if not is_folder:
            if os.path.ismount(place):
                raise OSError(errno.EBUSY, "it is a mount point, which cannot be replaced")
            with locked(place):  # its name has room for the lock's, and no other user's lock is in the way
                pass


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write ``data`` to ``path``, completely or not at all; create parent folders.

    When this returns, the file is on the disk, so that the caller may delete what it replaces. A symbolic link stays a
    link, to the new contents.

    Raises:
        OSError: the file cannot be written (no room, no permission, ...); the old file is unchanged.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        rename_atomically(temporary, path)


@contextmanager
def new_folder(out: str | os.PathLike[str], option: str = "output") -> Iterator[Path]:
    """Yield a temporary folder, which becomes the folder ``out`` at the end of the block.

    Raises:
        SettingError: ``out`` is a file, a mount point, or a folder that is not empty.
        OSError: it cannot be written, or another process is making it; the message names the option to set.
    """
    out = Path(os.path.realpath(out))
    cure = f"make room or allow writing there, or set another {option}"
    with output_errors(out, cure):
        _try_to_write(out.parent)
    with output_errors(out, cure, DISK_ERRORS), _temporary(out, wait=0) as temporary:
        _check_free(out)
        temporary.mkdir()
        yield temporary
        _check_free(out)
        temporary.replace(out)


@contextmanager
def new_file(out: str | os.PathLike[str], option: str = "output") -> Iterator[Path]:
    """Yield a temporary path with the name of the file ``out``, which replaces that file at the end of the block.

    For libraries that write a file by its name, and take its format from the suffix.

    Raises:
        OutputError: nothing can be written there; the message names the option to set.
    """
    check_output(out, option)
    out = Path(os.path.realpath(out))
    with _temporary(out) as folder:
        folder.mkdir()
        yield folder / out.name
        rename_atomically(folder / out.name, out)


def rename_atomically(temporary: Path, path: Path) -> None:
    """Flush a file or folder to the disk, then rename it.

    Both must be on one file system. A file is replaced in one step; for a folder there is a moment without either.
    """
    contents = sorted(temporary.rglob("*")) if temporary.is_dir() else []
    for part in (*contents, temporary):
        _sync(part)
    if temporary.is_dir() and path.is_dir():
        shutil.rmtree(path)  # a folder can only be renamed to a free name
    os.replace(temporary, path)
    _sync(path.parent)


def remove_path(path: Path) -> None:
    """Delete a file or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _temporary(path: Path, wait: float = 30) -> Iterator[Path]:
    """Hold the lock of a path, and yield a free path beside it, which is deleted at the end of the block."""
    with locked(path, wait):
        temporary = path.with_name(f".{path.name}.tmp")
        remove_path(temporary)  # of a process that was killed
        try:
            yield temporary
        except OSError as error:
            if error.errno in DISK_ERRORS:  # they name no file, or the temporary one
                error.filename = str(path)
            raise
        finally:
            remove_path(temporary)


def _try_to_write(folder: Path) -> None:
    with suppress(FileExistsError):  # a file: the next line says that it is no folder
        folder.mkdir(parents=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(65536))


def _check_free(out: Path) -> None:
    if out.is_mount():
        raise SettingError(f"{out} is a mount point, which cannot be renamed: set the output to a folder inside it")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise SettingError(f"{out} exists: set the output to a new folder, or to an empty one")


def _sync(path: Path) -> None:
    """Flush a file's contents, or a folder's names, to the disk."""
    if os.name != "posix" and path.is_dir():  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that flush files only
            raise
    finally:
        os.close(descriptor)
