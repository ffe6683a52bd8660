"""The wheel: its contents, its requirements, and how `mim` uses it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmsnnet.datasets import write_shapes

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
MIM = "mmsnnet/.mim"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Build:
    """The sources before and after a wheel was built from them, and the wheel: contents by path, and the file."""

    before: dict[str, bytes]
    after: dict[str, bytes]
    wheel: dict[str, bytes]
    file: Path
    metadata: Message = field(init=False)

    def __post_init__(self) -> None:
        (name,) = (name for name in self.wheel if re.fullmatch(r"mmsnnet-[^/]+\.dist-info/METADATA", name))
        object.__setattr__(self, "metadata", Parser().parsestr(self.wheel[name].decode()))

    def sources(self, *folders: str) -> dict[str, bytes]:
        """The sources below these folders."""
        return {name: data for name, data in self.before.items() if PurePosixPath(name).parts[0] in folders}

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("packaging")
    source, out = folder / "source", folder / "wheel"
    listing = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name)
    before = contents(source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        wheel = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    return Build(before, contents(source), wheel, path)


@pytest.mark.slow
def test_building_leaves_the_sources_as_they_are(build: Build) -> None:
    assert {name: data for name, data in build.after.items() if name in build.before} == build.before
    # git ignores the folders that setuptools leaves.
    left = {PurePosixPath(name).parts[0] for name in build.after if name not in build.before}
    assert left <= {"build", "mmsnnet.egg-info"}


def test_the_wheel_has_the_package_and_nothing_else(build: Build) -> None:
    package = {name for name in build.sources("mmsnnet") if name.endswith((".py", "/py.typed"))}
    assert len(package) > 20
    modules = {name for name in build.wheel if not name.startswith(f"{MIM}/") and ".dist-info/" not in name}
    assert modules == package
    assert all(build.wheel[name] == build.before[name] for name in package)


def test_the_wheel_has_the_files_for_mim(build: Build) -> None:
    wanted = {**build.sources("configs", "demo", "tools"), "model-index.yml": build.before["model-index.yml"]}
    configs = [name for name in wanted if name.startswith("configs/") and name.endswith(".py")]
    assert len(configs) >= 12 and {"tools/train.py", "demo/image_demo.py"} <= wanted.keys()
    version = build.metadata["Version"]
    for mim in (MIM, f"mmsnnet-{version}.dist-info/.mim"):
        found = {name.removeprefix(f"{mim}/"): data for name, data in build.wheel.items() if name.startswith(f"{mim}/")}
        assert found == wanted


def test_the_metadata(build: Build) -> None:
    metadata = build.metadata
    version = re.search(r'__version__ = "(.+)"', (REPOSITORY / "mmsnnet/version.py").read_text())
    assert version is not None
    assert (metadata["Name"], metadata["Version"]) == ("mmsnnet", version[1])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert build.wheel[f"mmsnnet-{version[1]}.dist-info/licenses/LICENSE"] == (REPOSITORY / "LICENSE").read_bytes()
    python = SpecifierSet(metadata["Requires-Python"])
    assert [minor for minor in range(7, 14) if f"3.{minor}.0" in python] == [10, 11, 12, 13]
    assert metadata["Summary"] and metadata.get_content_type() == "text/plain"


def names(requirements: list[Requirement], extra: str | None = None) -> set[str]:
    """The packages needed with an extra (or without any) over those needed without."""
    always = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    if extra is None:
        return always
    return {r.name for r in requirements if r.marker is not None and r.marker.evaluate({"extra": extra})} - always


def test_openmmlab_is_no_hard_dependency(build: Build) -> None:
    needed = names(build.requirements)
    assert {name for name in needed if name.removeprefix("onedl-").startswith(("mm", "openmim"))} == set()


def test_the_core_needs_nothing_that_draws(build: Build) -> None:
    core = {"torch", "torchvision", "timm", "fvcore", "huggingface_hub", "numpy", "pillow", "safetensors"}
    assert names(build.requirements) == core | {"filelock"}
    assert names(build.requirements, "viz") == {"matplotlib", "plotly", "rich"}


def test_the_extras(build: Build) -> None:
    assert {"mminstall", "det", "viz", "dev"} <= set(build.metadata.get_all("Provides-Extra"))
    toolboxes = {
        extra: {name.removeprefix("onedl-") for name in names(build.requirements, extra)}
        for extra in ("mminstall", "det")
    }
    assert toolboxes == {"mminstall": {"mmengine", "mmcv", "mmsegmentation", "pyyaml", "rich"}, "det": {"mmdetection"}}
    assert {"pytest", "ruff", "mypy"} <= names(build.requirements, "dev")


@pytest.fixture(scope="module")
def metafiles(build: Build) -> dict[str, Any]:
    """The metafiles that the model index in the wheel imports, by path."""
    index = yaml.safe_load(build.wheel[f"{MIM}/model-index.yml"])
    assert set(index) == {"Import"} and len(set(index["Import"])) == len(index["Import"])
    return {name: yaml.safe_load(build.wheel[f"{MIM}/{name}"]) for name in index["Import"]}


def test_the_index_imports_the_metafile_of_every_folder_of_configs(build: Build, metafiles: dict[str, Any]) -> None:
    folders = {str(PurePosixPath(name).parent) for name in build.sources("configs") if name.endswith(".py")}
    folders = {folder for folder in folders if not folder.startswith("configs/_base_")}
    assert folders >= {"configs/quickstart", "configs/camvid"}
    assert set(metafiles) == {f"{folder}/metafile.yaml" for folder in folders}


def test_the_metafiles_name_every_config_once(build: Build, metafiles: dict[str, Any]) -> None:
    """A model has the name of its config file, which is how `mim` finds the one by the other."""
    named = [model["Config"] for metafile in metafiles.values() for model in metafile["Models"]]
    configs = [name for name in build.sources("configs") if name.endswith(".py") and "/_base_/" not in name]
    assert sorted(named) == sorted(configs)
    for path, metafile in metafiles.items():
        for model in metafile["Models"]:
            assert PurePosixPath(model["Config"]).parent == PurePosixPath(path).parent
            assert model["Name"] == PurePosixPath(model["Config"]).stem


def test_every_model_is_in_a_collection_that_exists(build: Build, metafiles: dict[str, Any]) -> None:
    collections = [collection for metafile in metafiles.values() for collection in metafile.get("Collections", [])]
    known = {collection["Name"] for collection in collections}
    assert len(known) == len(collections) >= 1
    used = {model["In Collection"] for metafile in metafiles.values() for model in metafile["Models"]}
    assert used == known
    pages = [collection["README"] for collection in collections if "README" in collection]
    assert [page for page in pages if page not in build.before] == []


@pytest.fixture(scope="module")
def site(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed outside the repository; its requirements come from this environment."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, build.file], check=True, timeout=300)
    return folder


def mim(site: Path, cwd: Path, *arguments: str) -> str:
    """Run `mim` from ``cwd`` and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "mim", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@pytest.mark.slow
