"""Files are complete or as they were, wherever a write ends."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmsnnet.errors import UserError
from mmsnnet.files.writing import (
    DISK_ERRORS,
    OutputError,
    check_output,
    new_file,
    new_folder,
    output_errors,
    remove_path,
    rename_atomically,
    write_atomically,
)
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
        write_atomically(path, NEW)

    assert ending(write) == -(signal.SIGXFSZ if moment == "write" else signal.SIGKILL)
    assert path.read_bytes() == (NEW if moment == "replaced" else OLD)
    left = {other.name for other in path.parent.iterdir() if other != path}
    assert left == {".file.lock", *[".file.tmp"] * (moment != "replaced")}
    write_atomically(path, NEW)
    assert os.listdir(path.parent) == ["file"]  # the next writer removes what a killed one has left


@pytest.fixture
def file_limit() -> Iterator[int]:
    """No file of this process can have more bytes, as where a disk is full."""
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE), len(NEW) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_all_as_it_was(path: Path, file_limit: int) -> None:
    with pytest.raises(OSError) as found:
        write_atomically(path, NEW)
    assert found.value.errno == errno.EFBIG and found.value.filename == str(path)
    assert os.listdir(path.parent) == ["file"] and path.read_bytes() == OLD


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


def test_folders_are_made_and_links_stay(path: Path) -> None:
    write_atomically(path.parent / "a" / "b", memoryview(NEW))
    assert (path.parent / "a" / "b").read_bytes() == NEW
    (path.parent / "link").symlink_to(path.name)
    write_atomically(path.parent / "link", NEW)
    assert (path.parent / "link").is_symlink() and path.read_bytes() == NEW
    with pytest.raises(OSError):
        write_atomically(path.parent, NEW)
    assert path.exists()


def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or sync(file))
    for name, data in ((".new", NEW), ("folder", OLD)):
        (tmp_path / name / "rank").mkdir(parents=True)
        (tmp_path / name / "rank" / "0").write_bytes(data)
    rename_atomically(tmp_path / ".new", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder" / "rank" / "0").read_bytes() == NEW
    assert synced[:3] == [str(tmp_path / ".new" / name) for name in ("rank", "rank/0")] + [str(tmp_path / ".new")]


def test_what_is_not_there_is_removed_alike(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove_path(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["file/x", "file/x/y", "folder", "/proc/x", "/proc/x/y", "/dev/full"])
def test_an_output_is_tried_before_the_work(place: str, path: Path) -> None:
    (path.parent / "folder").mkdir()
    with pytest.raises(OSError, match=rf"{place} cannot be written \(.*set another --out") as found:
        check_output(path.parent / place, "--out")
    assert isinstance(found.value, UserError) and sorted(os.listdir(path.parent)) == ["file", "folder"]


@pytest.mark.parametrize("length", [250, 255, 300])
def test_a_name_has_room_for_its_lock(length: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"File name too long.*set another --out"):
        check_output(tmp_path / ("x" * length), "--out")


def test_an_output_is_tried_with_some_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk still takes a file without any."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target, is_folder in ((path, False), (path.parent, True)):
        check_output(target, is_folder=is_folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            check_output(target, is_folder=is_folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(path.parent) == ["file"] and path.read_bytes() == OLD


def test_a_folder_is_made_as_a_whole(tmp_path: Path) -> None:
    def make(end: Any) -> None:
        with new_folder(tmp_path / "a" / "out") as folder:
            (folder / "half").touch()
            end()

    assert ending(lambda: make(die)) == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path / "a")) == [".out.lock", ".out.tmp"]
    make(lambda: None)
    assert os.listdir(tmp_path / "a") == ["out"] and os.listdir(tmp_path / "a" / "out") == ["half"]
    with pytest.raises(ValueError, match="out exists"):
        make(lambda: None)
    assert os.listdir(tmp_path / "a") == ["out"]


def test_an_error_without_a_path_names_its_own_file_and_a_cure_of_its_time() -> None:
    for filename, subject in (("a.log", "a.log"), (None, "a file of the run")):
        with (
            pytest.raises(OutputError, match=f"^{subject} cannot be written .No space left.*: make room$"),
            output_errors(None, lambda: "make room", DISK_ERRORS),
        ):
            raise OSError(errno.ENOSPC, "No space left on device", filename)
    with pytest.raises(OSError, match="lost") as found, output_errors(None, pytest.fail, DISK_ERRORS):
        raise OSError(errno.EIO, "lost")
    assert not isinstance(found.value, OutputError)


def test_a_file_that_a_library_writes_by_name_appears_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.mp4"
    with new_file(out) as temporary:
        assert temporary.suffix == ".mp4" and not out.exists()
        temporary.write_bytes(b"first")
        assert not out.exists()
    assert out.read_bytes() == b"first"
    with pytest.raises(RuntimeError, match="half way"), new_file(out) as temporary:
        temporary.write_bytes(b"sec")
        raise RuntimeError("half way")
    assert out.read_bytes() == b"first" and list(out.parent.iterdir()) == [out]
    with pytest.raises(OutputError, match=r"it is a folder.*set another --out"), new_file(tmp_path, "--out"):
        pass
