"""The benchmark times the deployed model, stitches in turn."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

import mmsnnet.apis.benchmark as module
from mmsnnet.apis.benchmark import BenchmarkSettings, benchmark_conditions, benchmark_stitches
from mmsnnet.apis.model import deployed
from mmsnnet.evaluation.latencies import StitchLatency
from mmsnnet.stitching import StitchSpace, UnknownStitchError
from tests.conftest import gpu

MakeSegmentor = Callable[..., Any]
QUICK = BenchmarkSettings(warmup=1, repeats=2)
SPACE = StitchSpace.two_way((2, 4))


class Spy(BaseModel):
    """A model that records stitch, inputs and output of each forward."""

    calls: list[dict[str, Any]]

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.calls = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Spy":
        copied = Spy(copy.deepcopy(self.backbone, memo))
        copied.calls = self.calls  # so that the test sees what the copy does
        return copied

    def forward(self, images: Tensor, data_samples: Any = None, mode: str = "tensor") -> Tensor:
        result = self.backbone(images)[-1]
        self.calls.append(
            dict(
                model=self,
                stitch=self.backbone.stitch,
                images=images,
                samples=data_samples,
                mode=mode,
                out=result,
                ranks={layer.rank for layer in self.backbone.network.layers.values()},
                training=any(m.training for m in self.modules()),
                gradients=torch.is_grad_enabled(),
            )
        )
        return result


@pytest.fixture
def spy(make_backbone: Callable[..., Any]) -> Spy:
    return Spy(make_backbone())


class Clock:
    """A clock that moves only when a stitch runs, by the next value of ``costs``."""

    def __init__(self, model: Spy, costs: dict[str, Iterator[float]]) -> None:
        self.model = model
        self.costs = costs
        self.now = 0.0
        self.seen = 0

    def __call__(self) -> float:
        for call in self.model.calls[self.seen :]:
            self.now += next(self.costs[call["stitch"].name])
        self.seen = len(self.model.calls)
        return self.now


def test_latency_is_the_median_of_the_rounds_after_the_warm_up(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds: at first one run that shows whether the model runs at all, then a round to warm up, then four that count.
    costs = {"S": iter([9.0, 9.0, 0.004, 0.001, 0.002, 0.005]), "L": iter([9.0, 9.0, 0.010, 0.030, 0.020, 0.090])}
    monkeypatch.setattr(time, "perf_counter", Clock(spy, costs))
    result = benchmark_stitches(spy, "anchors", BenchmarkSettings((3,), warmup=1, repeats=4))
    small, large = result.latencies
    assert (small.stitch.name, large.stitch.name) == ("S", "L")
    assert small.times_ms[3] == pytest.approx([4, 1, 2, 5]) and large.times_ms[3] == pytest.approx([10, 30, 20, 90])
    assert small.latency_ms == pytest.approx(3) and large.latency_ms == pytest.approx(25)
    assert small.quartiles_ms == pytest.approx((1.75, 4.25))
    assert small.throughput == pytest.approx(1000) and large.throughput == pytest.approx(120)
    assert small.peak_memory is None and any("peak memory" in note for note in result.notes)


def test_one_repeat_is_its_own_median_and_quartiles() -> None:
    latency = StitchLatency(SPACE[0], {1: (2.5,)})
    assert (latency.latency_ms, latency.quartiles_ms, latency.throughput) == (2.5, (2.5, 2.5), 400.0)
    assert (latency.latencies_ms, latency.throughputs) == ({1: 2.5}, {1: 400.0})


def test_the_figures_of_several_batch_sizes() -> None:
    latency = StitchLatency(SPACE[0], {2: (4.0, 6.0, 5.0), 8: (10.0, 10.0, 10.0)})
    assert latency.latencies_ms == {2: 5.0, 8: 10.0} and latency.throughputs == {2: 400.0, 8: 800.0}
    assert (latency.latency_ms, latency.quartiles_ms, latency.throughput) == (5.0, (4.5, 5.5), 400.0)
    assert hash(latency) == hash(StitchLatency(SPACE[0], {1: (2.5,)}))


def test_stitches_take_turns(spy: Spy) -> None:
    benchmark_stitches(spy, "all", BenchmarkSettings(warmup=2, repeats=3))
    names = [call["stitch"].name for call in spy.calls]
    everyone = [stitch.name for stitch in spy.backbone.space]
    assert names == everyone * (1 + 2 + 3)


def test_each_round_runs_every_stitch_at_every_batch_size(spy: Spy) -> None:
    result = benchmark_stitches(spy, "all", BenchmarkSettings((4, 1), warmup=1, repeats=2))
    calls = [(call["stitch"].name, len(call["images"])) for call in spy.calls]
    everyone = [stitch.name for stitch in spy.backbone.space]
    # At first one run of the largest batch, which shows whether the model runs at all.
    assert calls[: len(everyone)] == [(name, 4) for name in everyone]
    assert calls[len(everyone) :] == [(name, size) for size in (1, 4) for name in everyone] * 3
    for latency in result.latencies:
        assert {size: len(times) for size, times in latency.times_ms.items()} == {1: 2, 4: 2}
    for call in spy.calls:
        assert len(call["samples"]) == len(call["images"])
        assert torch.equal(call["images"], spy.calls[0]["images"][: len(call["images"])])


def test_the_deployed_model_runs_on_the_same_images(spy: Spy) -> None:
    spy.train()
    settings = BenchmarkSettings((3,), warmup=1, repeats=1)
    for _ in range(2):
        benchmark_stitches(spy, "all", settings, input_shape=(32, 48))
    first, *rest = spy.calls
    assert first["images"].shape == (3, 3, 32, 48) and first["images"].std() > 0.5
    assert all(torch.equal(call["images"], first["images"]) for call in rest)
    for call in spy.calls:
        assert call["model"] is not spy
        assert call["ranks"] == {0}
        assert not call["training"] and not call["gradients"] and call["mode"] == "tensor"
        assert [sample.batch_input_shape for sample in call["samples"]] == [(32, 48)] * 3
    # Merged, not left out: the results are those of the model with its updates beside the base weights.
    spy.eval()
    outputs = {call["stitch"]: call["out"] for call in spy.calls}
    with torch.no_grad():
        for stitch, out in outputs.items():
            spy.backbone.set_stitch(stitch)
            torch.testing.assert_close(spy.backbone(first["images"])[-1], out)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_changed(training: bool, make_segmentor: MakeSegmentor) -> None:
    model = make_segmentor(frozen_anchors=(0,)).train(training)
    model.backbone.set_stitch("L1-S1")
    state = copy.deepcopy(model.state_dict())
    modes = {name: part.training for name, part in model.named_modules()}
    random = torch.get_rng_state()
    benchmark_stitches(model, "all", replace(QUICK, precision="bf16", channels_last=True))
    after = model.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
    assert all(state[name].dtype == after[name].dtype for name in state)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert model.backbone.stitch.name == "L1-S1"
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_weights_images_and_results_have_the_precision(precision: str, dtype: torch.dtype, spy: Spy) -> None:
    benchmark_stitches(spy, "anchors", replace(QUICK, precision=precision))
    for call in spy.calls:
        assert {p.dtype for p in call["model"].parameters()} == {call["images"].dtype, call["out"].dtype} == {dtype}


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_images_are_channels_last(channels_last: bool, spy: Spy) -> None:
    benchmark_stitches(spy, "anchors", replace(QUICK, batch_sizes=(1, 2), channels_last=channels_last))
    for call in spy.calls:
        weight = call["model"].backbone.network.anchor(0).model.patch_embed.proj.weight
        for tensor in (call["images"], weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.slow
def test_compiled_stitches_give_the_same_results(make_segmentor: MakeSegmentor) -> None:
    """Code that is compiled for one stitch is not run for another."""
    model = deployed(make_segmentor())
    images = torch.randn(1, 3, 32, 32)
    outputs: dict[str, list[Tensor]] = {}

    def noting(images: Tensor) -> Tensor:
        result = model(images, mode="tensor")
        outputs.setdefault(model.backbone.stitch.name, []).append(result)
        return result

    stitches = model.backbone.space.select("S0-L2,L1-S1")
    compiled = {stitch: module._run(noting, images, "eager") for stitch in stitches}
    plain = module._run(noting, images, None)
    with torch.inference_mode():
        for _ in range(2):
            for stitch, run in compiled.items():
                model.backbone.set_stitch(stitch)
                for once in (plain, run):
                    once()
    assert len(outputs) == 2
    for result in outputs.values():
        assert len(result) == 4
        for other in result[1:]:
            torch.testing.assert_close(other, result[0])


@pytest.mark.slow
def test_a_benchmark_of_compiled_stitches(make_segmentor: MakeSegmentor) -> None:
    torch._dynamo.utils.counters.clear()
    result = benchmark_stitches(make_segmentor(), "anchors", replace(QUICK, batch_sizes=(1, 2), compile="aot_eager"))
    assert result.conditions["compile"] == "aot_eager"
    assert all(len(times) == 2 for latency in result.latencies for times in latency.times_ms.values())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4, "one graph for each stitch and batch size, and no breaks"


def test_the_conditions(make_segmentor: MakeSegmentor) -> None:
    result = benchmark_stitches(make_segmentor(), "anchors", replace(QUICK, batch_sizes=(2,), precision="bf16"))
    conditions = dict(result.conditions)
    assert conditions.pop("date").endswith("+00:00") and conditions.pop("device")
    assert conditions == {
        "backend": "torch",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": 2,
        "precision": "bf16",
        "channels_last": False,
        "compile": None,
        "cuda_graph": False,
        "warmup": 1,
        "repeats": 2,
    }
    assert result.input_shape == (32, 32)
    several = benchmark_conditions(replace(QUICK, batch_sizes=(8, 2)), "cpu")
    assert (several["batch_size"], several["batch_sizes"]) == (2, "2,8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_sizes=(0,)), "batch sizes are numbers of at least 1, each once, such as 1,2,4,8; got 0"),
        (dict(batch_sizes=(4, 1, 4)), "batch sizes are .*; got 4,1,4"),
        (dict(batch_sizes=()), "batch sizes are .*; got none"),
        (dict(warmup=0), "warmup is at least 1"),
        (dict(repeats=0), "repeats is at least 1"),
        (dict(precision="int8"), "fp32, fp16, bf16; got 'int8'"),
        (dict(compile="gcc"), "no backend 'gcc'; it has .*inductor"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**settings)


@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        ("toaster", QUICK, "there is no device 'toaster'"),
        ("meta", QUICK, "a CPU or a CUDA device, got 'meta'"),
        ("cuda:99", QUICK, r"no device 'cuda:99': PyTorch finds \d+ GPUs"),
        ("cpu", replace(QUICK, cuda_graph=True), "a CUDA graph needs a GPU"),
    ],
)
def test_wrong_devices(device: str, settings: BenchmarkSettings, message: str, spy: Spy) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark_stitches(spy, "anchors", settings, device=device)
    with pytest.raises(ValueError, match=message):
        benchmark_conditions(settings, device)
    assert spy.calls == []


def test_an_unknown_stitch(spy: Spy) -> None:
    with pytest.raises(UnknownStitchError, match="X9"):
        benchmark_stitches(spy, "X9")


def test_an_operator_without_half_precision_is_named(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Spy, images: Tensor, *_: Any, **__: Any) -> None:
        raise RuntimeError('"nms" not implemented\nfurther lines')

    monkeypatch.setattr(Spy, "forward", forward)
    with pytest.raises(ValueError, match=r'does not run in bf16 on cpu: "nms" not implemented; use --precision fp32'):
        benchmark_stitches(spy, "anchors", replace(QUICK, precision="bf16"))
    with pytest.raises(RuntimeError, match="further lines"):
        benchmark_stitches(spy, "anchors", QUICK)


def test_a_batch_that_does_not_fit_is_named(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Spy, images: Tensor, *_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Spy, "forward", forward)
    with pytest.raises(ValueError, match=r"a batch of 8 images does not fit in the memory of cpu: .* --batch-sizes"):
        benchmark_stitches(spy, "anchors", replace(QUICK, batch_sizes=(1, 8)))


class TestGraphs:
    """CUDA graphs, with stand-ins for the GPU."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def test_each_stitch_is_captured_while_it_is_active(self, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
        captured = []

        def capture(run: Callable[[], object], pool: Any) -> Callable[[], object]:
            captured.append((run(), spy.backbone.stitch.name, pool))
            return lambda: "replay"

        monkeypatch.setattr(module, "_capture", capture)
        runs = {(s, size): (lambda s=s: s.name) for size in (1, 4) for s in spy.backbone.space}
        replays, failure = module._captured(spy.backbone, runs)
        assert captured == [(stitch.name, stitch.name, "pool") for stitch in spy.backbone.space] * 2
        assert failure is None and list(replays) == list(runs)
        assert {replay() for replay in replays.values()} == {"replay"}

    def test_if_one_cannot_be_captured_none_is_and_the_reason_is_given(
        self, spy: Spy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def capture(run: Callable[[], object], pool: Any) -> Callable[[], object]:
            if run() == "L":
                try:
                    raise RuntimeError("called a synchronizing CUDA operation\nmore")
                finally:
                    raise RuntimeError("the capture was left in a bad state")
            return lambda: "replay"

        monkeypatch.setattr(module, "_capture", capture)
        runs = {(stitch, 1): (lambda stitch=stitch: stitch.name) for stitch in spy.backbone.space}
        remaining, failure = module._captured(spy.backbone, runs)
        assert remaining == runs
        assert failure == (
            "measured without CUDA graphs: stitch 1 (L) cannot be captured: called a synchronizing CUDA operation"
        )


@gpu
@pytest.mark.parametrize("cuda_graph", [None, False])
def test_on_a_gpu(cuda_graph: bool | None, make_segmentor: MakeSegmentor) -> None:
    settings = BenchmarkSettings((1, 2), precision="fp16", cuda_graph=cuda_graph, warmup=2, repeats=5)
    result = benchmark_stitches(make_segmentor(), "all", settings, device="cuda")
    assert result.notes == () and result.conditions["cuda_graph"] is (cuda_graph is None)
    assert result.conditions["device"] == torch.cuda.get_device_name()
    for latency in result.latencies:
        assert list(latency.times_ms) == [1, 2]
        assert all(0 < elapsed < 1000 for times in latency.times_ms.values() for elapsed in times)
        assert latency.peak_memory is not None and latency.peak_memory > 1e5


@gpu
def test_a_graph_computes_what_the_stitch_computes(make_segmentor: MakeSegmentor) -> None:
    model = deployed(make_segmentor()).cuda()
    images, out = torch.randn(2, 3, 32, 32, device="cuda"), {}
    cases = [(stitch, size) for size in (1, 2) for stitch in model.backbone.space]
    with torch.inference_mode():
        for stitch, size in cases:
            out[stitch, size] = torch.zeros_like(model(images[:size], mode="tensor"))
        runs = {(s, n): (lambda s=s, n=n: out[s, n].copy_(model(images[:n], mode="tensor"))) for s, n in cases}
        replays, failure = module._captured(model.backbone, runs)
        assert failure is None
        for (stitch, size), replay in reversed(list(replays.items())):
            model.backbone.set_stitch(stitch)
            expected = model(images[:size], mode="tensor")
            out[stitch, size].zero_()
            replay()
            torch.testing.assert_close(out[stitch, size], expected)


@gpu
def test_a_model_that_waits_for_the_gpu_is_measured_without_graphs(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Spy.forward
    monkeypatch.setattr(Spy, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs).sum().item())
    result = benchmark_stitches(spy, "anchors", QUICK, device="cuda")
    assert result.conditions["cuda_graph"] is False
    assert [note.partition(":")[0] for note in result.notes] == ["measured without CUDA graphs"]
    assert all(len(latency.times_ms[1]) == 2 for latency in result.latencies)
