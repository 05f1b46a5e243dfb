# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Sampled texts that follow a generator, though `generate` takes none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch


# `generate` samples from the global random state, which one call at a time may borrow.
_random_state = Lock()


def draw_seed(generator: torch.Generator | None) -> int | None:
    """A seed that follows the state of a generator, and moves it on."""
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample text under a seed without touching the global random state."""
    if seed is None:
        yield
        return
    with (
        _random_state,
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type),
    ):
        torch.manual_seed(seed)
        yield
