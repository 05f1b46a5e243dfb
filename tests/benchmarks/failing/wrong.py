"""For `test_gpu_check.py`: a failure, an end of the process, and a test that has its turn all the same."""

from __future__ import annotations

import os


def test_a_sum():
    assert 1 + 1 == 3


def test_an_end():
    os._exit(5)


def test_the_rest():
    pass
