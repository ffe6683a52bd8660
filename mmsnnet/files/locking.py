"""Locks between processes: one run in a folder, one writer of a file."""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mmsnnet.errors import UserError


class LockedError(UserError, OSError):
    """Another process uses a file or folder."""


@contextmanager
def locked(
    path: str | os.PathLike[str], wait: float = 30, option: str = "output", inside: bool = False
) -> Iterator[None]:
    """Hold a lock file beside a path, or inside a folder.

    It is ``.<name>.lock`` or ``.lock``. Blocks of one thread may be nested.

    Raises:
        LockedError: another process still holds it after ``wait`` seconds; the message names it, and the option to set.
    """
    path = Path(os.path.realpath(path))
    file = path / ".lock" if inside else path.with_name(f".{path.name}.lock")
    lock = FileLock(file, mode=0o666, is_singleton=True)  # users may share a folder
    holder = " ".join(file.read_text(errors="replace").split()) if file.exists() else ""
    try:
        lock.acquire(timeout=wait)
        with suppress(OSError):  # a full disk
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            if lock.lock_counter == 1:
                file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}")
    except Timeout:
        cure = f"wait for its end, or set another {option}"
        raise LockedError(f"{path} is in use by {holder or 'another process'}: {cure}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{file.parent} has no locks ({error}): let one process at a time write there", stacklevel=3)
    try:
        yield
    finally:
        if lock.lock_counter <= 1:  # the outermost block; one of a run that failed may end after this one
            file.unlink(missing_ok=True)  # whoever has opened it sees that it is gone, and makes another
        lock.release()
