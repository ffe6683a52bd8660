"""One process at a time holds a lock, and a dead one holds none."""

import gc
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from mmsnnet.errors import UserError
from mmsnnet.files import locking
from mmsnnet.files.locking import LockedError, locked
from mmsnnet.files.writing import new_folder, write_atomically


class Failed:
    """What a run that failed leaves: a lock that its garbage collection lets go."""

    def __init__(self, path: Path) -> None:
        self.itself, self.lock = self, ExitStack()
        self.lock.enter_context(locked(path, 0))


def test_a_run_that_failed_earlier_lets_no_later_one_go(tmp_path: Path) -> None:
    Failed(tmp_path / "out")
    with locked(tmp_path / "out", 0):
        gc.collect()
        other = start(lambda then: (refuse(tmp_path / "out"), then(), time.sleep(60)))
        end(other)
        assert not (tmp_path / "got").exists() and (tmp_path / ".out.lock").exists()


def refuse(path: Path) -> None:
    try:
        with locked(path, 0):
            path.with_name("got").touch()
    except LockedError:
        pass


def start(job: Callable[[Callable[[], object]], object]) -> int:
    """A copy of this process that does a job, once the job has called its argument."""
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        try:
            job(lambda: os.write(writing, b"."))
        finally:
            os._exit(0)
    os.read(reading, 1)
    return process


def hold(path: Path, then: Callable[[], object]) -> None:
    with locked(path):
        then()
        time.sleep(60)


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    holder = start(lambda then: hold(tmp_path / "out", then))
    for use in (lambda: locked(tmp_path / "out", 0), lambda: new_folder(tmp_path / "out")):
        says = rf"out is in use by process {holder} on {os.uname().nodename} since 20.*set another output"
        with pytest.raises(LockedError, match=says) as found, use():
            raise AssertionError
        assert isinstance(found.value, UserError)
    end(holder)
    with locked(tmp_path / "out", 0), locked(tmp_path / "out", 0):  # blocks may be nested
        assert os.listdir(tmp_path) == [".out.lock"]
    assert os.listdir(tmp_path) == []


def test_a_writer_waits(tmp_path: Path) -> None:
    def hold_briefly(then: Callable[[], object]) -> None:
        with locked(tmp_path / "file"):
            then()
            time.sleep(0.5)
            (tmp_path / "file").write_bytes(b"first")

    writer = start(hold_briefly)
    write_atomically(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"second" and os.waitpid(writer, 0)[1] == 0


def test_workers_do_not_hold_the_lock_of_a_dead_process(tmp_path: Path) -> None:
    def with_worker(then: Callable[[], object]) -> None:
        with locked(tmp_path, inside=True):
            if (worker := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            (tmp_path / "worker").write_text(str(worker))
            then()
            time.sleep(60)

    end(start(with_worker))
    with locked(tmp_path, 0, inside=True):
        pass
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_storage_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(locking.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        write_atomically(tmp_path / "file", b"data")
    assert os.listdir(tmp_path) == ["file"]
