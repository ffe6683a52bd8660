from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmsnnet.cli import launching as launch

REPOSITORY = Path(__file__).parents[2]
# Both heads have synchronised batch norms.
CONFIG = REPOSITORY / "configs/ade20k/stitched-deit3-s-l_setr-naive_8xb2-160k_ade20k-512x512.py"


def test_synchronised_batch_norms_without_gpus_are_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the data is looked for: torch says so when all has been loaded, in the first iteration."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "get_device", lambda: "cpu")
    import train as command

    cure = r"model\.decode_head\.norm_cfg\.type=BN model\.auxiliary_head\.0\.norm_cfg\.type=BN"
    with pytest.raises(ValueError, match=cure):
        command.train(command.parser().parse_args([str(CONFIG), "--launcher", "pytorch"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
@pytest.mark.parametrize("way", [["--amp"], ["--cfg-options", "optim_wrapper.type=AmpOptimWrapper"]])
def test_mixed_precision_without_a_gpu_is_refused_first(
    way: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    monkeypatch.chdir(tmp_path)
    import train as command

    with pytest.raises(ValueError, match="mixed precision needs a GPU, and there is none: leave out --amp"):
        command.train(command.parser().parse_args([str(CONFIG), *way]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [None, "iter_8.pth"])
@pytest.mark.parametrize("options", [[], ["--cfg-options", "load_from=told.pth"]], ids=["", "told"])
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["", "resume"])
def test_a_run_goes_on_from_its_own_checkpoints_before_what_its_config_begins_with(
    resume: list[str], options: list[str], found: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import train as command

    class Runs:
        """Chooses as build_runner does: load_from if there is one, else what is in the folder."""

        def __init__(self, config: Config, *args: object) -> None:
            self._resume = config.resume
            self._load_from = config.load_from or (found if config.resume else None)

        def train(self) -> None:
            began.append((self._load_from, self._resume))

    began: list[tuple[str | None, bool]] = []
    config = tmp_path / "own.py"
    config.write_text(f'_base_ = "{CONFIG}"\nload_from = "weights.pth"\n')
    monkeypatch.setattr(command, "build_runner", Runs)
    monkeypatch.setattr(command, "check_folders", lambda *args: None)
    monkeypatch.setattr(command, "check_channels", lambda *args: None)
    command.train(command.parser().parse_args([str(config), *resume, *options]))
    if not resume:
        assert began == [("told.pth" if options else "weights.pth", False)]
    elif options:
        assert began == [("told.pth", True)]
    else:
        assert began == [("iter_8.pth", True) if found else ("weights.pth", False)]
