"""Ranks that come apart, and losses that are not finite, stop a run on every rank, with the cause."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmsnnet.engine import ConsistencyHook
from mmsnnet.engine.hooks import consistency_hook
from mmsnnet.engine.hooks.consistency_hook import bit_checksum
from mmsnnet.models import StitchedBackbone

# The checksum


def ulp(x: Tensor, index: int) -> Tensor:
    """A copy whose element ``index`` is the next number up, or the next integer."""
    y = x.clone().flatten()
    if y.is_floating_point():
        y[index] = torch.nextafter(y[index], torch.tensor(torch.inf, dtype=y.dtype))
    else:
        y[index] += 1
    return y.view_as(x)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_counts_wherever_it_stands(dtype: torch.dtype) -> None:
    bit_checksum = partial(consistency_hook.bit_checksum, chunk=8)
    x = (torch.randn(5, 7) * 20).to(dtype)
    own = bit_checksum(x)
    assert own.dtype == torch.int64 and own.shape == ()
    assert torch.equal(own, bit_checksum(x.clone()))
    if dtype not in (torch.bfloat16, torch.float16):  # torch has no nextafter for float16
        assert all(not torch.equal(own, bit_checksum(ulp(x, index))) for index in range(x.numel()))
    bits = x.clone().flatten().view(torch.uint8)
    for index in range(len(bits)):
        for bit in range(8):
            flipped = bits.clone()
            flipped[index] ^= 1 << bit
            assert not torch.equal(own, bit_checksum(flipped.view(dtype)))


def test_zeros_and_nans_differ_by_their_bits() -> None:
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    for one, other in ((torch.tensor(0.0), torch.tensor(-0.0)), nan):
        assert not torch.equal(bit_checksum(one), bit_checksum(other))
    assert torch.equal(bit_checksum(nan), bit_checksum(nan.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_order_counts(dtype: torch.dtype) -> None:
    """Signs swapped between two elements too: there the words differ in the highest bit alone."""
    bit_checksum = partial(consistency_hook.bit_checksum, chunk=8)
    x = torch.arange(1.0, 21).to(dtype)
    for left in range(20):
        for right in range(left):
            swapped, signed = x.clone(), x.clone()
            swapped[[left, right]] = swapped[[right, left]]
            assert not torch.equal(bit_checksum(x), bit_checksum(swapped))
            signed[left], signed[right] = 3, -3
            other = signed.clone()
            other[left], other[right] = -3, 3
            assert not torch.equal(bit_checksum(signed), bit_checksum(other))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 8).T,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(10)[::3],
        torch.randn(()),
        torch.randn(4, dtype=torch.complex64),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        nn.Parameter(torch.randn(3, 3)),
    ],
    ids=["transposed", "channels last", "strided", "scalar", "complex", "bool", "empty", "parameter"],
)
def test_any_tensor_has_one_whatever_its_strides(tensor: Tensor) -> None:
    assert torch.equal(bit_checksum(tensor), bit_checksum(tensor.detach().clone(memory_format=torch.contiguous_format)))


# One process


@pytest.fixture
def runner(make_backbone: Callable[..., StitchedBackbone]) -> SimpleNamespace:
    """What the hook needs of a runner, ``step`` to run one iteration."""
    backbone = make_backbone(flops_step=1e5)
    hub = MessageHub("consistency")
    runner = SimpleNamespace(
        model=nn.ModuleDict(dict(backbone=backbone)), iter=0, logger=None, message_hub=hub, hooks=[RuntimeInfoHook()]
    )

    def step(hook: ConsistencyHook, draw: bool = True, **losses: Any) -> None:
        if draw:
            backbone(torch.zeros(1, 3, 32, 32))
        for other in runner.hooks:
            other.after_train_iter(runner, runner.iter, outputs=losses)
        hook.after_train_iter(runner, runner.iter, outputs=losses)
        runner.iter += 1

    runner.step = step
    return runner


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "float"])
@pytest.mark.parametrize("stage", ["before_checkpoint", "after_train"])
def test_the_first_loss_that_is_not_finite_is_named(
    runner: SimpleNamespace, value: float, as_tensor: bool, stage: str
) -> None:
    hook = ConsistencyHook()
    hook.before_train(runner)
    runner.step(hook, loss=torch.tensor(1.0), loss_ce=1.0)
    drawn = []
    for number in (value, 2.0, float("nan")):
        loss = torch.tensor(number) if as_tensor else number
        runner.step(hook, loss=loss, **{"decode.loss_ce": loss, "decode.acc_seg": torch.tensor(float("nan"))})
        drawn.append(runner.model.backbone.drawn.name)
    with pytest.raises(FloatingPointError, match=rf"decode.loss_ce is {value} at iteration 2 .*{drawn[0]} \(draw 1\)"):
        getattr(hook, stage)(runner)


def test_the_log_of_a_resumed_run_hides_no_loss(runner: SimpleNamespace) -> None:
    """Without RuntimeInfoHook, the log keeps the losses of before."""
    runner.message_hub.update_scalar("train/loss", 0.5)
    runner.hooks = []
    hook = ConsistencyHook()
    hook.before_train(runner)
    runner.step(hook, loss=torch.tensor(torch.nan))
    with pytest.raises(FloatingPointError, match="loss is nan at iteration 1"):
        hook.after_train(runner)


def test_the_interval(runner: SimpleNamespace) -> None:
    hook = ConsistencyHook(interval=3)
    hook.before_train(runner)
    runner.step(hook, loss=1.0)
    runner.step(hook, loss=float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at iteration 2 on rank 0"):
        runner.step(hook, loss=1.0)


def test_all_stitches_of_a_step_are_named(runner: SimpleNamespace) -> None:
    backbone = runner.model.backbone
    backbone.stitches_per_step = 3
    hook = ConsistencyHook()
    hook.before_train(runner)
    for loss in (1.0, float("nan")):
        for _ in range(2):
            backbone(torch.zeros(1, 3, 32, 32))
        runner.step(hook, loss=loss)
    last = backbone.drawn.name
    with pytest.raises(FloatingPointError, match=rf"which ran L, S, {last} \(draws 3, 4, 5\)"):
        hook.after_train(runner)


def test_what_overflows_beside_a_loss_is_in_order(runner: SimpleNamespace) -> None:
    """With fp16, gradients overflow while the scale is looked for."""
    hook = ConsistencyHook(interval=1)
    hook.before_train(runner)
    for parameter in runner.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    runner.step(hook, loss=torch.tensor(60000.0, dtype=torch.float16), grad_norm=torch.tensor(torch.inf))


def test_iterations_without_output_or_draw_count(runner: SimpleNamespace) -> None:
    hook = ConsistencyHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    runner.iter = 1
    runner.step(hook, draw=False, loss=float("nan"))
    with pytest.raises(FloatingPointError, match="iteration 2 on rank 0, which ran no stitch"):
        hook.after_train(runner)


def test_nothing_is_kept_beyond_a_check(runner: SimpleNamespace) -> None:
    hook = ConsistencyHook(interval=4)
    hook.before_train(runner)
    for iteration in range(11):
        runner.step(hook, loss=torch.tensor(1.0))
        assert len(hook._iterations) == (iteration + 1) % 4


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        ConsistencyHook(interval=0)


# Two ranks

PROGRAM = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch.distributed.fsdp import FullyShardedDataParallel

import mmsnnet
from mmsnnet.engine import ConsistencyHook
from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import MODELS

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
config = torch.load(folder / "model.pt")
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
said, checks = {}, []
bits = mmsnnet.engine.hooks.consistency_hook._compare_bits
mmsnnet.engine.hooks.consistency_hook._compare_bits = lambda *args: (bits(*args), checks.append(args[1]))


class Other(Hook):
    \"\"\"Does something on the second rank alone, at one of its stages.\"\"\"

    def __init__(self, stage, act, iteration=None):
        self.stage, self.act, self.iteration = stage, act, iteration

    def before_train(self, runner):
        self.call("before_train", runner, None)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.call("after_train_iter", runner, outputs)

    def call(self, stage, runner, outputs):
        if rank == 1 and stage == self.stage and self.iteration in (None, runner.iter):
            self.act(runner, find_stitched_backbone(runner.model), outputs)


def train(name, *others, interval=100, accumulate=1, save=1000, model=config):
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = [dict(inputs=image, data_samples=BaseDataElement(gt_label=i % 6)) for i, image in enumerate(images)]
    runner = Runner(
        model,
        str(folder / name),
        train_dataloader=dict(
            batch_size=2, dataset=data, sampler=dict(type="InfiniteSampler"), collate_fn=dict(type="pseudo_collate")
        ),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3), accumulative_counts=accumulate),
        default_hooks=dict(
            checkpoint=dict(
                type="mmsnnet.AtomicCheckpointHook", interval=save, by_epoch=False, save_last=save < 1000
            ),
        ),
        custom_hooks=[
            dict(type="mmsnnet.StitchInitHook", num_images=8),
            dict(type="mmsnnet.ConsistencyHook", interval=interval),
            *others,
        ],
        randomness=dict(seed=0),
        launcher="pytorch",
        cfg=dict(model_wrapper_cfg=dict(
            type="MMDistributedDataParallel", device_ids=None, find_unused_parameters=True
        )),
        experiment_name=name,
        default_scope="mmsnnet",
        log_level="ERROR",
    )
    checks.clear()
    try:
        runner.train()
    except (RuntimeError, FloatingPointError) as error:
        said[name] = [type(error).__name__, str(error), runner.iter, list(checks)]
    else:
        said[name] = ["", "", runner.iter, list(checks)]


def ulp(runner, backbone, outputs):
    weight = backbone.network.anchors[1].model.get_parameter("blocks.2.mlp.fc1.weight").data.view(-1)
    weight[77] = torch.nextafter(weight[77], torch.tensor(2.0))


def zero(runner, backbone, outputs):
    runner.model.module.backbone.network.anchors[0].model.cls_token.data[..., 3] = -0.0 if rank else 0.0


def skip(runner, backbone, outputs):
    backbone.draws += 1


def other_stitch(runner, backbone, outputs):
    backbone.drawn = backbone.space["L" if backbone.drawn.name != "L" else "S"]


def other_bins(runner, backbone, outputs):
    backbone.flops_step, backbone._sampler = 1e9, None


def freeze(runner, backbone, outputs):
    backbone.network.anchors[0].model.pos_embed.requires_grad = False


def spoil(runner, backbone, outputs):
    \"\"\"The losses from the next iteration on.\"\"\"
    criterion = runner.model.module.criterion
    criterion.register_forward_hook(lambda module, args, loss: loss * torch.nan)


train("equal", interval=2)
train("accumulated", interval=2, accumulate=2, save=3)
train("ulp at the start", Other("before_train", ulp))
train("ulp", Other("after_train_iter", ulp, 2), interval=1)
train("zero", Other("after_train_iter", zero, 2), interval=4)
train("skipped", Other("after_train_iter", skip, 3), interval=4)
train("other stitch", Other("after_train_iter", other_stitch, 2), interval=4)
train("bins", Other("before_train", other_bins))
train("frozen", Other("before_train", freeze))
train("nan", Other("after_train_iter", spoil, 2), save=2)

# Models that a wrapper would not even take.
logger = MMLogger.get_instance("parts", log_file=str(folder / f"parts {rank}.log"))


def start(name, model):
    runner = SimpleNamespace(model=model, iter=0, logger=logger, hooks=[])
    try:
        ConsistencyHook().before_train(runner)
    except RuntimeError as error:
        said[name] = [type(error).__name__, str(error), 0, []]
    else:
        said[name] = ["", "", 0, []]


def built(**extra):
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.extra = torch.nn.ParameterDict(extra)
    return model


start("more", built(a=torch.zeros(2), **(dict(b=torch.zeros(3)) if rank else {})))
start("shape", built(a=torch.zeros(2 + rank)))
start("dtype", built(a=torch.zeros(2, dtype=(torch.float32, torch.bfloat16)[rank])))
odd = dict(
    bf16=torch.ones(3, dtype=torch.bfloat16), fp64=torch.ones(5, dtype=torch.float64), empty=torch.zeros(0, 4),
    turned=torch.ones(4, 3).T, scalar=torch.tensor(2.0),
)
start("odd", built(**odd))
start("odd differs", built(**{**odd, "bf16": odd["bf16"] + torch.tensor([0, 0, 1]) * rank * 2**-7}))
sharded = built()
sharded.extra = FullyShardedDataParallel(torch.nn.Linear(8, 8), device_id=torch.device("cpu"), use_orig_params=True)
pieces = [None, None]
torch.distributed.all_gather_object(pieces, [parameter.shape for parameter in sharded.parameters()])
assert pieces[0] != pieces[1]
start("sharded", sharded)
(folder / f"said {rank}.json").write_text(json.dumps(said))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two ranks' runs, and for each rank and run: the error and its text, the iterations done, and those
    at which weights were compared."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = dict(model="vit_tiny_patch16_224", num_heads=2, patch_size=8)
    anchors = [dict(tiny, embed_dim=32, depth=2), dict(tiny, embed_dim=48, depth=4)]
    model = dict(
        type="mmsnnet.StitchedClassifier",
        backbone=dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=32, rank=2, flops_step=1e5),
        num_classes=6,
        data_preprocessor=dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3),
    )
    torch.save(model, folder / "model.pt")
    run_ranks("-c", PROGRAM, folder)
    return folder, [json.loads((folder / f"said {rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_both_ranks_say_the_same(said: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = said
    assert first == second and len(first) == 16


@pytest.mark.parametrize(
    ("run", "checked"),
    [("equal", [0, 2, 4, 6, 6]), ("accumulated", [0, 2, 3, 4, 6, 6, 6]), ("odd", []), ("sharded", [])],
)
def test_equal_ranks_go_on(said: tuple[Path, list[dict[str, Any]]], run: str, checked: list[int]) -> None:
    """Checked at the start, at intervals, before checkpoints and at the end."""
    error, text, iterations, checks = said[1][0][run]
    assert (error, text) == ("", "") and checks == checked
    assert iterations == (6 if checked else 0)


def test_ranks_that_agree_are_named_together() -> None:
    assert consistency_hook._parties([5, 7, 5, 7, 5]) == "ranks 0, 2, 4 and ranks 1, 3"
    assert consistency_hook._parties([5, 7, 5]) == "ranks 0, 2 and rank 1"


@pytest.mark.parametrize(
    ("run", "iterations", "cause"),
    [
        ("ulp at the start", 0, "at iteration 0: rank 0 and rank 1 differ in .*blocks.2.mlp.fc1.weight .*first of 1 "),
        (
            "ulp",
            2,
            r"at iteration 3: rank 0 and rank 1 differ in .*blocks.2.mlp.fc1.weight \(192, 48\), the first of 1 ",
        ),
        ("zero", 3, r"at iteration 4: rank 0 and rank 1 differ in .*cls_token \(1, 1, 32\), the first of "),
        ("skipped", 3, r"in iteration 4 rank 0 ran \S+ \(draw 3\), rank 1 .* \(draws 3, 4\)"),
        ("other stitch", 3, r"in iteration 3 rank 0 ran \S+ \(draw 2\), rank 1 [SL] \(draw 2\)"),
        ("bins", 0, r"bins of the sampler is \(\(0,\), .* on rank 0, \(\(0, 2, 4, 1\),\) on rank 1.*flops_step"),
        ("frozen", 0, r"rank 0 has backbone.*pos_embed \(1, 17, 32\) torch.float32 trained; rank 1 has .* frozen"),
        ("more", 0, r"rank 0 has none more; rank 1 has extra.b \(3,\) torch.float32 trained"),
        (
            "shape",
            0,
            r"rank 0 has extra.a \(2,\) torch.float32 trained; rank 1 has extra.a \(3,\) torch.float32 trained",
        ),
        (
            "dtype",
            0,
            r"rank 0 has extra.a \(2,\) torch.float32 trained; rank 1 has extra.a \(2,\) torch.bfloat16 trained",
        ),
        ("odd differs", 0, r"rank 0 and rank 1 differ in extra.bf16 \(3,\), the first of 1 parameters"),
    ],
)
def test_ranks_that_differ_stop_with_the_cause(
    said: tuple[Path, list[dict[str, Any]]], run: str, iterations: int, cause: str
) -> None:
    error, text, done, _ = said[1][0][run]
    assert error == "RanksDifferError" and done == iterations
    assert re.search(cause, text), text


def test_one_ranks_loss_stops_all_before_a_checkpoint_is_written(said: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (found, _) = said
    error, text, done, _ = found["nan"]
    assert error == "NotFiniteError" and done == 3
    assert text.startswith("loss is nan at iteration 4 on rank 1, which ran ") and "(draw 3)" in text
    assert [path.name for path in (folder / "nan").glob("*.pth")] == ["iter_2.pth"]


def test_the_log_says_once_that_shards_are_not_compared(said: tuple[Path, list[dict[str, Any]]]) -> None:
    log = (said[0] / "parts 0.log").read_text()
    assert log.count("sharded and not compared") == 1
    assert log.count("2 ranks start alike") == 2
