"""Ray, if it is there: `scripts/ray.sh` installs it beside the project's environment and runs these tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes" / "checkpoint"
NO_RAY = "Ray is not installed: bash scripts/ray.sh"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of processes that start a cluster of their own."""
    own = {
        "PYTHONPATH": f"{ROOT / 'src'}",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
