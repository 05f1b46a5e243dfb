"""For `test_gpu_check.py`: a test that the small form leaves out."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_that_takes_long():
    pass
