# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What published fine-tunes were trained with and say in no file of theirs, only in their code."""

from __future__ import annotations

import os
import re
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

# Longest and shortest side of what the ViT sees and, if it is not the original 1024 and 512, of what the VAE encodes, by a
# pattern of the last part of a repository's name.
_SIDES: tuple[tuple[str, tuple[int, int], tuple[int, int] | None], ...] = (
    (r"zebra-?cot|(?<![a-z])sot(?![a-z])|bagel-?canvas", (980, 512), None),
    (r"twiff", (518, 224), (512, 256)),
    (r"cooper", (518, 224), None),
    (r"uni-?cot|scone", (980, 378), None),
    (r"sensenova-vision.*recon-?3d", (448, 224), (512, 256)),
    (r"sensenova-vision.*camera", (560, 378), None),
    (r"omni-?view", (640, 384), None),
)


def image_settings(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """
    The settings of images ([`BagelImageProcessor`]) with which a fine-tune was trained, if its name is known; what is applied
    is said.

    Args:
        path (`str` or `os.PathLike`): Hub id or folder.
    """
    name = os.path.basename(os.path.normpath(path)).lower().replace("_", "-")
    for pattern, vit, vae in _SIDES:
        if re.search(pattern, name):
            settings = {"size": _bounds(vit)} | ({"vae_size": _bounds(vae)} if vae else {})
            logger.warning(
                f"'{path}' is a fine-tune that was trained with images of other sizes: {settings} is applied. A "
                "`preprocessor_config.json` beside its tokenizer, or these arguments, say otherwise."
            )
            return settings
    return {}


def _bounds(sides: tuple[int, int]) -> dict[str, Any]:
    longest, shortest = sides
    return {"longest_edge": longest, "shortest_edge": shortest}
