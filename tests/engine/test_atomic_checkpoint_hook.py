"""A run has a whole checkpoint at every moment, and stops where it cannot write one."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn

from mmsnnet.engine.hooks import atomic_checkpoint_hook
from mmsnnet.engine.latest_checkpoint import choose_checkpoint, find_damage, latest_checkpoint
from mmsnnet.errors import UserError
from mmsnnet.files import writing
from mmsnnet.files.locking import LockedError, locked
from mmsnnet.files.writing import OutputError

REPOSITORY = Path(__file__).parents[2]


class Toy(BaseModel):
    """A model of one layer, for a runner to train in no time."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.trained = 0

    def forward(self, inputs: list[Tensor], data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode == "predict":
            return [{} for _ in inputs]
        self.trained += 1
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


class Scores(BaseMetric):
    """Two metrics that change from one evaluation to the next."""

    def __init__(self, *scores: tuple[float, float]) -> None:
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return dict(zip(("L/acc", "S/acc"), self.scores.pop(0), strict=True))


class Observer(Hook):
    """Records when it is told of a checkpoint that is to come."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def before_checkpoint(self, runner: Runner) -> None:
        self.seen.append(runner.iter)


def make_runner(folder: Path, *hooks: Any, kind: type = Runner, **settings: Any) -> Any:
    """A runner of four iterations, or two epochs of four where ``by_epoch`` is set, with a checkpoint after each and,
    where ``scores`` are given, an evaluation. Other settings are the hook's or the runner's; ``width`` is the model's.
    """
    by_epoch, scores = settings.setdefault("by_epoch", False), settings.pop("scores", ())
    own = {name: settings.pop(name) for name in ("resume", "load_from", "launcher", "cfg") if name in settings}
    optimizer = settings.pop("optimizer", dict(type="SGD", lr=0.1, momentum=0.9))
    width, iterations = settings.pop("width", 2), settings.pop("iterations", 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Toy(width)
    loader = dict(
        batch_size=2,
        dataset=[dict(inputs=torch.tensor(index / 4).expand(width)) for index in range(8)],
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )
    if scores:
        own |= dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=[Scores(*scores)])
    length = dict(by_epoch=True, max_epochs=2) if by_epoch else dict(by_epoch=False, max_iters=iterations)
    return kind(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=length | dict(val_interval=1),
        optim_wrapper=dict(optimizer=optimizer),
        default_hooks=dict(checkpoint=dict(dict(type="mmsnnet.AtomicCheckpointHook", interval=1), **settings)),
        custom_hooks=list(hooks),
        experiment_name=f"{folder.parent.name}-{folder.name}-{make_runner.count}",
        default_scope="mmengine",
        log_level="ERROR",
        **own,
    )


make_runner.count = 0


@pytest.fixture(autouse=True)
def own_names() -> Iterator[None]:
    """mmengine keeps its loggers and the like by the name of the experiment."""
    make_runner.count += 1
    yield


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".pt"))


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def weights(path: Path) -> Tensor:
    return torch.load(path, weights_only=False)["state_dict"]["layer.weight"]


def step(path: Path) -> int:
    return torch.load(path, weights_only=False)["meta"]["iter"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole_run") / "work"
    make_runner(folder).train()
    return folder


BEST = dict(scores=[(1, 5), (3, 4), (2, 6), (4, 3)], rule="greater")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(max_keep_ckpts=1),
        dict(max_keep_ckpts=2, interval=3),
        dict(interval=-1, max_keep_ckpts=1),
        dict(by_epoch=True, max_keep_ckpts=1),
        dict(BEST, save_best="auto", max_keep_ckpts=1),
        dict(BEST, save_best=["L/acc", "S/acc"], max_keep_ckpts=2),
        dict(BEST, save_best="S/acc", by_epoch=True, filename_tmpl="at_{}.pth"),
        dict(filename_tmpl="step {}.pt", out_dir="out", max_keep_ckpts=3),
        dict(published_keys=["meta", "state_dict"], max_keep_ckpts=1),
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items() if k not in BEST) or "as it is",
)
def test_what_is_left_is_what_mmengine_s_hook_leaves(settings: dict[str, Any], tmp_path: Path) -> None:
    left = []
    for index, type_ in enumerate(("CheckpointHook", "mmsnnet.AtomicCheckpointHook")):
        folder, own = tmp_path / str(index) / "work", dict(settings)
        if "out_dir" in own:
            own["out_dir"] = str(tmp_path / str(index) / own["out_dir"])
        make_runner(folder, type=type_, **own).train()
        files = folder if "out_dir" not in own else Path(own["out_dir"]) / "work"
        last = Path((folder / "last_checkpoint").read_text())
        saved = {path.name: torch.load(path, weights_only=False) for path in files.iterdir() if "pt" in path.suffix}
        published = {re.sub(r"-[0-9a-f]{8}", "-", name) for name in saved}  # digests of times
        states = [
            (file["meta"]["iter"], file["meta"]["epoch"], file["state_dict"]["layer.weight"].tolist(), sorted(file))
            for name, file in sorted(saved.items())
        ]
        left.append((published, states, last.relative_to(tmp_path / str(index))))
    assert left[0] == left[1]


def test_a_newer_one_is_whole_before_an_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, remove = [], LocalBackend.remove

    def record(backend: LocalBackend, path: str) -> None:
        newest, passed_over = latest_checkpoint(tmp_path)
        assert passed_over == [] and step(newest) > step(Path(path)) and newest.name != Path(path).name
        if "best" in path:
            others = [name for name in checkpoints(tmp_path) if "best" in name and name != Path(path).name]
            assert [find_damage(tmp_path / name) for name in others] == [None]
        removed.append(Path(path).name)
        remove(backend, path)

    monkeypatch.setattr(LocalBackend, "remove", record)
    make_runner(tmp_path, **BEST, save_best="L/acc", max_keep_ckpts=1).train()
    assert removed == [
        *("iter_1.pth", "best_L_acc_iter_1.pth", "iter_2.pth"),
        *("iter_3.pth", "best_L_acc_iter_2.pth"),
    ]
    assert checkpoints(tmp_path) == ["best_L_acc_iter_4.pth", "iter_4.pth"]


def test_a_run_that_goes_on_with_fewer_writes_a_newer_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_runner(tmp_path, max_keep_ckpts=3, iterations=3).train()
    removed, remove = [], LocalBackend.remove

    def record(backend: LocalBackend, path: str) -> None:
        removed.append((Path(path).name, checkpoints(tmp_path)[-1]))
        remove(backend, path)

    monkeypatch.setattr(LocalBackend, "remove", record)
    make_runner.count += 1
    make_runner(tmp_path, max_keep_ckpts=1, resume=True).train()
    assert removed == [(f"iter_{n}.pth", "iter_4.pth") for n in (1, 2, 3)]


MOMENTS = ("before", "in the midst", "before it has its name", "before last_checkpoint", "before the older one goes")


def train_until_killed(moment: str, folder: Path) -> None:
    """Ends by a signal while the third checkpoint is saved, of which one is kept."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    put, replace = LocalBackend.put, os.replace

    def put_or_die(backend: LocalBackend, data: bytes, path: str) -> None:
        if path.endswith(".iter_3.pth.tmp") and moment == "before":
            die()
        if path.endswith(".iter_3.pth.tmp") and moment == "in the midst":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        put(backend, data, path)

    def replace_or_die(source: Path, target: Path) -> None:
        if target.name == "iter_3.pth" and moment == "before it has its name":
            die()
        replace(source, target)
        if target.name == "iter_3.pth" and moment == "before last_checkpoint":
            die()

    LocalBackend.put, os.replace = put_or_die, replace_or_die
    if moment == "before the older one goes":
        LocalBackend.remove = lambda backend, path: die() if path.endswith("iter_2.pth") else os.remove(path)
    make_runner(folder, max_keep_ckpts=1).train()


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of a run for each moment that one was killed at. They are copies of a process of their own:
    torch refuses backward passes in a copy of one whose engine has threads, which this one may have by now."""
    folder = tmp_path_factory.mktemp("killed")
    program = """
import sys
from functools import partial
from pathlib import Path
from tests.conftest import ending
from tests.engine.test_atomic_checkpoint_hook import MOMENTS, train_until_killed
for moment in MOMENTS:
    assert ending(partial(train_until_killed, moment, Path(sys.argv[1]) / moment)) < -1, moment
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, folder], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on(moment: str, killed_runs: Path, whole_run: Path) -> None:
    folder = killed_runs / moment
    is_new = MOMENTS.index(moment) > 2
    assert latest_checkpoint(folder) == (folder / f"iter_{2 + is_new}.pth", [])
    assert set(temporary_files(folder)) == {".lock", *[".iter_3.pth.tmp"] * (moment in MOMENTS[1:3])}
    runner = make_runner(folder, max_keep_ckpts=1, resume=True)
    runner.train()
    assert runner.model.trained == 2 - is_new
    assert checkpoints(folder) == ["iter_4.pth"] and not temporary_files(folder)
    assert torch.equal(weights(folder / "iter_4.pth"), weights(whole_run / "iter_4.pth"))


