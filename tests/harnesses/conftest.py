"""The harnesses, or what stands in for them; the checkpoint of the shapes, and their tasks for harnesses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from tests.harnesses.standins import missing_modules
from tests.shapes.conftest import CHECKPOINT, SHAPES, shapes_pipe  # noqa: F401  a fixture


sys.path.append(str(SHAPES / "harness_tasks"))

MODEL = {"pretrained": str(CHECKPOINT), "dtype": "float32"}


@pytest.fixture(scope="session")
def harnesses() -> Iterator[Any]:
    """A function that imports our modules of a harness."""
    with mock.patch.dict(sys.modules, missing_modules()):
        yield lambda name: importlib.import_module(f"bagel_harnesses.{name}")
