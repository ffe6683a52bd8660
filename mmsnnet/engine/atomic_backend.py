"""mmengine's storage of local files, with writes that are whole or not at all.

mmengine writes checkpoints straight over what is there, so that a process that is killed on the way leaves a cut-off
file. Importing this module puts the backend below in the place of mmengine's for local paths, through its own
registries of them, for the whole process: all runners and strategies write by it, and so does ``mmengine.dump``.
"""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.fileio import FileClient, LocalBackend, register_backend
from mmengine.fileio.io import backend_instances

from mmsnnet.files.writing import write_atomically


class AtomicLocalBackend(LocalBackend):
    """mmengine's ``LocalBackend`` that writes by :func:`mmsnnet.files.writing.write_atomically`."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        if _is_special(filepath):
            super().put(obj, filepath)
        else:
            write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        if _is_special(filepath):
            super().put_text(obj, filepath, encoding)
        else:
            write_atomically(filepath, obj.replace("\n", os.linesep).encode(encoding))


def _is_special(path: str | Path) -> bool:
    """Whether there is a device, a pipe or a folder, which nothing can be put in the place of."""
    return os.path.exists(path) and not os.path.isfile(path)


register_backend("local", AtomicLocalBackend, force=True, prefixes="")
# By its older name, of ``file_client_args``.
FileClient.register_backend("disk", AtomicLocalBackend, force=True)
# Those of mmengine's that were made before are kept for reuse.
for key in [key for key, backend in backend_instances.items() if type(backend) is LocalBackend]:
    del backend_instances[key]
