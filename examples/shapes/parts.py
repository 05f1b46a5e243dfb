# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The sizes of the model and its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import GenerationConfig, PreTrainedTokenizerBase

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelImageProcessor, BagelProcessor
from transformers_bagel.configuration_bagel import BagelTextConfig, BagelVisionConfig
from transformers_bagel.modeling_bagel import BagelVisionModel
from transformers_bagel.segments import SPECIAL_TOKENS


# What is shipped.
CHECKPOINT = Path(__file__).parent / "checkpoint"
# Small pictures have little to hide: a smaller shift than 3 or 4 is enough.
TIMESTEP_SHIFT = 2.0


# The tower sees 64 pixels as 66, so that 2 x 2 patches of 11 make a cell of the world.
IMAGE_SIDE = 66
VISION = BagelVisionConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=IMAGE_SIDE,
    patch_size=11,
)

# Of trainings on a CPU, as accelerate names it: without AVX-512 a product in bfloat16 takes some ninety times as long.
MIXED_PRECISION = "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "no"


def image_processor() -> BagelImageProcessor:
    """Pictures of 64 x 64: 36 patches for the tower, 16 latent tokens."""
    return BagelImageProcessor(
        size={"shortest_edge": IMAGE_SIDE, "longest_edge": IMAGE_SIDE},
        patch_size=VISION.patch_size,
        vae_size={"shortest_edge": 64, "longest_edge": 64},
        vae_stride=16,
    )


def new_model(tokenizer: PreTrainedTokenizerBase, vision_tower: BagelVisionModel) -> BagelForConditionalGeneration:
    """An untrained language model around a trained tower."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    own = {name: ids.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = BagelConfig(
        text_config=BagelTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.04,
            **own,
        ),
        vision_config=VISION,
        latent_channels=8,
        max_latent_size=4,
        vit_max_num_patch_per_side=IMAGE_SIDE // VISION.patch_size,
        timestep_shift=TIMESTEP_SHIFT,
        **ids,
    )
    torch.manual_seed(0)
    model = BagelForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    return model


@torch.no_grad()
def copy_expert(model: BagelForConditionalGeneration) -> None:
    """Let the generation expert start as a copy of the understanding one, as BAGEL's did."""
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if "_moe_gen" in name:
            weight.copy_(weights[name.replace("_moe_gen", "")])


def new_pipeline(
    model: BagelForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, vae: AutoencoderKL
) -> BagelPipeline:
    """The whole."""
    model.generation_config = GenerationConfig(
        **{name: getattr(model.config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    return BagelPipeline(
        transformer=model,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIMESTEP_SHIFT),
        processor=BagelProcessor(image_processor(), tokenizer),
    )
