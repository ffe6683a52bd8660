"""Two processes that share out the weights train as one process with the doubled batch does."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

import mmsnnet
from mmsnnet.engine.sharding import FSDPStrategy, StitchedFullyShardedDataParallel
from mmsnnet.models import find_stitched_backbone, read_weights
from mmsnnet.registry import MODELS

# The first process trains alone, then with the second one. A file for each run and iteration has all weights after it
# and the stitches drawn so far; one for each run what validation found.
PROGRAM = """
import contextlib, os, sys
from pathlib import Path
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch.distributed.fsdp import FullyShardedDataParallel

import mmsnnet
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.backbones import stitched_backbone

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
SHARDED = dict(runner_type="FlexibleRunner", strategy=dict(type="mmsnnet.FSDPStrategy"))


@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    metainfo = dict(name="images", classes=[str(i) for i in range(8)], palette=[[i] * 3 for i in range(8)])

    def __init__(self, sizes, number=8, copies=1):
        self.sizes, self.number, self.copies = sizes, number, copies

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        size = self.sizes[index % len(self.sizes)]
        generator = torch.Generator().manual_seed(index // self.copies)
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(8, (1, *size), generator=generator)))
        sample.set_metainfo(dict(img_shape=size, ori_shape=size))
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
        return dict(inputs=image, data_samples=sample)


class Recorder(Hook):
    def __init__(self, name):
        self.name = name

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        weights = runner.strategy.model_state_dict() if rank_count() > 1 else runner.model.state_dict()
        drawn = find_stitched_backbone(runner.model).drawn
        if rank == 0:
            torch.save((weights, drawn.id), folder / f"{self.name} {runner.iter}.pt")

    def after_val_epoch(self, runner, metrics=None):
        if rank == 0:
            metrics = {key: float(value) for key, value in metrics.items()}
            torch.save(metrics, folder / f"{self.name} metrics.pt")


# The costs of each model are counted once: by the first process alone, by the second one sharded.
count, costs, counting = stitched_backbone.cost_model, {}, []


def count_once(network, shape):
    if (counting[-1], shape) not in costs:
        costs[counting[-1], shape] = count(network, shape)
    return costs[counting[-1], shape]


stitched_backbone.cost_model = count_once


def rank_count():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def train(name, model="plain", counts=1, val=None, **settings):
    counting.append(model)
    images = dict(num_workers=0, collate_fn=dict(type="pseudo_collate"))
    config = dict(
        model=torch.load(folder / f"{model}.pt"),
        work_dir=str(folder / name),
        train_dataloader=dict(
            images, batch_size=4 // rank_count(), dataset=dict(type="Images", sizes=[(32, 32)]),
            sampler=dict(type="InfiniteSampler"),
        ),
        train_cfg=dict(
            type="mmsnnet.StitchIterBasedTrainLoop", max_iters=4, val_interval=4, stitches_per_step=counts,
            # Where several stitches run, the costliest teaches the others.
            distill=dict(features=1.0, outputs=1.0) if counts > 1 else None,
        ),
        optim_wrapper=dict(
            constructor="mmsnnet.StitchOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay_rate=0.9),
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.1),
            clip_grad=dict(max_norm=0.01),
            accumulative_counts=counts,
        ),
        param_scheduler=[dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=3)],
        default_hooks=dict(
            checkpoint=dict(type="mmsnnet.AtomicCheckpointHook", interval=2, by_epoch=False),
        ),
        custom_hooks=[
            # Three images for the first rank, two for the second.
            dict(type="mmsnnet.StitchInitHook", num_images=5, batch_size=1),
            dict(type="mmsnnet.StitchLogHook"),
            dict(type="mmsnnet.ConsistencyHook"),
        ],
        launcher="pytorch" if rank_count() > 1 else "none",
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        randomness=dict(seed=0),
        default_scope="mmseg",
        experiment_name=name,
        log_level="ERROR",
    )
    if val is not None:
        config |= dict(
            val_dataloader=dict(images, batch_size=1, **val),
            val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            val_cfg=dict(type="mmsnnet.StitchValLoop"),
        )
    runner = (FlexibleRunner if "strategy" in settings else Runner).from_cfg(Config(config | settings))
    runner.register_hook(Recorder(name), priority="LOWEST")
    warned = []
    runner.logger.warning = warned.append
    try:
        runner.train()
    finally:
        torch.save(warned, folder / f"warned {name} {rank}.pt")
    return runner


