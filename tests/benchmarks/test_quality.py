"""What `scripts/quality.sh` says of the code does not depend on what else lies in the clone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
pytest.importorskip("ruff")


def test_imports_are_sorted_alike_beside_any_folder(tmp_path):
    """`scripts/demo.sh` leaves one that is called as a benchmark is."""
    files = ["pyproject.toml", *(f"tests/benchmarks/test_{name}.py" for name in ("growth", "memory", "pictures"))]
    files += [str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").glob("*.py")]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    for folder in ("tests", *(Path(file).stem for file in files)):
        (tmp_path / folder).mkdir(exist_ok=True)
    for package in (ROOT / "src").iterdir():
        (tmp_path / "src" / package.name).mkdir(parents=True)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
