"""Put the files that `mim` needs into the wheel; the metadata is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MIM_FILES = ("configs", "tools", "demo", "model-index.yml")


def put_mim_files(mim: Path, link: bool = False) -> None:
    mim.mkdir(parents=True, exist_ok=True)
    for name in MIM_FILES:
        source, target = ROOT / name, mim / name
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        if link:
            target.symlink_to(source)
        elif source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)


class BuildWithMim(build_py):
    """Copy the mim files to `mmsnnet/.mim`, OpenMMLab's place for them; an editable installation links them."""

    def run(self) -> None:
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        put_mim_files(root / "mmsnnet" / ".mim", link=self.editable_mode)


class WheelWithMim(bdist_wheel):
    """Copy the mim files to the wheel's metadata, too.

    onedl-mim 0.5.1 looks for `.mim` beside the first file in pip's record, which is sorted: `mmsnnet-0.1.0.dist-info`
    comes before `mmsnnet`. For an editable installation it uses the path of the checkout.
    """

    def write_wheelfile(self, wheelfile_base: str, *args: str) -> None:
        super().write_wheelfile(wheelfile_base, *args)
        if "editable_wheel" not in self.distribution.commands:
            put_mim_files(Path(wheelfile_base) / ".mim")


setup(cmdclass={"build_py": BuildWithMim, "bdist_wheel": WheelWithMim})
