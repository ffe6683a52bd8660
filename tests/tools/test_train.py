from pathlib import Path

import pytest

from mmsnnet.apis import launch

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