def train_staged(name, **settings):
    # Each rank gets the images that the process alone gets: their batch norms see the same.
    copies = rank_count()
    loader = dict(
        num_workers=0, batch_size=2, collate_fn=dict(type="pseudo_collate"),
        sampler=dict(type="InfiniteSampler", shuffle=False),
        dataset=dict(type="Images", sizes=[(64, 64)], number=8 * copies, copies=copies),
    )
    hooks = [dict(type="mmsnnet.StitchInitHook", num_images=8 * copies, batch_size=4)]
    train(name, name.split()[0], train_dataloader=loader, custom_hooks=hooks, **settings)


def error_of(*args, **settings):
    try:
        train(*args, **settings)
    except Exception as error:
        return type(error).__name__, str(error)


# Each second image is of two crops: one rank runs the backbone more often.
val = dict(
    dataset=dict(type="Images", sizes=[(32, 32), (32, 64)], number=4),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
biased = dict(model="biased", counts=2)
if rank == 0:
    train("alone", val=val)
    train("biased alone", **biased)
    train_staged("swin alone")
    train_staged("resnet alone")
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
runner = train("sharded", val=val, **SHARDED)
held = sum(parameter.numel() for parameter in runner.model.parameters())
units = sum(isinstance(module, FullyShardedDataParallel) for module in runner.model.modules())
states = runner.optim_wrapper.optimizer.state.values()
moments = sum(state["exp_avg"].numel() for state in states)
torch.save((held, moments, units), folder / f"held {rank}.pt")
model, drawn = runner.model.train(), set()
batch = model.module.data_preprocessor(next(iter(runner.train_dataloader)), training=True)
for add_up in (model.no_sync, model.no_sync, contextlib.nullcontext):
    with add_up():
        model.module.parse_losses(model(**batch, mode="loss"))[0].backward()
    drawn.add(model.backbone.drawn.name)
torch.save((drawn, [p.grad is not None for p in model.parameters()]), folder / f"added up {rank}.pt")
runner.optim_wrapper.zero_grad()
steps = []
for _ in range(3):
    held = [p.detach().clone() for p in model.parameters()]
    model.module.parse_losses(model(**batch, mode="loss"))[0].backward()
    runner.optim_wrapper.step()
    runner.optim_wrapper.zero_grad(set_to_none=False)
    moved = [not torch.equal(p, before) for p, before in zip(model.parameters(), held, strict=True)]
    steps.append((model.backbone.drawn.name, moved))
torch.save(steps, folder / f"zeroed {rank}.pt")
amp = dict(type="mmengine.AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.1))
with patch("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", return_value=True):
    scaler = runner.strategy.build_optim_wrapper(amp, model).loss_scaler
torch.save(type(scaler).__name__, folder / f"scaler {rank}.pt")
train("resumed", load_from=str(folder / "sharded/iter_2.pth"), resume=True, **SHARDED)
train("biased sharded", **biased, **SHARDED)
train("biased resumed", load_from=str(folder / "biased alone/iter_2.pth"), resume=True, **biased, **SHARDED)
train_staged("swin sharded", **SHARDED)
train_staged("resnet sharded", **SHARDED)
two = dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=2)
train("compiled sharded", model="compiled", train_cfg=two, **SHARDED)
lamb = dict(
    constructor="mmsnnet.StitchOptimWrapperConstructor", optimizer=dict(type="mmsnnet.Lamb", lr=1e-3)
)
adaptive = dict(
    constructor="mmsnnet.StitchOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3),
    clip_grad=dict(type="agc", clip_factor=0.01),
)
if rank == 0:
    changed = torch.load(folder / "sharded/iter_2.pth", weights_only=False)
    state = changed["optimizer"]["state"]["decode_head.conv_seg.weight"]
    state["exp_avg"] = state["exp_avg"][:3]
    torch.save(changed, folder / "shape.pth")
    torch.save(dict(meta={}, state_dict={"encoder.weight": torch.zeros(3)}), folder / "other.pth")
torch.distributed.barrier()
uneven = dict(val, dataset=dict(type="Images", sizes=[(32, 32)], number=3))
uneven["sampler"] = dict(type="DefaultSampler", shuffle=False, round_up=False)
errors = dict(
    lamb=error_of("lamb", optim_wrapper=lamb, **SHARDED),
    adaptive=error_of("adaptive", optim_wrapper=adaptive, **SHARDED),
    stock=error_of("stock", runner_type="FlexibleRunner", strategy=dict(type="FSDPStrategy")),
    stock_loop=error_of(
        "stock loop",
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=4),
        runner_type="FlexibleRunner",
        strategy=dict(
            type="FSDPStrategy", model_wrapper=dict(type="MMFullyShardedDataParallel", device_id=torch.device("cpu"))
        ),
    ),
    grouped=error_of(
        "grouped",
        load_from=str(folder / "alone/iter_2.pth"),
        resume=True,
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
        **SHARDED,
    ),
    classes=error_of(
        "classes", model="classes", load_from=str(folder / "sharded/iter_2.pth"), resume=True, **SHARDED
    ),
    shape=error_of("shape", load_from=str(folder / "shape.pth"), resume=True, **SHARDED),
    nothing=error_of("nothing", load_from=str(folder / "other.pth"), **SHARDED),
    uneven=error_of("uneven", val=uneven, **SHARDED),
)
torch.save(errors, folder / f"errors {rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
if rank == 0:
    train("resumed alone", load_from=str(folder / "sharded/iter_2.pth"), resume=True)
"""


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Configs by name: ``plain``; ``classes``, of fewer classes; ``biased``, with relative position biases and
    activation checkpointing; ``compiled``, as plain; and ``swin`` and ``resnet``, of hierarchical anchors."""
    tiny = dict(model="vit_tiny_patch16_224", num_heads=2, patch_size=8)
    head = dict(type="FCNHead", in_channels=48, channels=48, num_classes=8, num_convs=0, concat_input=False)
    head |= dict(align_corners=False, dropout_ratio=0)

    def model(anchor: dict[str, Any], **backbone: Any) -> dict[str, Any]:
        anchors = [tiny | dict(embed_dim=32, depth=2) | anchor, tiny | dict(embed_dim=48, depth=4) | anchor]
        return dict(
            type="mmseg.EncoderDecoder",
            data_preprocessor=dict(
                type="mmseg.SegDataPreProcessor", mean=[127.5] * 3, std=[60.0] * 3, size=(32, 32), seg_pad_val=255
            ),
            backbone=dict(
                type="mmsnnet.StitchedViT",
                anchors=anchors,
                img_size=32,
                rank=2,
                flops_step=1e5,
                out_indices=(1, 3),
                seed=7,
            )
            | backbone,
            decode_head=dict(head, in_index=1),
            auxiliary_head=dict(head, in_index=0),
            test_cfg=dict(mode="slide", crop_size=(32, 32), stride=(32, 32)),
        )

    def staged(*anchors: dict[str, Any], **backbone: Any) -> dict[str, Any]:
        built = model({}, anchors=list(anchors), img_size=64, out_indices=(2, 3), **backbone)
        built["data_preprocessor"] |= dict(size=(64, 64))
        built["decode_head"] |= dict(in_channels=64, channels=64)
        built["auxiliary_head"] |= dict(in_channels=32, channels=32)
        return built

    swin = dict(model="swin_tiny_patch4_window7_224", num_heads=(1, 2, 4, 8), drop_path_rate=0.0)
    classes = model({})
    classes["decode_head"] |= dict(num_classes=5)
    return dict(
        swin=staged(
            swin | dict(embed_dim=8, depths=(1, 1, 2, 1)), swin | dict(embed_dim=8, depths=(1, 2, 2, 2)), with_cp=True
        ),
        resnet=staged(
            dict(model="resnet18", layers=(1, 1, 2, 1), channels=(4, 8, 16, 32)),
            dict(model="resnet18", channels=(8, 16, 32, 64)),
        ),
        classes=classes,
        plain=model({}),
        biased=model(dict(rel_pos_bias=True), with_cp=True),
        compiled=model({}, compile=dict(backend="eager")),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any], run_ranks: Callable[..., None]) -> Path:
    """What the two processes leave."""
    folder = tmp_path_factory.mktemp("fsdp")
    for name, model in models.items():
        torch.save(model, folder / f"{name}.pt")
    run_ranks("-c", PROGRAM, folder)
    return folder


