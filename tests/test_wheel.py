"""A wheel of this tree runs the command line outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "golden" / "a" / "checkpoint"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's packages in a folder of their own; what they depend on stays where it is."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "-q", "-q"]
    subprocess.run([*pip, "wheel", str(tree), "--no-deps", "--wheel-dir", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_the_command_line_draws(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import diffusers_bagel; print(diffusers_bagel.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    arguments = ["draw", "a red circle", "--steps", "2", "--model", str(CHECKPOINT), "-o", "out.png"]
    run(installed, tmp_path, "-m", "diffusers_bagel", *arguments)
    assert (tmp_path / "out.png").stat().st_size > 0
