# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Time and memory, on a CPU, CUDA or MPS."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait for what was launched: a call returns before the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(runs: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """
    Seconds of each of several functions, `repeats` times, after one call to warm up.

    They take turns, so that a machine that grows slower does so for all of them.
    """
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for found, run in zip(seconds, runs, strict=True):
            found.append(seconds_once(run, device))
    return seconds


def seconds_once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the first one or not."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def least_processor_seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least seconds of the processor that each of several functions took, after one call to warm up. They take turns."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for found, run in zip(seconds, runs, strict=True):
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    return [min(found[1:]) for found in seconds]


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median, and highest less lowest."""
    return statistics.median(seconds), max(seconds) - min(seconds)


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far: of the device if it has its own, else of this process. MPS knows what is allocated now alone."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Let go of what nobody holds on a device with memory of its own, and count its highest memory from here."""
    if device.type != "cpu":
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
