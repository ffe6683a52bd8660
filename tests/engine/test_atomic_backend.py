"""Files that mmengine writes are whole or as they were, wherever a write ends."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine
import pytest
from mmengine.fileio import FileClient, get_file_backend
from mmengine.runner import save_checkpoint

from mmsnnet.engine.atomic_backend import AtomicLocalBackend
from mmsnnet.files import writing
from mmsnnet.files.writing import abandoned_files, write_atomically
from tests.conftest import ending

OLD, NEW = b"old" * 1000, b"newer" * 100_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["write", "fsync", "replace", "replaced"])
def test_a_killed_write_leaves_the_old_file_or_the_new_one(moment: str, path: Path) -> None:
    def write() -> None:
        if moment == "write":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # in the midst of it, as SIGKILL would
        elif moment == "replaced":
            replace = os.replace
            os.replace = lambda *args: die(replace(*args))
        else:
            setattr(os, moment, die)
        AtomicLocalBackend().put(NEW, path)

    assert ending(write) == -(signal.SIGXFSZ if moment == "write" else signal.SIGKILL)
    assert path.read_bytes() == (NEW if moment == "replaced" else OLD)
    left = list(abandoned_files(path.parent))
    assert len(left) == (moment != "replaced") and {path, *left} == set(path.parent.iterdir())


@pytest.fixture
def file_limit() -> Iterator[int]:
    """No file of this process can have more bytes, as where a disk is full."""
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE), len(NEW) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", ["put", "put_text", "save_checkpoint"])
def test_a_write_that_fails_leaves_all_as_it_was(how: str, path: Path, file_limit: int) -> None:
    with pytest.raises(OSError) as found:
        if how == "put":
            AtomicLocalBackend().put(NEW, path)
        elif how == "put_text":
            AtomicLocalBackend().put_text(NEW.decode(), path)
        else:
            save_checkpoint({"bytes": NEW}, str(path))
    assert found.value.errno == errno.EFBIG
    assert os.listdir(path.parent) == ["file"] and path.read_bytes() == OLD


def test_all_local_paths_are_written_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (dict(uri=str(path)), dict(uri=path), dict(backend_args=dict(backend="local"))):
        assert type(get_file_backend(**arguments)) is AtomicLocalBackend
    assert type(get_file_backend(path, enable_singleton=True)) is AtomicLocalBackend
    for arguments in (dict(uri=path), dict(file_client_args=dict(backend="disk"))):
        assert type(FileClient.infer_client(**arguments).client) is AtomicLocalBackend
    written = []
    monkeypatch.setattr(writing.os, "replace", lambda _, target: written.append(target))
    mmengine.dump({}, path, file_format="json")
    save_checkpoint({}, str(path))
    assert written == [path, path]


def test_what_is_written_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contents before it gets its name, and the name before anything else is removed."""
    calls: list[Any] = []
    sync, replace = os.fsync, os.replace

    def record(name: str, call: Any) -> Any:
        def recorded(target: Any, *more: Any) -> None:
            is_folder = isinstance(target, int) and os.path.isdir(f"/proc/self/fd/{target}")
            calls.append(f"{name} of the folder" if is_folder else name)
            call(target, *more)

        return recorded

    monkeypatch.setattr(os, "fsync", record("fsync", sync))
    monkeypatch.setattr(os, "replace", record("replace", replace))
    write_atomically(path, NEW)
    assert calls == ["fsync", "replace", "fsync of the folder"]


def test_what_mmengine_s_own_writes_is_written_alike(path: Path) -> None:
    """Folders are made, links stay, and what is no file is written to all the same."""
    backend = AtomicLocalBackend()
    backend.put(memoryview(NEW), path.parent / "a" / "b")
    assert (path.parent / "a" / "b").read_bytes() == NEW
    (path.parent / "link").symlink_to(path.name)
    backend.put(NEW, path.parent / "link")
    assert (path.parent / "link").is_symlink() and path.read_bytes() == NEW
    backend.put_text("ä\nö", path, encoding="latin-1")
    assert path.read_bytes() == b"\xe4\n\xf6"
    backend.put(NEW, os.devnull)
    backend.put_text("text", os.devnull)
    assert not os.path.isfile(os.devnull)
    with pytest.raises(IsADirectoryError):
        backend.put(NEW, path.parent)


def test_only_what_a_killed_write_left_is_called_so(tmp_path: Path) -> None:
    names = [".0123456789abcdef.tmp", ".0123456789abcdeg.tmp", "0123456789abcdef.tmp", ".0123456789abcdef.tmp2", ".tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".fedcba9876543210.tmp").mkdir()
    (tmp_path / ".aaaaaaaaaaaaaaaa.tmp").symlink_to("/elsewhere")
    assert list(abandoned_files(tmp_path)) == [tmp_path / names[0]]
