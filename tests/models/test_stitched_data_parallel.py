"""Gradients of a stitched model over ranks: the mean of what was used, nothing else, on two ranks as on one.

Two processes run this file and leave what they find in a folder; all else runs with a group of one process.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch import distributed as dist

from mmsnnet.models import StitchedDataParallel, find_stitched_backbone
from mmsnnet.registry import MODELS, OPTIMIZERS
from tests.conftest import gpu

ITERATIONS = 5
OPTIMIZERS_OF_THE_RANKS: dict[str, dict[str, Any]] = {
    "SGD": dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": dict(type="AdamW", lr=0.01, weight_decay=0.1),
}


class Synchronised(torch.autograd.Function):
    """Sends a message in the backward pass, as SyncBN does, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ones = torch.ones(7, dtype=torch.float64)
        dist.all_reduce(ones)
        assert ones.eq(dist.get_world_size()).all(), "what was sent has met another message"
        return grad


class Model(BaseModel):
    """A stitched backbone with a head that is always used, one that may be left out, and one that never is used."""

    synchronised = False

    def __init__(self, backbone: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        for layer in self.backbone.network.layers.values():
            layer.set_base(layer.weight, layer.bias)
        width = self.backbone.network.anchor(-1).width
        self.head, self.sometimes, self.never = (nn.Linear(width, 3) for _ in range(3))
        for parameter in self.parameters():  # so that layer scale and zeros all count
            nn.init.normal_(parameter, std=0.1)
        self.register_buffer("buffer", torch.rand(3))

    def forward(
        self, inputs: Tensor, targets: Tensor, sometimes: bool = True, mode: str = "tensor"
    ) -> dict[str, Tensor] | Tensor:
        features = sum(tap.mean(dim=(2, 3)) for tap in self.backbone(inputs))
        if self.synchronised:
            features = Synchronised.apply(features)
        if mode != "loss":
            return self.head(features)
        losses = dict(loss=(self.head(features) - targets).square().mean())
        if sometimes:
            losses["loss_sometimes"] = self.sometimes(features).square().mean()
        return losses


def make_batch(iteration: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(iteration)
    sizes = dict(inputs=(4, 3, 32, 32), targets=(4, 3))
    return {key: torch.randn(*size, generator=generator, dtype=dtype) for key, size in sizes.items()}


class Recording(OptimWrapper):
    """Writes down which parameters have a gradient at each step."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.names: list[list[str]] = []

    def step(self, **kwargs: Any) -> None:
        self.names.append([name for name, p in self.model.named_parameters() if p.grad is not None])
        super().step(**kwargs)


# What the two processes do.


def train(
    config: dict[str, Any],
    way: str,
    rank: int,
    optimizer: str,
    stitches: int = 1,
    skip: bool = False,
    synchronised: bool = False,
) -> dict[str, Any]:
    """Trains in double precision, on half of each batch or, ``alone``, on the whole; where ``skip``, rank 1 leaves out
    a head every second time; where ``synchronised``, the heads send a message in the backward pass, and each parameter
    is a bucket."""
    torch.manual_seed(0 if way == "alone" else rank)  # which construction must make up for
    model = Model(config).double()
    model.synchronised = synchronised
    model.backbone.stitches_per_step = stitches
    wrapped: nn.Module = model
    if way == "reduced":
        config = dict(type="mmsnnet.StitchedDataParallel", bucket_cap_mb=0 if synchronised else 0.05)
        wrapped = MODEL_WRAPPERS.build(config, default_args=dict(module=model))
    elif way == "ddp":
        wrapped = MMDistributedDataParallel(model, find_unused_parameters=True)
    start = copy.deepcopy(model.state_dict())
    wrapper = Recording(
        model,
        optimizer=OPTIMIZERS.build(OPTIMIZERS_OF_THE_RANKS[optimizer] | dict(params=model.parameters())),
        accumulative_counts=stitches,
        clip_grad=dict(max_norm=1.0),
    )
    elements: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        elements.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    drawn = []
    try:
        for iteration in range(ITERATIONS * stitches):
            data: dict[str, Any] = make_batch(iteration // stitches, torch.float64)
            if way != "alone":
                data = {key: tensor[2 * rank : 2 * rank + 2] for key, tensor in data.items()}
            wrapped.train_step(data | dict(sometimes=not (skip and rank and iteration % 2)), wrapper)
            drawn.append(model.backbone.drawn.id)
    finally:
        dist.all_reduce = reduce
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return dict(
        start=start, end=model.state_dict(), drawn=drawn, names=wrapper.names, elements=sum(elements), sizes=sizes
    )


class AverageHook(Hook):
    """Keeps the average that EMAHook is to keep."""

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        self.average = {name: p.detach().clone() for name, p in runner.model.module.named_parameters()}

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        for name, parameter in runner.model.module.named_parameters():
            if runner.iter:
                self.average[name].lerp_(parameter.detach(), 0.1)
            else:
                self.average[name].copy_(parameter.detach())


def run(folder: Path, rank: int, ema: bool) -> dict[str, Any]:
    """A runner's training, as a config says it, with or without the average of weights."""
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = [dict(inputs=image, data_samples=BaseDataElement(gt_label=i % 6)) for i, image in enumerate(images)]
    recorder = AverageHook()
    runner = Runner(
        torch.load(folder / "classifier.pt"),
        str(folder / f"ema {ema}"),
        train_dataloader=dict(
            batch_size=2,
            dataset=samples,
            sampler=dict(type="InfiniteSampler"),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2)),
        custom_hooks=[
            dict(type="mmsnnet.StitchInitHook", num_images=8),
            *([dict(type="EMAHook", momentum=0.1), recorder] if ema else ()),
        ],
        randomness=dict(seed=0, diff_rank_seed=True),
        launcher="pytorch",
        cfg=dict(model_wrapper_cfg=dict(type="mmsnnet.StitchedDataParallel")),
        experiment_name=f"ema {ema}",
        default_scope="mmsnnet",
        log_level="ERROR",
    )
    model = runner.train()
    found = dict(wrapped=isinstance(model, StitchedDataParallel), weights=dict(model.module.named_parameters()))
    if ema:
        hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
        found |= dict(average=recorder.average, ema=dict(hook.ema_model.module.named_parameters()))
    return found


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    config = torch.load(folder / "backbone.pt")
    found = {}
    for optimizer in OPTIMIZERS_OF_THE_RANKS:
        for way in ("alone", "ddp", "reduced"):
            found[f"{optimizer} {way}"] = train(config, way, rank, optimizer)
    for way in ("alone", "ddp", "reduced"):
        found[f"AdamW {way} 3"] = train(config, way, rank, "AdamW", stitches=3)
    for way in ("ddp", "reduced"):
        found[f"skip {way}"] = train(config, way, rank, "AdamW", skip=True)
    found["skip, synchronised"] = train(config, "reduced", rank, "AdamW", skip=True, synchronised=True)
    for ema in (False, True):
        found[f"ema {ema}"] = run(folder, rank, ema)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))


