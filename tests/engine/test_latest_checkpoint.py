"""Which checkpoint a run goes on from, whatever became of its folder."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mmsnnet.engine.latest_checkpoint import find_damage, latest_checkpoint
from mmsnnet.errors import DataError
from mmsnnet.models import read_model_checkpoint

START = 1_700_000_000


def write(folder: Path, *names: str, last: str | Path | None = None) -> None:
    """Checkpoints, each a minute younger than the one before; ``last_checkpoint`` right after the one that it names, or
    after all."""
    folder.mkdir(parents=True, exist_ok=True)
    times = {name: START + 60 * index for index, name in enumerate(names)}
    for name, time in times.items():
        torch.save({"state_dict": {"weight": torch.zeros(100)}}, folder / name)
        os.utime(folder / name, (time, time))
    if last is not None:
        (folder / "last_checkpoint").write_text(str(folder / last))
        time = times.get(str(last), START + 60 * len(names)) + 1
        os.utime(folder / "last_checkpoint", (time, time))


def cut(path: Path, share: float = 0.5) -> None:
    stat = path.stat()
    os.truncate(path, int(share * stat.st_size))
    os.utime(path, (stat.st_mtime, stat.st_mtime))


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == (None, [])
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("folder", ["work", "elsewhere"])
@pytest.mark.parametrize("names", [["iter_{}.pth"] * 3, ["epoch_{}.pth"] * 3, ["at {}+of v2.pt"] * 3])
def test_the_newest_is_taken_and_cut_off_ones_are_passed_over(folder: str, names: list[str], tmp_path: Path) -> None:
    template, paths = names[0], [tmp_path / folder / name.format(500 * i) for i, name in enumerate(names, 1)]
    write(tmp_path / folder, *(path.name for path in paths), last=paths[-1].name)
    if folder == "elsewhere":
        (tmp_path / "work").mkdir()
        shutil.move(tmp_path / folder / "last_checkpoint", tmp_path / "work")

    def found() -> tuple[Path | None, list[str]]:
        return latest_checkpoint(tmp_path / "work", tmp_path / folder, template)

    assert found() == (paths[2], [])
    cut(paths[2])
    path, (warning,) = found()
    assert path == paths[1] and warning.startswith(f"checkpoint {paths[2]} is skipped: it is cut short")
    cut(paths[1], 0)
    path, passed_over = found()
    assert path == paths[0] and passed_over[1].startswith(f"checkpoint {paths[1]} is skipped: it is cut short")
    cut(paths[0], 0.9)
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged .*leave out --resume"):
        found()


def test_one_written_after_last_checkpoint_is_newer(tmp_path: Path) -> None:
    """A run was killed between the two."""
    write(tmp_path, "iter_500.pth", "iter_1000.pth", last="iter_500.pth")
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_1000.pth"
    cut(tmp_path / "iter_1000.pth")
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_500.pth"
    (tmp_path / "last_checkpoint").unlink()
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_500.pth"


def test_what_an_earlier_run_left_is_not_newer(tmp_path: Path) -> None:
    write(tmp_path, "iter_600.pth", "iter_1600.pth", "iter_500.pth", "iter_1000.pth", last="iter_1000.pth")
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_1000.pth"
    cut(tmp_path / "iter_1000.pth")
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_500.pth"
    (tmp_path / "iter_1000.pth").unlink()
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_500.pth"
    for name in ("iter_500.pth", "iter_600.pth"):
        cut(tmp_path / name)
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged"):
        latest_checkpoint(tmp_path)


def test_a_copy_that_keeps_no_times(tmp_path: Path) -> None:
    """scp writes them in the order of their names."""
    write(tmp_path, "iter_1000.pth", "iter_1500.pth", "iter_500.pth", last="iter_1500.pth")
    os.utime(tmp_path / "last_checkpoint", (START + 3600, START + 3600))
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_1500.pth"


def test_best_published_and_other_files_are_none(tmp_path: Path) -> None:
    others = ("best_mIoU_iter_900.pth", "iter_900-0a1b2c3d.pth", "iter_900.pth.bak", "vit_16.pth", "my_iter_900.pth")
    write(tmp_path, "iter_500.pth", *others)
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "iter_500.pth"
    (tmp_path / "iter_500.pth").unlink()
    assert latest_checkpoint(tmp_path) == (None, [])


def test_another_template_than_before(tmp_path: Path) -> None:
    write(tmp_path, "step-5.pt", "step-10.pt", last="step-10.pt")
    cut(tmp_path / "step-10.pt")
    assert latest_checkpoint(tmp_path, template="iter_{}.pth")[0] == tmp_path / "step-5.pt"
    (tmp_path / "last_checkpoint").unlink()
    assert latest_checkpoint(tmp_path, template="iter_{}.pth")[0] is None
    assert latest_checkpoint(tmp_path, template="step-{}.pt")[0] == tmp_path / "step-5.pt"


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_folder_elsewhere(how: str, tmp_path: Path) -> None:
    """The names in it are absolute."""
    write(tmp_path / "old", "iter_500.pth", "iter_1000.pth", last="iter_1000.pth")
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "old", tmp_path / "new")
    assert latest_checkpoint(tmp_path / "new")[0] == tmp_path / "new" / "iter_1000.pth"
    cut(tmp_path / "new" / "iter_1000.pth")
    assert latest_checkpoint(tmp_path / "new")[0] == tmp_path / "new" / "iter_500.pth"


def test_last_checkpoint_alone(tmp_path: Path) -> None:
    """Checkpoints lie where the run, with other settings, does not look, or nowhere any more."""
    write(tmp_path / "work", last=tmp_path / "out" / "iter_500.pth")
    with pytest.raises(
        FileNotFoundError, match=r"names .*iter_500\.pth, and there is no checkpoint.*leave out --resum"
    ):
        latest_checkpoint(tmp_path / "work")
    write(tmp_path / "out", "iter_500.pth")
    assert latest_checkpoint(tmp_path / "work")[0] == tmp_path / "out" / "iter_500.pth"
    (tmp_path / "work" / "last_checkpoint").write_text("\n")
    with pytest.raises(FileNotFoundError, match=r"names nothing"):
        latest_checkpoint(tmp_path / "work")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_damaged(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "iter_1.pth"
    weights = {f"layer{i}": torch.zeros(30) for i in range(3)}
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=not legacy)
    assert find_damage(path) is None
    whole = path.read_bytes()
    for size in range(0, len(whole), 41):
        path.write_bytes(whole[:size])
        assert find_damage(path) is not None, size
    for size in (1, 10, 100):
        path.write_bytes(whole[:-size])
        assert find_damage(path) is not None, size
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))  # what a machine without power leaves of it
    assert find_damage(path) is not None


@pytest.mark.parametrize("how", ["a byte of a weight", "a byte of data.pkl", "the list of records", "a hole", "zeros"])
def test_damage_within_a_file_is_passed_over(how: str, tmp_path: Path) -> None:
    write(tmp_path, "iter_1.pth", "iter_2.pth", last="iter_2.pth")
    path = tmp_path / "iter_2.pth"
    whole = path.read_bytes()
    places = {"a byte of a weight": b"data/0", "a byte of data.pkl": b"data.pkl", "the list of records": b"PK\x01\x02"}
    at, size = (whole.find(places[how]), 1) if how in places else (len(whole) // 4, len(whole) // 2)
    if "byte" in how:
        at += 70
    damaged = bytes(len(whole)) if how == "zeros" else whole[:at] + bytes(size) + whole[at + size :]
    if "byte" in how:
        damaged = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes(damaged)
    found, warnings = latest_checkpoint(tmp_path)
    assert found == tmp_path / "iter_1.pth" and len(warnings) == 1 and str(path) in warnings[0]
    with pytest.raises(DataError) as caught:
        read_model_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_files_is_whole_if_all_are(tmp_path: Path) -> None:
    path = tmp_path / "iter_1.pth"
    path.mkdir()
    assert find_damage(path) == "it is empty"
    write(path, "rank0.pth", "rank1.pth")
    assert find_damage(path) is None
    cut(path / "rank1.pth")
    assert str(find_damage(path)).startswith("rank1.pth: it is cut short")
    write(tmp_path, "iter_2.pth", last="iter_1.pth")
    cut(tmp_path / "iter_2.pth")
    with pytest.raises(ValueError, match=r"all .* are damaged"):
        latest_checkpoint(tmp_path)


def test_one_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "iter_1.pth", "iter_2.pth", last="iter_2.pth")
    opened = Path.open

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == "iter_2.pth":
            raise PermissionError(13, "no", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        latest_checkpoint(tmp_path)
