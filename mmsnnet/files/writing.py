"""Write files atomically: a crash leaves the old file or the new one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write ``data`` to ``path``, completely or not at all; create parent folders.

    When this returns, the file is on the disk, so that the caller may delete what it replaces. A symbolic link stays a
    link, to the new contents.

    Raises:
        OSError: the file cannot be written (no room, no permission, ...); the old file is unchanged.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
        rename_atomically(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def rename_atomically(temporary: Path, path: Path) -> None:
    """Flush a file or folder to the disk, then rename it.

    Both must be in one folder. A file is replaced in one step; for a folder there is a moment without either.
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
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