@pytest.fixture
def make_model(models: dict[str, Any]) -> Callable[[str], nn.Module]:
    def make(name: str) -> nn.Module:
        from mmseg.registry import MODELS

        return MODELS.build(ConfigDict(models[name]))

    return make


Weights = dict[str, Tensor]


def weights_after(folder: Path, run: str, iterations: int) -> Weights:
    return torch.load(folder / f"{run} {iterations - 1}.pt")[0]


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "sharded"), [("alone", "sharded"), ("biased alone", "biased sharded")])
def test_two_ranks_train_as_one_process_with_the_doubled_batch(folder: Path, alone: str, sharded: str) -> None:
    # The clipping of gradients, weight decay but on vectors and layer-wise rates included; in the second run activation
    # checkpointing, and gradients of two iterations with two stitches each.
    assert largest_difference(weights_after(folder, alone, 4), weights_after(folder, sharded, 4)) < 1e-5
    assert largest_difference(weights_after(folder, alone, 2), weights_after(folder, alone, 4)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["swin", "resnet"])
def test_hierarchical_anchors_train_as_in_one_process(folder: Path, pair: str) -> None:
    """What leads into a stage and the statistics of batch norms included."""
    alone, sharded = (weights_after(folder, f"{pair} {run}", 4) for run in ("alone", "sharded"))
    # Batch norms of few places amplify how sums are rounded.
    assert largest_difference(alone, sharded) < 5e-5
    before = weights_after(folder, f"{pair} alone", 2)
    moved = {name for name, value in alone.items() if not torch.equal(value, before[name])}
    assert largest_difference(alone, before) > 5e-4 and any("downsample" in name for name in moved)
    assert pair == "swin" or any("running_mean" in name for name in moved)


