"""Builders that the tests share: tiny anchors of timm's families, networks of two of them, images."""

import os
import random
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmsnnet.stitching import Anchor, StitchedNetwork, StitchSpace, create_anchor
from tests.python_processes import REPOSITORY, PythonProcess

try:
    from mmengine.registry import DefaultScope
except ImportError:  # the tests of mmsnnet.stitching run without OpenMMLab
    DefaultScope = None

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "the tests of the page were left out: no Chromium found (apt-get install chromium)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is known from a test's folder and fixtures, and leaves out what needs a browser that is missing."""
    for item in items:
        # .ci/run installs one: there, its lack is a failure.
        if CHROMIUM is None and "CI" not in os.environ and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=NO_BROWSER))
        if item.path.is_relative_to(REPOSITORY / "tests/end_to_end"):
            item.add_marker("end_to_end")
        if isinstance(item, pytest.Function) and "run_ranks" in item.fixturenames:
            item.add_marker("distributed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in one line if tests were left out for want of a browser."""
    if any(NO_BROWSER in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(NO_BROWSER)


class RunsCode:
    """What a hostile checkpoint holds: unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def ending(job: Callable[[], object]) -> int:
    """How a copy of this process ends that does a job: with the number of a signal, negative, or a status of 0 or 1."""
    process = os.fork()
    if process == 0:
        try:
            job()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Tool:
    """Runs ``tools/<name>.py``, or a demo, as a user does, in a process that forks from a server.

    Args:
        make_folder: makes an empty folder for what a tool prints.
    """

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self.make_folder = make_folder

    def __call__(self, name: str, *arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
        """Run a tool that succeeds."""
        done = self.attempt(name, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done

    def attempt(
        self, name: str, *arguments: object, cwd: Path = REPOSITORY, columns: int = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a tool that succeeds or fails, in a terminal of so many columns."""
        script = REPOSITORY / ("" if name.startswith("demo/") else "tools") / f"{name}.py"
        return PythonProcess(script, *arguments, folder=cwd, output=self.make_folder("tool"), COLUMNS=columns).wait()

    def error(self, name: str, *arguments: object, cwd: Path = REPOSITORY) -> str:
        """Run a tool that rejects its arguments; return the last line that it prints."""
        done = self.attempt(name, *arguments, cwd=cwd)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.splitlines()[-1]


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    return Tool(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """``run_ranks(*arguments)``: runs Python with these arguments and a rank, 0 or 1, in two processes until both end.
    If one fails, the other is killed, and the errors of both fail the test."""

    def run(*arguments: object, timeout: float = 600) -> None:
        ranks = [
            PythonProcess(*arguments, rank, folder=Path.cwd(), output=tmp_path_factory.mktemp("rank"), quiet=True)
            for rank in range(2)
        ]
        running, end = {rank.process.sentinel for rank in ranks}, time.monotonic() + timeout
        try:
            while running and not any(rank.process.exitcode for rank in ranks) and time.monotonic() < end:
                running -= set(wait(running, timeout=end - time.monotonic()))
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
        errors = [f"rank {number}:\n{rank.stderr[-4000:]}" for number, rank in enumerate(ranks)]
        assert [rank.process.exitcode for rank in ranks] == [0, 0], "\n".join(errors)

    return run


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are quicker on one thread, above all where other work shares the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random states, which transforms use too, and leaves no trace in them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        yield
    random.setstate(python), np.random.set_state(numpy)


@pytest.fixture(autouse=True, scope="module")
def restored_scope() -> Iterator[None]:
    """Restores the default scope (toolbox) after each test file."""
    if DefaultScope is None:
        yield
        return
    scopes = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict = scopes


@pytest.fixture
def make_images() -> Callable[..., Tensor]:
    """``make_images(batch, height, width)``: standard normal images (B, 3, H, W)."""

    def make(
        batch: int = 2, height: int = 32, width: int = 32, seed: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return make


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Moves every parameter off its initial value, so that layer scale, position embedding and zeros all count."""

    @torch.no_grad()
    def move(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    return move


@pytest.fixture
def make_anchor(randomise: Callable[[nn.Module], None]) -> Callable[..., Anchor]:
    """``make_anchor(depth, width)``: a tiny anchor in evaluation mode; other keywords as for ``create_anchor``."""

    def make(
        depth: int = 2,
        width: int = 32,
        model: str = "deit3_small_patch16_224",
        img_size: int | tuple[int, int] = 32,
        **kwargs: Any,
    ) -> Anchor:
        anchor = create_anchor(model, img_size, embed_dim=width, depth=depth, num_heads=2, **kwargs).eval()
        randomise(anchor)
        return anchor

    return make


@pytest.fixture
def make_network(
    make_anchor: Callable[..., Anchor], randomise: Callable[[nn.Module], None]
) -> Callable[..., StitchedNetwork]:
    """``make_network(depths, widths)``: a two-way network in evaluation mode whose layers all differ from zero."""

    def make(
        depths: tuple[int, ...] = (2, 4),
        widths: tuple[int, ...] = (32, 48),
        rank: int = 2,
        with_cp: bool = False,
        **kwargs: Any,
    ) -> StitchedNetwork:
        anchors = [make_anchor(depth, width, **kwargs) for depth, width in zip(depths, widths, strict=True)]
        network = StitchedNetwork(anchors, StitchSpace.two_way(depths), rank=rank, with_cp=with_cp).eval()
        randomise(network.layers)
        return network

    return make


@pytest.fixture
def backbone_config() -> Callable[..., dict[str, Any]]:
    """``backbone_config(small=..., large=...)``: a config of a tiny ``StitchedViT`` of depths 2 and 4, with changes to
    its anchors; other keywords are the backbone's."""

    def make(small: dict[str, Any] | None = None, large: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        tiny = dict(model="vit_tiny_patch16_224", num_heads=2)
        sizes = (dict(embed_dim=32, depth=2) | (small or {}), dict(embed_dim=48, depth=4) | (large or {}))
        anchors = [tiny | size for size in sizes]
        return dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=32, rank=2, flops_step=2e4) | kwargs

    return make


@pytest.fixture
def make_backbone(
    backbone_config: Callable[..., dict[str, Any]], randomise: Callable[[nn.Module], None]
) -> Callable[..., Any]:
    """``make_backbone(...)``: the backbone of ``backbone_config``, in training mode, its layers initialised."""

    def make(initialized: bool = True, **kwargs: Any) -> Any:
        from mmsnnet.registry import MODELS  # not every test needs OpenMMLab

        backbone = MODELS.build(backbone_config(**kwargs))
        randomise(backbone)
        if initialized:
            initialize(backbone)
        return backbone

    return make


@pytest.fixture
def segmentor_config(backbone_config: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``segmentor_config(...)``: a config of an mmseg segmentor around the backbone of ``backbone_config``."""

    def make(out_indices: Any = None, **kwargs: Any) -> dict[str, Any]:
        backbone = backbone_config(out_indices=out_indices or dict(train=(1, 3), test=(3,)), **kwargs)
        norm = dict(type="BN")
        head = dict(type="SETRUPHead", in_channels=48, channels=8, num_classes=8, norm_cfg=norm, num_convs=1)
        head |= dict(up_scale=4, kernel_size=1, align_corners=False, dropout_ratio=0)
        return dict(
            type="mmseg.EncoderDecoder",
            data_preprocessor=dict(
                type="mmseg.SegDataPreProcessor", mean=[127.5] * 3, std=[60.0] * 3, size=(32, 32), seg_pad_val=255
            ),
            backbone=backbone,
            decode_head=dict(head, in_index=1),
            auxiliary_head=dict(head, in_index=0),
            test_cfg=dict(mode="whole"),
        )

    return make


@pytest.fixture
def make_segmentor(
    segmentor_config: Callable[..., dict[str, Any]], randomise: Callable[[nn.Module], None]
) -> Callable[..., Any]:
    """``make_segmentor(...)``: the model of ``segmentor_config``, its stitching layers initialised."""

    def make(**kwargs: Any) -> Any:
        from mmseg.registry import MODELS

        model = MODELS.build(segmentor_config(**kwargs))
        randomise(model)
        initialize(model.backbone)
        return model

    return make


def initialize(backbone: Any) -> None:
    """Declares a backbone's stitching layers initialised, as they are."""
    for layer in backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
