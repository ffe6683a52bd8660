"""Puts what `mim` looks for into `mmsnnet/.mim`; the metadata is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MIM_FILES = ("configs", "tools", "model-index.yml")


class BuildWithMim(build_py):
    """Copies the mim files into a wheel; links them for an editable installation, so that edits are seen."""

    def run(self) -> None:
        super().run()
        mim = ROOT / "mmsnnet" / ".mim" if self.editable_mode else Path(self.build_lib) / "mmsnnet" / ".mim"
        mim.mkdir(parents=True, exist_ok=True)
        for name in MIM_FILES:
            source, target = ROOT / name, mim / name
            if target.is_symlink() or target.is_file():
                target.unlink()
            elif target.is_dir():
                shutil.rmtree(target)
            if self.editable_mode:
                target.symlink_to(source)
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithMim})
