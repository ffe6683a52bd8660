"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes ``data`` to ``path``, whole or not at all, and creates the folders that lead to it. When this returns, the
    file is on the disk: what it replaces may be deleted. A link stays one, to the new contents.

    Raises:
        OSError: it cannot be written (no room, no permission, ...); what was there before is as it was.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def abandoned_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """What :func:`write_atomically` left in a folder where it was killed on the way."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


def _sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on the disk, as fsync does with what is in them."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that do it for files alone
            raise
    finally:
        os.close(descriptor)
