# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The model to train, and the pipeline around it."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.attention import NO_FLEX_BACKWARD
from transformers_bagel.files import find_file


logger = get_logger(__name__)


def empty_model(path: str, **hub: Any) -> BagelForConditionalGeneration:
    """The model of a pipeline with its weights on the meta device, in diffusers' layout or in the original one."""
    in_subfolder = find_file(path, "transformer/config.json", **hub) is not None
    config = BagelConfig.from_pretrained(path, subfolder="transformer" if in_subfolder else "", **hub)
    with init_empty_weights():
        return BagelForConditionalGeneration(config)


def training_processor(pipe: BagelPipeline, resolution: int | None) -> BagelProcessor:
    """A processor whose images fit the model's position tables, and `--resolution`. The pipeline keeps its own, which is
    saved: the trained model takes images as large as before.
    """
    processor, config = copy.deepcopy(pipe.processor), pipe.transformer.config
    images = processor.image_processor
    if not config.interpolate_pos:
        images.vae_size = bounded(images.vae_size, config.max_latent_size * config.latent_stride)
        images.size = bounded(images.size, config.vit_max_num_patch_per_side * images.patch_size)
    if resolution is not None:
        images.vae_size = bounded(images.vae_size, resolution)
    return processor


def bounded(size: Any, longest: int) -> dict[str, int]:
    """Bounds of the edges of an image, none above `longest` pixels."""
    return {name: min(size[name], longest) for name in ("shortest_edge", "longest_edge")}


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator, dtype: torch.dtype) -> BagelPipeline:
    """The pipeline, its model set for the losses that the arguments ask for, its VAE on the device in float32.

    If the model is to be sharded, the first process reads its weights for all: they would not fit into the machine's
    memory once for each process.
    """
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    components: dict[str, Any] = {} if args.variant is None else {"variant": args.variant}
    if getattr(args, "fsdp", False) and not accelerator.is_main_process:
        components["transformer"] = empty_model(args.pretrained_model_name_or_path, **hub)
    # The VAE stays in float32, since float16 overflows in it.
    pipe = BagelPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        **hub,
        **components,
        dtype={"transformer": dtype, "default": torch.float32},
    )
    pipe.vae.to(accelerator.device)
    has_flex = accelerator.device.type not in NO_FLEX_BACKWARD
    implementation = args.attn_implementation or ("flex_attention" if has_flex else "sdpa")
    pipe.transformer.set_attn_implementation({"text_config": implementation, "vision_config": "sdpa"})
    config = pipe.transformer.config
    if config.few_steps is not None:
        logger.warning(
            f"The model draws in {config.few_steps['num_inference_steps']} steps, of an adapter that is in its weights. "
            "Trainings know nothing of them: validation draws in usual ones, and what is saved does not say them any more."
        )
        config.few_steps = None
    for name in ("ce_weight", "mse_weight", "loss_reduction"):
        # Where no text is learned, nothing asks for its weight.
        if name in args:
            setattr(config, name, getattr(args, name))
    if args.gradient_checkpointing:
        pipe.transformer.activation_checkpointing_enable()
    return pipe
