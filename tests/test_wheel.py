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


# `python -m diffusers_bagel`, and where it was found.
COMMAND = """
import runpy, sys
sys.argv[0] = "diffusers_bagel"
try:
    runpy.run_module("diffusers_bagel", run_name="__main__", alter_sys=True)
finally:
    # The command ends by `sys.exit`.
    print("found in", sys.modules["diffusers_bagel"].__file__)
"""


@pytest.mark.slow
def test_the_command_line_draws(installed, tmp_path):
    arguments = ["draw", "a red circle", "--steps", "2", "--model", str(CHECKPOINT), "-o", "out.png"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.split("found in ")[1].strip()).is_relative_to(installed)
    assert (tmp_path / "out.png").stat().st_size > 0
