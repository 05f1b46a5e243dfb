# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Which parts of a model a training leaves as they are."""

from __future__ import annotations

import re
from typing import Any


# Names of the weights of each part of a `BagelForConditionalGeneration`.
FREEZABLE_PARTS = {
    "vit": r"model\.vision_tower\.",
    "connector": r"model\.connector\.",
    "und": r"model\.language_model\.(?!.*_moe_gen)|lm_head\.",
    "gen": r"model\.language_model\..*_moe_gen|model\.(vae2llm|llm2vae|time_embedder)\.",
}


def freeze_parts(model: Any, *parts: str) -> None:
    """
    Keep parts of a model as they are in a training.

    Args:
        model (`BagelForConditionalGeneration`): The model.
        parts (`str`):
            Any of `"vit"` (the tower that sees), `"connector"`, `"und"` (the understanding expert, embeddings and text
            head) and `"gen"` (the generation expert and the layers around latents). For `"und"` gradients also stop at
            the expert's activations (original behaviour, point 35): `config.freeze_und` is set, and since none could
            reach the tower and the connector any more, they are frozen too.

    Raises:
        ValueError: if there is no such part.
    """
    if unknown := set(parts) - set(FREEZABLE_PARTS):
        raise ValueError(f"`parts` must be of {', '.join(FREEZABLE_PARTS)}, got {', '.join(sorted(unknown))}.")
    if "und" in parts:
        model.config.freeze_und = True
        parts = (*parts, "vit", "connector")
    for name, parameter in model.named_parameters():
        if any(re.match(FREEZABLE_PARTS[part], name) for part in parts):
            parameter.requires_grad_(False)
