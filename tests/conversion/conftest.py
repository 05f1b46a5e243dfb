"""The scripts of conversion/, which are no package, and the golden checkpoint as they write it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKPOINT


CONVERSION = Path(__file__).parents[2] / "conversion"

sys.path.insert(0, str(CONVERSION))


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """The golden checkpoint in several shards. Tests that change it copy it."""
    from convert_bagel_to_hf import convert

    folder = tmp_path_factory.mktemp("converted") / "repository"
    convert(str(CHECKPOINT), folder, max_shard_size="500KB", verify=True)
    return folder
