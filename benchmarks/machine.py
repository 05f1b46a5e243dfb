# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What figures are of."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timing import default_device


def machine(threads: int | None) -> dict[str, Any]:
    device = default_device()
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "diffusers": version("diffusers"),
    }


def processor_name() -> str:
    """What Linux calls it; elsewhere what Python does."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
