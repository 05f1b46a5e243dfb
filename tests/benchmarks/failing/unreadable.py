"""For `test_gpu_check.py`: a file of tests that is none."""

from __future__ import annotations


raise RuntimeError("this file cannot be read")
