# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What published fine-tunes were trained with and say in no file of theirs, only in their code."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class FineTune:
    """
    A published fine-tune.

    Attributes:
        pattern (`str`): Of the last part of its repository's name.
        size (`tuple[int, int]`, *optional*):
            Longest and shortest side of what the ViT sees, if it is not the original 980 and 224.
        vae_size (`tuple[int, int]`, *optional*): The same of what the VAE encodes, if it is not 1024 and 512.
        protocol (`str`, *optional*): How it answers in texts and pictures in turn, by its name in `diffusers_bagel`.
    """

    pattern: str
    size: tuple[int, int] | None = None
    vae_size: tuple[int, int] | None = None
    protocol: str | None = None


_KNOWN = (
    FineTune(r"zebra-?cot", (980, 512), protocol="zebra"),
    FineTune(r"(?<![a-z])sot(?![a-z])|shape-?of-?thought", (980, 512), protocol="sot"),
    FineTune(r"(bagel|math)-?canvas", (980, 512), protocol="canvas"),
    FineTune(r"think-?morph", protocol="thinkmorph"),
    FineTune(r"twiff", (518, 224), (512, 256), protocol="twiff"),
    FineTune(r"cooper", (518, 224), protocol="cooper"),
    FineTune(r"uni-?cot|scone", (980, 378)),
    FineTune(r"sensenova-vision.*recon-?3d", (448, 224), (512, 256)),
    FineTune(r"sensenova-vision.*camera", (560, 378)),
    FineTune(r"omni-?view", (640, 384)),
)


def fine_tune_of(path: str | os.PathLike) -> FineTune | None:
    """The fine-tune that a Hub id or a folder, also one of the Hub's cache, or a part of a pipeline, is named after."""
    parts = os.path.normpath(os.path.abspath(path) if os.path.isdir(path) else path).split(os.sep)
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    name = (cached or [part for part in parts if part not in ("transformer", "processor")])[-1]
    name = name.lower().replace("_", "-")
    return next((known for known in _KNOWN if re.search(known.pattern, name)), None)


def image_settings(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """
    The settings of images ([`BagelImageProcessor`]) with which a fine-tune was trained, if its name is known; what is applied
    is said.

    Args:
        path (`str` or `os.PathLike`): Hub id or folder.
    """
    known = fine_tune_of(path)
    sides = {} if known is None else {"size": known.size, "vae_size": known.vae_size}
    settings = {name: _bounds(*value) for name, value in sides.items() if value is not None}
    if settings:
        logger.warning(
            f"'{path}' is a fine-tune that was trained with images of other sizes: {settings} is applied. A "
            "`preprocessor_config.json` beside its tokenizer, or these arguments, say otherwise."
        )
    return settings


def _bounds(longest: int, shortest: int) -> dict[str, Any]:
    return {"longest_edge": longest, "shortest_edge": shortest}
