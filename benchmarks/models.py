# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Pipelines of random weights in three widths, with the tests' tokenizer and VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import Cache

from diffusers_bagel import BagelPipeline
from diffusers_bagel.loading import load_original_vae
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor


CHECKPOINT = Path(__file__).parents[1] / "tests" / "golden" / "a" / "checkpoint"
WIDTHS: dict[str, dict[str, Any]] = {
    "golden": {"text_config": {}, "vision_config": {}},
    "middle": {
        "text_config": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1408,
            "vocab_size": 4096,
        },
        "vision_config": {
            "hidden_size": 288,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "intermediate_size": 1152,
        },
    },
    # One layer as wide as those of the 7B model.
    "layer": {
        "text_config": {
            "hidden_size": 3584,
            "num_hidden_layers": 1,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
        },
        "vision_config": {
            "hidden_size": 1152,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
        },
    },
}
# Sides in pixels, as the 7B model has them; the tests' checkpoint draws smaller ones.
IMAGE_SIZES = {
    "size": {"shortest_edge": 224, "longest_edge": 980},
    "vae_size": {"shortest_edge": 256, "longest_edge": 1024},
}


def published_vae() -> AutoencoderKL:
    """A VAE of the sizes of BAGEL's, of random weights."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_config(width: str, image_size: int = 980, patches_per_side: int = 70) -> BagelConfig:
    """
    The tests' configuration in one of the `WIDTHS`, with the context length and image size of the 7B model.

    Args:
        width (`str`): One of `WIDTHS`.
        image_size (`int`, *optional*, defaults to 980): Pixels a side of the vision tower's position table.
        patches_per_side (`int`, *optional*, defaults to 70): Rows and columns of the table behind the connector.
    """
    settings = BagelConfig.from_pretrained(CHECKPOINT).to_dict()
    for name, changes in WIDTHS[width].items():
        settings[name] |= changes
        settings[name].pop("layer_types", None)
    settings["text_config"]["max_position_embeddings"] = 32768
    settings["vision_config"]["image_size"] = image_size
    return BagelConfig.from_dict(settings | {"max_latent_size": 64, "vit_max_num_patch_per_side": patches_per_side})


def make_pipeline(width: str, dtype: torch.dtype, device: torch.device) -> BagelPipeline:
    """
    A pipeline with random weights.

    Args:
        width (`str`): One of `WIDTHS`.
        dtype (`torch.dtype`): Of all weights.
        device (`torch.device`)
    """
    torch.manual_seed(0)
    pipe = BagelPipeline(
        transformer=BagelForConditionalGeneration(make_config(width)).to(device, dtype).eval(),
        vae=load_original_vae(CHECKPOINT, dtype).to(device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        processor=BagelProcessor.from_pretrained(CHECKPOINT, **IMAGE_SIZES),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_tokens(
    model: BagelForConditionalGeneration, ids: torch.Tensor, cache: Cache, count: int, **kwargs: Any
) -> None:
    """
    `generate()` after a text of which all but the last token is in the cache.

    Args:
        model (`BagelForConditionalGeneration`)
        ids (`torch.LongTensor` of shape `(batch, tokens)`): The whole text.
        cache (`Cache`): Of `tokens - 1` tokens, which grows.
        count (`int`): Tokens to write, neither more nor fewer.
        kwargs: Of `generate`.
    """
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        **kwargs,
    )
