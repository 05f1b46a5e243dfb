"""For `test_gpu_check.py`: a file of tests that has none."""
