from contextlib import ExitStack
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
    """Before data is checked; torch raises its error in the first iteration."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "get_device", lambda: "cpu")
    import train as command

    cure = r"model\.decode_head\.norm_cfg\.type=BN model\.auxiliary_head\.0\.norm_cfg\.type=BN"
    with pytest.raises(ValueError, match=cure):
        command.build(command.make_parser().parse_args([str(CONFIG), "--launcher", "pytorch"]), ExitStack())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize("way", [["--amp"], ["--cfg-options", "optim_wrapper.type=AmpOptimWrapper"]])
def test_mixed_precision_without_a_gpu_is_refused_first(
    way: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    monkeypatch.chdir(tmp_path)
    import train as command

    with pytest.raises(ValueError, match="mixed precision needs a GPU, and there is none: leave out --amp"):
        command.build(command.make_parser().parse_args([str(CONFIG), *way]), ExitStack())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("latest", [None, "iter_8.pth"])
@pytest.mark.parametrize("options", [[], ["--cfg-options", "load_from=option.pth"]], ids=["", "option"])
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["", "resume"])
def test_a_resumed_run_prefers_its_checkpoints_to_the_configs_load_from(
    resume: list[str], options: list[str], latest: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import train as command

    class Runs:
        """Chooses as build_runner does: load_from if it is set, else the latest checkpoint of the folder."""

        def __init__(self, config: Config, *args: object) -> None:
            self._resume = config.resume
            self._load_from = config.load_from or (latest if config.resume else None)

    config = tmp_path / "child.py"
    config.write_text(f'_base_ = "{CONFIG}"\nload_from = "weights.pth"\n')
    monkeypatch.setattr(command, "build_runner", Runs)
    monkeypatch.setattr(command, "check_folders", lambda *args: None)
    monkeypatch.setattr(command, "check_channels", lambda *args: None)
    runner = command.build(command.make_parser().parse_args([str(config), *resume, *options]), ExitStack())
    chosen = (runner._load_from, runner._resume)
    if not resume:
        assert chosen == ("option.pth" if options else "weights.pth", False)
    elif options:
        assert chosen == ("option.pth", True)
    else:
        assert chosen == (("iter_8.pth", True) if latest else ("weights.pth", False))