# What is expected of it.

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Found:
    """What the two ranks have found."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = dict(model="vit_tiny_patch16_224", num_heads=2)
    anchors = [tiny | dict(embed_dim=32, depth=2), tiny | dict(embed_dim=48, depth=4)]
    backbone = dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=32, rank=2, flops_step=1, seed=5)
    torch.save(backbone | dict(out_indices=(0, 1, 3)), folder / "backbone.pt")
    preprocessor = dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3)
    classifier = dict(type="mmsnnet.StitchedClassifier", backbone=backbone, num_classes=6)
    torch.save(classifier | dict(data_preprocessor=preprocessor), folder / "classifier.pt")
    run_ranks(__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


RUNS = ["SGD reduced", "AdamW reduced", "AdamW reduced 3"]


@pytest.mark.parametrize("name", [*RUNS, "skip reduced"])
def test_ranks_stay_alike(name: str, found: Found) -> None:
    first, second = (of_rank[name] for of_rank in found)
    assert_equal(first["start"], second["start"])
    assert_equal(first["end"], second["end"])
    assert first["drawn"] == second["drawn"] and len(set(first["drawn"])) > 2
    assert first["names"] == second["names"]
    assert any(not torch.equal(first["end"][key], weight) for key, weight in first["start"].items())


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_with_both_batches(name: str, found: Found) -> None:
    one = found[0][name.replace("reduced", "alone")]
    two = found[0][name]
    assert_equal(one["start"], two["start"])
    torch.testing.assert_close(one["end"], two["end"], rtol=1e-9, atol=1e-12)
    assert (one["drawn"], one["names"]) == (two["drawn"], two["names"])


@pytest.mark.parametrize("name", [*RUNS, "skip reduced"])
def test_two_ranks_train_as_with_distributed_data_parallel(name: str, found: Found) -> None:
    ddp, reduced = found[0][name.replace("reduced", "ddp")], found[0][name]
    assert_equal(ddp["end"], reduced["end"])
    assert ddp["names"] == reduced["names"]


def test_heads_may_send_messages_in_the_backward_pass(found: Found) -> None:
    """Also where a rank lacks gradients that others have by then: all ranks send the same in the same order."""
    for of_rank in found:
        assert_equal(of_rank["skip, synchronised"]["end"], of_rank["skip reduced"]["end"])


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_sent_for_what_was_not_used(name: str, found: Found) -> None:
    run = found[0][name]
    never = [key for key in run["sizes"] if key.startswith("never")]
    assert not any(key in names for key in never for names in run["names"])
    sent = [[*names, *never] for names in run["names"]]
    # One flag goes with each tensor.
    assert run["elements"] == sum(run["sizes"][key] + 1 for keys in sent for key in keys)
    if "3" not in name:  # the cheapest and the costliest stitch together use both anchors
        assert run["elements"] < 0.9 * ITERATIONS * sum(run["sizes"].values())


def test_a_runner_trains_by_config_and_averages_beside_the_weights(found: Found) -> None:
    plain, averaged = ([of_rank[f"ema {ema}"] for of_rank in found] for ema in (False, True))
    assert all(of_rank["wrapped"] for of_rank in plain)
    for weights in (plain[1]["weights"], averaged[0]["weights"], averaged[1]["weights"]):
        assert_equal(plain[0]["weights"], weights)
    for of_rank in averaged:
        torch.testing.assert_close(of_rank["ema"], of_rank["average"])


# In a group of one process the mean is the gradient itself, to the bit.


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make_pair(group: None, backbone_config: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """``make_pair(...)``: a model and its copy, wrapped; keywords are the backbone's, ``cap`` is the wrapper's."""

    def make(cap: float = 0.05, device: str = "cpu", **kwargs: Any) -> tuple[Model, StitchedDataParallel]:
        settings = dict(out_indices=(0, 1, 3), flops_step=1, seed=5) | kwargs
        model = Model(backbone_config(**settings)).to(device)
        _ = model.backbone.sampler()  # counts FLOPs, once for both
        return model, StitchedDataParallel(copy.deepcopy(model), bucket_cap_mb=cap)

    return make


def backward(model: nn.Module, iteration: int = 0, sometimes: bool = True, scale: float = 1.0) -> None:
    losses = model(**make_batch(iteration), sometimes=sometimes, mode="loss")
    (scale * sum(losses.values())).backward()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    module = model.module if isinstance(model, StitchedDataParallel) else model
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_equal_gradients(one: nn.Module, other: nn.Module) -> None:
    found = [{k: g for k, g in gradients(model).items() if g is not None} for model in (one, other)]
    assert found[0]
    assert_equal(*found)


BACKBONES: dict[str, dict[str, Any]] = {
    "a layer that taps and crossings share": dict(),
    "taps up to a block before the last": dict(out_indices=(0, 1)),
    "frozen stages": dict(frozen_stages=2),
    "norms of taps": dict(norm_taps=True),
    "frozen anchor": dict(frozen_anchors=(1,)),
    "full weights": dict(rank=0),
    "recomputed blocks": dict(with_cp=True),
}


@pytest.mark.parametrize("settings", BACKBONES.values(), ids=BACKBONES.keys())
def test_gradients_are_those_of_the_model(settings: dict[str, Any], make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair(**settings)
    for iteration in range(ITERATIONS):
        for one in (model, wrapped):
            one.zero_grad()
            backward(one, iteration, sometimes=iteration % 2 == 0)
        assert_equal_gradients(model, wrapped)
    assert model.backbone.draws == wrapped.backbone.draws == ITERATIONS


def test_adaptive_clipping_acts_on_the_averaged_gradients(make_pair: Callable[..., Any]) -> None:
    pair = make_pair()
    steps = []
    for model in pair:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        config = dict(
            type="OptimWrapper",
            constructor="mmsnnet.StitchOptimWrapperConstructor",
            optimizer=dict(type="SGD", lr=1.0),
            clip_grad=dict(type="agc", clip_factor=1e-3),
        )
        wrapper = build_optim_wrapper(model, config)
        backward(model)
        free = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
        wrapper.step()
        steps.append([old - new for old, new in zip(before, model.parameters(), strict=True)])
        assert any(
            grad is not None and (grad - step).norm() > grad.norm() / 2
            for grad, step in zip(free, steps[-1], strict=True)
        )
        assert not any(step.any() for grad, step in zip(free, steps[-1], strict=True) if grad is None)
    assert all(map(torch.equal, *steps))


def test_gradients_are_views_of_buckets_with_nothing_else_in_them(make_pair: Callable[..., Any]) -> None:
    _, wrapped = make_pair()
    backward(wrapped)  # L; after which the wrapper knows what the head never uses
    wrapped.zero_grad()
    backward(wrapped)  # S
    found = [grad for grad in gradients(wrapped).values() if grad is not None]
    buckets = {grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() // 4 for grad in found}
    never = sum(parameter.numel() + 1 for parameter in wrapped.module.never.parameters())
    assert 1 < len(buckets) < len(found) / 2
    assert sum(buckets.values()) == sum(grad.numel() + 1 for grad in found) + never


def test_buckets_are_reduced_while_the_backward_pass_goes_on(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wrapped = make_pair()
    events: list[str] = []
    reduce = dist.all_reduce

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append("reduced")
        return reduce(*args, **kwargs)

    for parameter in wrapped.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: events.append("arrived"))
    backward(wrapped)  # the head has a parameter that is never used, as the first reduction finds out
    wrapped.zero_grad()
    monkeypatch.setattr(dist, "all_reduce", noted)
    events.clear()
    backward(wrapped)
    last = max(place for place, event in enumerate(events) if event == "arrived")
    assert events[:last].count("reduced") >= events.count("reduced") - 1 > 1
    # What was added up before is reduced first of all.
    wrapped.zero_grad()
    wrapped.backbone.draws = 0
    with wrapped.no_sync():
        backward(wrapped)  # L alone
    events.clear()
    wrapped.backbone.draws = 1
    backward(wrapped)  # S
    assert "reduced" in events[:5]


def test_a_rank_reads_nothing_from_its_device_unless_it_lacks_a_gradient(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lacking = make_pair()
    model.never.requires_grad_(False)

    def read(*_: Any) -> None:
        raise AssertionError("waits for the device")

    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, read)
    backward(StitchedDataParallel(model))
    with pytest.raises(AssertionError, match="waits for the device"):
        backward(lacking)


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 1])
def test_gradients_add_up_over_the_stitches_of_a_step(last: int, make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    for step in range(2):
        for one in (model, wrapped):
            one.zero_grad()
            for iteration in range(3):
                backward(one, 3 * step + iteration, scale=1 / 3)
                if one is wrapped and iteration == last:
                    break
            one.zero_grad()
            one.backbone.draws = 3 * step
        for iteration in range(3):
            backward(model, 3 * step + iteration)
        with wrapped.no_sync():
            backward(wrapped, 3 * step)
            backward(wrapped, 3 * step + 1)
        backward(wrapped, 3 * step + 2)
        assert_equal_gradients(model, wrapped)


def test_one_backward_pass_may_follow_several_forwards(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    for one in (model, wrapped):
        losses = [sum(one(**make_batch(i), mode="loss").values()) for i in range(3)]
        sum(losses).backward()
    assert_equal_gradients(model, wrapped)


def test_a_forward_may_run_the_backbone_several_times(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    for one in (model, wrapped):
        module = one if one is model else one.module
        once = module.forward
        module.forward = lambda *args, once=once, **kwargs: {
            f"{name}_{run}": loss for run in range(3) for name, loss in once(*args, **kwargs).items()
        }
        backward(one)
        assert module.backbone.draws == 3
    assert_equal_gradients(model, wrapped)


def test_a_forward_without_a_backward_pass_leaves_no_trace(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    for one in (model, wrapped):
        one(**make_batch(0), mode="loss")
        with torch.no_grad():
            one(**make_batch(0), mode="loss")
        one.eval()
        one(**make_batch(0))
        one.train()
        backward(one, 1)
    assert_equal_gradients(model, wrapped)


def test_a_step_after_a_failed_one_is_clean(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()

    def fail(_: Tensor) -> None:
        raise ArithmeticError("in the middle")

    for one in (model, wrapped):
        module = one if one is model else one.module
        handle = module.backbone.network.anchors[1].model.blocks[1].norm1.weight.register_hook(fail)
        with pytest.raises(ArithmeticError, match="in the middle"):
            backward(one, 0)  # L
        handle.remove()
        assert any(grad is not None for grad in gradients(one).values())
        one.zero_grad()
        backward(one, 1)
    assert_equal_gradients(model, wrapped)


@pytest.mark.slow
def test_gradients_unscale_and_clip(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    found = []
    for one in (model, wrapped):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with torch.autocast("cpu", torch.bfloat16):
            losses = one(**make_batch(0), mode="loss")
        scaler.scale(sum(losses.values())).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = copy.deepcopy(one.state_dict())
        scaler.scale(float("inf") * sum(one(**make_batch(1), mode="loss").values())).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert_equal({k: v for k, v in before.items() if "draws" not in k}, weights(one))
        found.append({key.removeprefix("module."): value for key, value in weights(one).items()})
    assert_equal(*found)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if "draws" not in key}


@pytest.mark.slow
def test_each_dtype_has_buckets_of_its_own(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair(cap=25)
    for module in (model, wrapped.module):
        module.backbone.network.anchors.bfloat16()
    for one in (model, wrapped):
        with torch.autocast("cpu", torch.bfloat16):
            backward(one)
    assert_equal_gradients(model, wrapped)
    found = [grad for grad in gradients(wrapped).values() if grad is not None]
    assert {grad.dtype for grad in found} == {torch.float32, torch.bfloat16}
    assert len({grad.untyped_storage().data_ptr() for grad in found}) == 2


@pytest.mark.slow
def test_gradients_are_laid_out_as_their_parameters(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    wrapped.to(memory_format=torch.channels_last)
    convolution = wrapped.module.backbone.network.anchors[1].model.patch_embed.proj.weight
    assert not convolution.is_contiguous()
    for one in (model, wrapped):
        backward(one)  # L
    assert convolution.grad.stride() == convolution.stride()
    torch.testing.assert_close(dict(model.named_parameters())[NAME].grad, convolution.grad)


NAME = "backbone.network.anchors.1.model.patch_embed.proj.weight"


@pytest.mark.slow
def test_a_gradient_that_no_stitch_accounts_for_is_an_error(make_pair: Callable[..., Any]) -> None:
    _, wrapped = make_pair()
    wrapped.backbone.draws = 1
    losses = wrapped(**make_batch(0), mode="loss")
    assert wrapped.backbone.drawn.name == "S"
    stray = wrapped.module.get_parameter(NAME)
    with pytest.raises(RuntimeError, match=f"{NAME} got a gradient, but no stitch drawn"):
        (sum(losses.values()) + stray.sum()).backward()
    wrapped.zero_grad()
    backward(wrapped)


@pytest.mark.slow
def test_a_backward_pass_needs_a_forward_in_training_mode(make_pair: Callable[..., Any]) -> None:
    _, wrapped = make_pair()
    backward(wrapped)
    with pytest.raises(RuntimeError, match="no forward in training mode has gone through the wrapper"):
        backward(wrapped.module)
    wrapped.eval()
    with pytest.raises(RuntimeError, match="no forward in training mode has gone through the wrapper"):
        backward(wrapped)
    wrapped.train()
    loss = sum(wrapped(**make_batch(0), mode="loss").values())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once for each backward pass"):
        loss.backward()
    wrapped.zero_grad()
    backward(wrapped)


def test_a_second_gradient_in_a_pass_is_an_error(make_pair: Callable[..., Any]) -> None:
    _, wrapped = make_pair(cap=25)
    head = wrapped.module.head
    features = torch.randn(1, head.in_features, requires_grad=True)

    def recomputed() -> Tensor:
        return torch.utils.checkpoint.checkpoint(head, features, use_reentrant=True).sum()

    losses = wrapped(**make_batch(0), mode="loss")
    with pytest.raises(RuntimeError, match=r"head\.\w+ got .*use_reentrant=False"):
        (sum(losses.values()) + recomputed() + recomputed()).backward()


@pytest.mark.slow
def test_a_copy_trains_apart(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    backward(wrapped, 0)
    twin = copy.deepcopy(wrapped)
    assert twin.backbone is find_stitched_backbone(twin.module) is not wrapped.backbone
    assert twin.state_dict().keys() == {f"module.{key}" for key in model.state_dict()}
    before = {name: None if grad is None else grad.clone() for name, grad in gradients(wrapped).items()}
    twin.zero_grad()
    backward(twin, 1)
    assert_equal(
        {k: g for k, g in before.items() if g is not None},
        {k: g for k, g in gradients(wrapped).items() if g is not None},
    )
    model.backbone.draws = 1
    backward(model, 1)
    assert_equal_gradients(model, twin)
    backward(copy.deepcopy(wrapped.module), 2)  # as that of averaged weights: nobody watches it


@pytest.mark.slow
def test_a_model_may_be_wrapped_again(make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair()
    module = wrapped.module
    del wrapped
    backward(module, 0)
    module.zero_grad()
    again = StitchedDataParallel(module)
    for one in (model, again):
        one.zero_grad()
        (one.backbone if one is model else module.backbone).draws = 1
        backward(one, 1)
    assert_equal_gradients(model, again)


def test_the_wrapper_is_one_of_mmengines(make_pair: Callable[..., Any]) -> None:
    _, wrapped = make_pair()
    assert MODEL_WRAPPERS.get("mmsnnet.StitchedDataParallel") is StitchedDataParallel
    assert is_model_wrapper(wrapped)
    with pytest.raises(TypeError, match="0 backbones"):
        StitchedDataParallel(nn.Linear(2, 2))


@gpu
@pytest.mark.parametrize("side_stream", [False, True])
def test_gradients_on_a_gpu_are_those_of_the_model(side_stream: bool, make_pair: Callable[..., Any]) -> None:
    model, wrapped = make_pair(device="cuda")
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-6, fused=True) for one in (model, wrapped)]
        for iteration in range(ITERATIONS):
            batch = {key: value.cuda() for key, value in make_batch(iteration).items()}
            for one in (model, wrapped):
                losses = one(**batch, sometimes=iteration % 2 == 0, mode="loss")
                sum(losses.values()).backward()
            # Attention's backward pass adds up in an order that varies.
            found = [{k: g for k, g in gradients(one).items() if g is not None} for one in (model, wrapped)]
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
