"""What only a GPU shows. Elsewhere these tests are skipped, and stand-ins take their place (`tests/emulated_devices.py`)."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