def test_mim_trains_and_tests_an_installed_wheel(site: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", "shapes", train=4, val=2, size=(64, 64))
    config = "vit-s_setr_shapes-64x64.py"
    settings: dict[str, object] = {
        "train_cfg.max_iters": 2,
        "train_dataloader.batch_size": 2,
        "default_hooks.checkpoint.interval": 2,
    }
    for split in ("train", "val", "test"):
        settings[f"{split}_dataloader.dataset.data_root"] = "data"
        settings[f"{split}_dataloader.num_workers"] = 0
        settings[f"{split}_dataloader.persistent_workers"] = False
    options = ("--cfg-options", *(f"{key}={value}" for key, value in settings.items()))
    two = ("--gpus", "2", "--launcher", "pytorch")  # processes, where there is no GPU
    output = mim(site, tmp_path, "train", "mmsnnet", config, *two, *options)
    checkpoint = "work_dirs/quickstart/anchor_s/iter_2.pth"
    assert (tmp_path / checkpoint).is_file()

    chosen = ("--checkpoint", checkpoint, "--out", "points.json")
    output += mim(site, tmp_path, "test", "mmsnnet", config, *chosen, *options)
    (stitch,) = json.loads((tmp_path / "points.json").read_text())["stitches"]
    assert stitch["name"] == "A" and "mIoU" in stitch["metrics"]
    # Both came from the installation: its tools and its configs.
    for name in ("tools/train.py", "tools/test.py", f"configs/quickstart/{config}"):
        assert re.search(rf"command is .*{re.escape(str(site))}\S*/\.mim/{re.escape(name)}", output)
    assert str(REPOSITORY) not in output.replace(sys.prefix, "")  # the environment may lie in the repository