@pytest.fixture
def copy(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of that folder as if its last two iterations had not been."""
    folder = Path(shutil.copytree(whole_run, tmp_path / "work"))
    for name in ("iter_3.pth", "iter_4.pth"):
        (folder / name).unlink()
    (folder / "last_checkpoint").write_text(str(folder / "iter_2.pth"))
    return folder


def test_a_cut_off_newest_one_is_passed_over_with_a_warning(copy: Path, whole_run: Path) -> None:
    os.truncate(copy / "iter_2.pth", 1000)
    runner = make_runner(copy, resume=True)
    told: list[str] = []
    runner.logger.warning = told.append
    runner.train()
    assert [text for text in told if "skipped" in text] == [
        f"checkpoint {copy / 'iter_2.pth'} is skipped: it is cut short or no checkpoint (File is not a zip file)"
    ]
    assert runner.model.trained == 3
    assert torch.equal(weights(copy / "iter_4.pth"), weights(whole_run / "iter_4.pth"))


def test_nothing_whole_to_resume(copy: Path) -> None:
    for path in copy.glob("*.pth"):
        os.truncate(path, 1000)
    with pytest.raises(
        ValueError, match=r"all checkpoints in .* are damaged .*leave out --resume to start a new run"
    ) as found:
        make_runner(copy, resume=True).train()
    assert isinstance(found.value, UserError)


def test_a_run_that_is_to_resume_and_never_began_starts_anew(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, resume=True)
    runner.train()
    assert runner.model.trained == 4


def test_load_from_is_resumed_where_it_is_given(copy: Path) -> None:
    runner = make_runner(copy, resume=True, load_from=str(copy / "iter_1.pth"))
    runner.train()
    assert runner.model.trained == 3


def test_weights_alone_are_not_resumed(copy: Path) -> None:
    torch.save({"state_dict": Toy().state_dict(), "meta": {"epoch": 1, "iter": 2}}, copy / "weights.pth")
    for kind in (Runner, FlexibleRunner):
        make_runner.count += 1
        runner = make_runner(copy, kind=kind, resume=True, load_from=str(copy / "weights.pth"))
        with pytest.raises(ValueError, match=r"weights\.pth' has weights alone"):
            runner.train()


def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(
    tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalBackend.put

    def full(backend: LocalBackend, data: bytes, path: str) -> None:
        if Path(path).name in (".iter_3.pth.tmp", ".best_L_acc_iter_2.pth.tmp"):
            put(backend, data[: len(data) // 2], path)
            raise OSError(errno.ENOSPC, "No space left on device")
        put(backend, data, path)

    for save_best, last in ((None, "iter_2.pth"), ("L/acc", "iter_2.pth")):
        folder = tmp_path / str(save_best)[0]
        monkeypatch.setattr(LocalBackend, "put", full)
        with pytest.raises(
            OutputError, match=rf"cannot be written \(No space left.*last complete one is .*{last}"
        ) as found:
            make_runner(folder, max_keep_ckpts=1, save_best=save_best, **(BEST if save_best else {})).train()
        assert found.value.errno == errno.ENOSPC
        assert set(checkpoints(folder)) - {"best_L_acc_iter_1.pth"} == {last}
        assert all(find_damage(folder / name) is None for name in checkpoints(folder))
        assert temporary_files(folder) == [".lock"]  # which this process holds
        monkeypatch.undo()
        make_runner.count += 1
        make_runner(folder, max_keep_ckpts=1, resume=True).train()
        assert torch.equal(weights(folder / "iter_4.pth"), weights(whole_run / "iter_4.pth"))


def test_a_full_disk_may_leave_no_room_for_the_name_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_checkpoint_hook, "write_atomically", full)
    with pytest.raises(OutputError, match=r"last_checkpoint cannot .*complete one is .*iter_1\.pth.*--resume"):
        make_runner(tmp_path).train()


def refused(runner: Any) -> str:
    """What is said of the folder before anything is trained."""
    with pytest.raises(OutputError) as found:
        runner.train()
    assert runner.model.trained == 0
    return str(found.value)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    said = refused(make_runner(tmp_path / "work", out_dir=str(tmp_path / "file" / "out")))
    assert f"{tmp_path / 'file' / 'out' / 'work'} cannot be written (Not a directory)" in said and "out_dir" in said

    def read_only(**kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", read_only)
    said = refused(make_runner(tmp_path / "other"))
    assert f"{tmp_path / 'other'} cannot be written (Read-only file system)" in said


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    """Two work folders of one name share a folder below ``out_dir``. The living run's files stay, a dead one's go."""
    out, mark = tmp_path / "out" / "work", tmp_path / "out" / "work" / ".iter_9.pth.tmp"

    def hold(pipe: int) -> None:
        with locked(out, inside=True):
            mark.touch()
            os.write(pipe, b"held")
            time.sleep(60)

    out.mkdir(parents=True)
    reading, writing_ = os.pipe()
    process = os.fork()
    if process == 0:
        hold(writing_)
    os.read(reading, 4)
    with pytest.raises(
        LockedError, match=rf"{out} is in use by process {process} on .* since .*--work-dir or .*out_dir"
    ):
        make_runner(tmp_path / "1" / "work", out_dir=str(tmp_path / "out")).train()
    assert mark.exists() and not checkpoints(out)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    make_runner.count += 1
    make_runner(tmp_path / "2" / "work", out_dir=str(tmp_path / "out")).train()
    assert checkpoints(out) and not temporary_files(out) and not temporary_files(tmp_path / "2" / "work")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are free."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * count + 1, count + 1, count)
        )

    set_free(0)
    return set_free


def needed(runner: Any) -> int:
    """The bytes that a run needs, as the refusal says."""
    return int(re.search(r"take up to ([\d,]+) more bytes in", refused(runner))[1].replace(",", ""))


def test_too_little_room(tmp_path: Path, free: Callable[[int], None]) -> None:
    said = refused(make_runner(tmp_path, max_keep_ckpts=1))
    assert str(tmp_path) in said and "and 0 are free" in said and "max_keep_ckpts" in said
    make_runner.count += 1
    room = needed(make_runner(tmp_path, max_keep_ckpts=1))
    free(room - 1)
    make_runner.count += 1
    assert f"and {room - 1:,} are free" in refused(make_runner(tmp_path, max_keep_ckpts=1))
    free(room)
    make_runner.count += 1
    make_runner(tmp_path, max_keep_ckpts=1).train()


def test_a_file_system_that_does_not_know_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    make_runner(tmp_path, iterations=1).train()


@pytest.mark.parametrize("hooks", [[], [dict(type="EMAHook")]], ids=["", "EMA"])
@pytest.mark.parametrize("optimizer", [dict(type="AdamW", lr=0.1), dict(type="SGD", lr=0.1, momentum=0.9)])
def test_a_checkpoint_is_no_larger_than_its_bound(
    optimizer: dict[str, Any], hooks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for records. Adam keeps two moments of each parameter, SGD with momentum one."""
    moments = 1 if optimizer["type"] == "SGD" else 2
    settings = dict(width=2_000_000, optimizer=optimizer, iterations=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        bound = needed(make_runner(tmp_path, *hooks, **settings))
    assert bound == (1 + moments + len(hooks)) * 4 * 2_000_001
    make_runner.count += 1
    make_runner(tmp_path, *hooks, **settings).train()
    size = (tmp_path / "iter_1.pth").stat().st_size
    (tmp_path / "iter_1.pth").unlink()
    assert size < bound + 100_000 and bound < 1.01 * size


@pytest.mark.parametrize(
    ("settings", "regular", "best"),
    [
        (dict(), 4, 0),
        (dict(interval=2), 2, 0),
        (dict(interval=3), 2, 0),  # the third and the last one
        (dict(interval=3, save_last=False), 1, 0),
        (dict(interval=-1), 1, 0),
        (dict(interval=-1, save_last=False), 0, 0),
        (dict(interval=1, save_begin=3), 2, 0),
        (dict(interval=3, save_begin=1), 2, 0),
        (dict(max_keep_ckpts=1), 2, 0),
        (dict(max_keep_ckpts=3), 4, 0),
        (dict(max_keep_ckpts=7), 4, 0),
        (dict(interval=1, by_epoch=True, max_keep_ckpts=1), 2, 0),
        (dict(BEST, max_keep_ckpts=1, save_best=["L/acc", "S/acc"]), 2, 3),
        (dict(BEST, max_keep_ckpts=1, save_best="auto"), 2, 2),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_room_for_what_is_kept_at_once(
    settings: dict[str, Any], regular: int, best: int, tmp_path: Path, free: Callable[[int], None]
) -> None:
    if regular == 0:
        make_runner(tmp_path, **settings).train()
        return
    weights = 4 * 3
    assert needed(make_runner(tmp_path, **settings)) == regular * 2 * weights + best * weights  # SGD with momentum


def test_a_resumed_run_has_room_where_its_checkpoints_are(copy: Path, free: Callable[[int], None]) -> None:
    """In place of those of the run, which are larger than the bound: they have records."""
    runner = make_runner(copy, max_keep_ckpts=1, resume=True)
    runner.train()
    assert runner.model.trained == 2


@pytest.mark.slow
def test_what_a_resumed_checkpoint_names_is_removed_in_this_folder_alone(copy: Path, tmp_path: Path) -> None:
    """Whether the work folder was copied, or the checkpoint is hostile."""
    other = tmp_path / "other"
    other.mkdir()
    outside = [other / name for name in ("best_L_acc_iter_1.pth", "iter_1.pth", "iter_../../other/iter_1.pth")]
    inside = [copy / name for name in ("best_L_acc_notes.pth", "best_S_acc_iter_1.pth", "notes.pth", "iter_x.pth")]
    mine = copy / "best_L_acc_iter_1.pth"
    for path in (*outside[:2], *inside, mine):
        path.touch()
    (copy / "iter_").mkdir()
    path = copy / "iter_2.pth"
    for best in (outside[0], *inside, "../other/best_L_acc_iter_1.pth", 3, None, [str(mine)], copy):
        checkpoint = torch.load(whole_path := copy / "iter_1.pth", weights_only=False)
        info = checkpoint["message_hub"]["runtime_info"]
        info["keep_ckpt_ids"] = ["/../../other/iter_1", "x", -1, True, 0.5, None, [1], 2]
        info["best_ckpt"] = str(best) if isinstance(best, Path) else best
        checkpoint["message_hub"]["resumed_keys"] |= dict(keep_ckpt_ids=True, best_ckpt=True)
        torch.save(checkpoint, path)
        make_runner.count += 1
        scores = [(float(make_runner.count), 0)] * 3
        make_runner(copy, max_keep_ckpts=1, save_best="L/acc", rule="greater", resume=True, scores=scores).train()
        assert all(path.exists() for path in (*outside[:2], *inside, whole_path))
        # Under the name that it has in a folder elsewhere, the best one of this folder has made way.
        assert mine.exists() != (Path(str(best)).name == mine.name and isinstance(best, str | Path))
        mine.touch()
        for name in ("iter_2.pth", "iter_3.pth", "iter_4.pth"):
            (copy / name).unlink(missing_ok=True)
        (copy / "last_checkpoint").write_text(str(path))


def test_the_best_by_another_metric_is_not_compared_with(tmp_path: Path) -> None:
    make_runner(tmp_path, save_best="L/acc", rule="greater", iterations=1, scores=[(90, 1)]).train()
    make_runner.count += 1
    make_runner(tmp_path, save_best="S/acc", rule="greater", iterations=2, scores=[(95, 2)], resume=True).train()
    assert "best_S_acc_iter_2.pth" in checkpoints(tmp_path)
    make_runner.count += 1
    make_runner(tmp_path, save_best="S/acc", rule="greater", iterations=3, scores=[(99, 1)], resume=True).train()
    assert "best_S_acc_iter_2.pth" in checkpoints(tmp_path)  # by the same one it is


def test_others_are_told_before_a_checkpoint(tmp_path: Path) -> None:
    observer = Observer()
    make_runner(tmp_path, observer, interval=2, save_best="L/acc", **BEST).train()
    # At each evaluation, which is after an iteration, and before the regular ones, which are saved at the end of one.
    assert observer.seen == [1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_flexible_runner_counts_right(by_epoch: bool, tmp_path: Path) -> None:
    """By itself it takes a checkpoint that is saved again after an evaluation for one further on."""
    settings = dict(kind=FlexibleRunner, by_epoch=by_epoch, save_best="L/acc")
    make_runner(tmp_path, **settings, **BEST).train()
    last, _ = latest_checkpoint(tmp_path)
    meta = torch.load(last, weights_only=False)["meta"]
    assert (meta["iter"], meta["epoch"]) == ((8, 2) if by_epoch else (4, 0))
    os.truncate(last, 100)
    make_runner.count += 1
    runner = make_runner(tmp_path, **settings, **BEST, resume=True)
    choose_checkpoint(runner)
    runner.train()
    assert runner.model.trained == (4 if by_epoch else 1) and find_damage(last) is None


# Two ranks: the first finds no room, fails to write, and chooses what to resume; the second only learns of it.
PROGRAM = """
import errno, json, os, shutil, sys
from pathlib import Path

import torch

import mmsnnet
from mmengine.fileio import LocalBackend

from mmsnnet.engine import latest_checkpoint
from tests.engine.test_atomic_checkpoint_hook import Observer, make_runner

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
observer, said = Observer(), []


def train(**settings):
    make_runner.count += 1
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None)
    runner = make_runner(
        folder / "work", observer, launcher="pytorch", cfg=dict(model_wrapper_cfg=wrapper), iterations=2, **settings
    )
    try:
        runner.train()
        said.append("nothing")
    except Exception as error:
        said.append(f"{type(error).__name__} {getattr(error, 'errno', '')}: {error}")
    said.append(runner.model.module.trained)


if rank == 0:
    usage, put = shutil.disk_usage, LocalBackend.put
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 0)
train()
if rank == 0:
    shutil.disk_usage = usage

    def full(backend, data, path):
        if path.endswith(".iter_2.pth.tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        put(backend, data, path)

    LocalBackend.put = full
train()
if rank == 0:
    LocalBackend.put = put
else:
    latest_checkpoint.latest_checkpoint = None
train(resume=True)
said.append(observer.seen)
(folder / f"said_{rank}").write_text(json.dumps(said))
# A rank that leaves while gloo's threads run may end by a signal.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_end_with_the_same_error(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks("-c", PROGRAM, tmp_path)
    said, second = (json.loads((tmp_path / f"said_{rank}").read_text()) for rank in (0, 1))
    assert said == second
    no_room, untrained, full, trained, resumed, rest, seen = said
    assert no_room.startswith("OutputError 28: ") and "and 0 are free" in no_room and untrained == 0
    assert full.startswith("OutputError 28: ") and "iter_1.pth: make room" in full and trained == 2
    assert (resumed, rest) == ("nothing", 1)
    assert seen == [0, 1, 1]  # on all ranks