def test_compiled_blocks_train_the_same(folder: Path, models: dict[str, Any]) -> None:
    """But those with a relative position bias, which are refused."""
    difference = largest_difference(weights_after(folder, "compiled sharded", 2), weights_after(folder, "sharded", 2))
    assert difference < 1e-6
    biased = models["biased"]["backbone"] | dict(compile=dict(backend="eager"))
    with pytest.raises(ValueError, match="compile=False in the backbone"):
        StitchedFullyShardedDataParallel(nn.ModuleDict(dict(backbone=MODELS.build(biased))))


def test_they_validate_alike_where_one_runs_the_backbone_more_often(folder: Path) -> None:
    alone, sharded = (torch.load(folder / f"{run} metrics.pt") for run in ("alone", "sharded"))
    assert "L/mIoU" in alone
    assert {name: value for name, value in sharded.items() if "/" in name} == pytest.approx(
        {name: value for name, value in alone.items() if "/" in name}, abs=0.2
    )


def test_what_the_drawn_stitch_does_not_use_is_not_moved(folder: Path, make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("plain")
    backbone = find_stitched_backbone(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = {names[parameter] for parameter in backbone.parameters()}
    drawn = set()
    for iteration in range(1, 4):
        before, after = (weights_after(folder, "sharded", number) for number in (iteration, iteration + 1))
        stitch = backbone.space[torch.load(folder / f"sharded {iteration}.pt")[1]]
        moved = {name for name in own if not torch.equal(before[name], after[name])}
        used = {names[parameter] for parameter in backbone.trained_parameters(stitch)}
        assert moved and moved <= used < own
        drawn.add(stitch)
    assert len(drawn) == 3


def test_a_checkpoint_is_one_of_the_whole_model(folder: Path, make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("plain")
    model.load_state_dict(read_weights(model, folder / "sharded" / "iter_4.pth"))
    assert largest_difference(model.state_dict(), weights_after(folder, "sharded", 4)) == 0
    backbone = find_stitched_backbone(model)
    assert backbone.draws == 4 and backbone.network.initialized


def test_a_resumed_run_goes_on_exactly(folder: Path) -> None:
    assert largest_difference(weights_after(folder, "resumed", 4), weights_after(folder, "sharded", 4)) == 0
    one, other = (torch.load(folder / run / "iter_4.pth", weights_only=False) for run in ("resumed", "sharded"))
    states = one["optimizer"]["state"], other["optimizer"]["state"]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 50
    for name, state in states[0].items():
        for moment, value in state.items():
            assert torch.equal(value, states[1][name][moment])


@pytest.mark.parametrize(("resumed", "alone"), [("resumed alone", "alone"), ("biased resumed", "biased alone")])
def test_a_run_goes_on_sharded_as_it_does_alone(folder: Path, resumed: str, alone: str) -> None:
    # The first begins sharded and ends alone, the second the other way about.
    assert largest_difference(weights_after(folder, resumed, 4), weights_after(folder, alone, 4)) < 1e-5


def test_a_run_that_goes_on_as_it_was_says_nothing(folder: Path) -> None:
    for rank in range(2):
        said = torch.load(folder / f"warned resumed {rank}.pt")
        assert [text for text in said if "the checkpoint" in text] == []
    # Twice the processes, each with half the batch.
    said = torch.load(folder / "warned biased resumed 0.pt")
    assert [text for text in said if "the checkpoint" in text] == []


def test_each_rank_holds_its_share(folder: Path, make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("plain")
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    held, moments, units = zip(*(torch.load(folder / f"held {rank}.pt") for rank in range(2)), strict=True)
    assert sum(held) == whole and max(held) < 0.51 * whole
    assert sum(moments) <= trained and max(moments) < 0.6 * trained
    assert units == (7, 7)  # six blocks, and the rest


def test_gradients_of_different_stitches_add_up(folder: Path, make_model: Callable[[str], nn.Module]) -> None:
    model = make_model("plain")
    backbone = find_stitched_backbone(model)
    (drawn, first), (_, second) = (torch.load(folder / f"added up {rank}.pt", weights_only=False) for rank in range(2))
    used = {parameter for name in drawn for parameter in backbone.trained_parameters(backbone.space[name])}
    assert len(drawn) > 1
    for parameter, *has_gradient in zip(model.parameters(), first, second, strict=True):
        assert any(has_gradient) or parameter not in used


def test_gradients_that_are_zeroed_rather_than_dropped_move_nothing_else(
    folder: Path, make_model: Callable[[str], nn.Module]
) -> None:
    model = make_model("plain")
    backbone = find_stitched_backbone(model)
    own, drawn = set(backbone.parameters()), set()
    for steps in zip(*(torch.load(folder / f"zeroed {rank}.pt") for rank in range(2)), strict=True):
        (name, first), (_, second) = steps
        moved = [a or b for a, b in zip(first, second, strict=True)]
        moved = {parameter for parameter, has in zip(model.parameters(), moved, strict=True) if has}
        assert moved and moved & own <= set(backbone.trained_parameters(backbone.space[name]))
        drawn.add(name)
    assert len(drawn) > 1


def test_ranks_scale_losses_alike_whatever_scope_the_config_names(folder: Path) -> None:
    assert [torch.load(folder / f"scaler {rank}.pt") for rank in range(2)] == ["ShardedGradScaler"] * 2


def test_what_cannot_go_well_is_refused_on_all_ranks(folder: Path) -> None:
    errors = [torch.load(folder / f"errors {rank}.pt") for rank in range(2)]
    assert errors[0] == errors[1]
    assert errors[0]["lamb"][0] == "ValueError" and "AdamW" in errors[0]["lamb"][1]
    for run in ("stock", "stock_loop"):
        assert errors[0][run][0] == "TypeError" and "mmsnnet.FSDPStrategy" in errors[0][run][1]
    assert errors[0]["adaptive"][0] == "SettingError" and "clip by the norm" in errors[0]["adaptive"][1]
    assert errors[0]["grouped"][0] == "SettingError" and "without --resume" in errors[0]["grouped"][1]
    for run, said in (
        (
            "classes",
            "decode_head.num_classes: the checkpoint's decode_head.conv_seg is for 8 classes, the config's for 5",
        ),
        ("shape", "exp_avg (3, 48, 1, 1) for decode_head.conv_seg.weight (8, 48, 1, 1)"),
        ("nothing", "nothing of checkpoint"),
    ):
        assert errors[0][run][0] == "SettingError" and said in errors[0][run][1]
    assert errors[0]["uneven"][0] == "SettingError" and "val_dataloader.sampler.round_up=True" in errors[0]["uneven"][1]
    assert not list(folder.glob("uneven *.pt"))  # before the first iteration


def test_settings_that_make_no_sense_are_refused(make_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run bash tools/dist_train\.sh"):
        FSDPStrategy(work_dir=str(tmp_path), env_kwargs=dict(launcher="none"), log_kwargs=dict(log_level="ERROR"))
    with pytest.raises(ValueError, match="state_dict_cfg='local'"):
        FSDPStrategy(state_dict_cfg="local")
    with pytest.raises(ValueError, match="use_orig_params"):
        StitchedFullyShardedDataParallel(make_model("plain"), use_orig_params=False)


def test_no_other_file_of_the_package_knows_how_models_are_sharded() -> None:
    """All else goes by the functions of ``mmsnnet.engine.sharding``, which take any model."""
    package = Path(mmsnnet.__file__).parent
    names = re.compile("fsdp|FullySharded|summon_full", re.IGNORECASE)
    naming = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parent != package / "engine" / "sharding" and names.search(path.read_text())
    }
    # This one removes what FSDP inserts into the names of tensors in other people's checkpoints.
    assert naming == {"stitching/anchors/weight_sections.py"}
