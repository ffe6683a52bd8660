"""Two ranks evaluate all stitches as one process does, also with recalibrated and synchronised batch norms, and resume
together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmsnnet.evaluation import OperatingPoints

# The first process evaluates alone, then with the second one: at once, and stitch by stitch with an interruption.
PROGRAM = """
import os, sys
from pathlib import Path

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

import mmsnnet
from mmsnnet.engine.runner import stitch_passes
from mmsnnet.engine.runner.measured_points import CannotResumeError
from mmsnnet.evaluation import OperatingPoints

folder, rank = Path(sys.argv[1]), int(sys.argv[2])


class Images(torch.utils.data.Dataset):
    metainfo = dict(name="images", classes=[str(i) for i in range(8)], palette=[[i] * 3 for i in range(8)])

    def __len__(self):
        return 5  # which two ranks cannot share evenly: without round_up one has three batches, the other two

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(8, (1, 32, 32), generator=generator)
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(dict(img_shape=(32, 32), ori_shape=(32, 32)))
        return dict(inputs=torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=generator), data_samples=sample)


@DATASETS.register_module()
class Training(Images):
    def __len__(self):
        return 7


def evaluate(name, launcher, **settings):
    cfg = dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel", device_ids=None))
    if name == "recalibrated":  # torch's wrapper refuses synchronised norms on a CPU
        cfg = dict(model_wrapper_cfg=dict(type="mmsnnet.StitchedDataParallel"), sync_bn="torch")
    cfg["train_dataloader"] = dict(batch_size=3, dataset=dict(type="Training"))
    runner = Runner(
        ConfigDict(torch.load(folder / "model.pt")),
        str(folder / name),
        test_dataloader=dict(
            batch_size=1, dataset=Images(),
            sampler=dict(type="DefaultSampler", shuffle=False, round_up=name == "resumed"),
            collate_fn=dict(type="pseudo_collate"),
        ),
        test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
        test_cfg=dict(type="mmsnnet.StitchTestLoop", out=str(folder / f"{name}.json"), **settings),
        load_from=str(folder / "weights.pth"),
        launcher=launcher,
        cfg=cfg,
        default_scope="mmseg",
        log_level="ERROR",
        experiment_name=name,
    )
    return runner


if rank == 0:
    evaluate("alone", "none").test()
    evaluate("recalibrated_alone", "none", recalibrate=5).test()
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
evaluate("together", "pytorch").test()
evaluate("recalibrated", "pytorch", recalibrate=5).test()
measured = stitch_passes.kept_bytes, stitch_passes.HOST_MEMORY
# Alone, the first rank would run two stitches in a pass (3 bytes each), the second one (4 bytes).
stitch_passes.kept_bytes = lambda states: (1 + rank) * any(state["results"] for state in states)
stitch_passes.HOST_MEMORY = 6
evaluate("bounded", "pytorch").test()
stitch_passes.kept_bytes, stitch_passes.HOST_MEMORY = measured
runner = evaluate("resumed", "pytorch", stitches_per_pass=1)
evaluated = stitch_passes.StitchPass.evaluate
stitch_passes.StitchPass.evaluate = lambda self, stitch: evaluated(self, stitch) if stitch.name != "L" else 1 / 0
try:
    runner.test()
except ZeroDivisionError:
    stitch_passes.StitchPass.evaluate = evaluated
assert not (rank == 0 and "\\"L\\"" in (folder / "resumed.json").read_text())
if rank == 1:
    OperatingPoints.load = None  # the first rank alone reads, and says what it found
evaluate("resumed", "pytorch", resume=True).test()
runner = evaluate("damaged", "pytorch", resume=True)
try:
    runner.test()
except CannotResumeError as error:
    (folder / f"error_{rank}").write_text(str(error))
# A rank that leaves while gloo's threads run may end by a signal.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.mark.slow
def test_two_ranks_evaluate_as_one(
    folder: Path,
    segmentor_config: Callable[..., dict[str, Any]],
    randomise: Callable[[nn.Module], None],
    make_segmentor: Callable[..., nn.Module],
    run_ranks: Callable[..., None],
) -> None:
    torch.save(segmentor_config(), folder / "model.pt")
    torch.save(make_segmentor().state_dict(), folder / "weights.pth")
    (folder / "damaged.json").write_text("{")
    run_ranks("-c", PROGRAM, folder)
    alone, *others = (OperatingPoints.load(folder / f"{n}.json") for n in ("alone", "together", "bounded", "resumed"))
    assert [point.name for point in alone] == ["S", "L", "S0-L2", "L1-S1"]
    assert len({tuple(point.metrics.values()) for point in alone}) > 1
    assert [tuple(other) for other in others] == [tuple(alone)] * 3
    recalibrated = [OperatingPoints.load(folder / f"recalibrated{alone}.json") for alone in ("_alone", "")]
    assert tuple(recalibrated[0]) == tuple(recalibrated[1])
    assert not any(one.metrics == other.metrics for one, other in zip(alone, recalibrated[0], strict=True))
    errors = [(folder / f"error_{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and "damaged.json" in errors[0]
