# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The model to train, and the pipeline around it."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

from diffusers_bagel import BagelPipeline
from transformers_bagel.modeling_bagel import NO_FLEX_BACKWARD


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator, dtype: torch.dtype) -> BagelPipeline:
    """The pipeline, its model set for the losses that the arguments ask for, its VAE on the device in float32."""
    # The VAE stays in float32, since float16 overflows in it.
    pipe = BagelPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype={"transformer": dtype, "default": torch.float32},
    )
    pipe.vae.to(accelerator.device)
    has_flex = accelerator.device.type not in NO_FLEX_BACKWARD
    implementation = args.attn_implementation or ("flex_attention" if has_flex else "sdpa")
    pipe.transformer.set_attn_implementation({"text_config": implementation, "vision_config": "sdpa"})
    config = pipe.transformer.config
    config.ce_weight, config.mse_weight, config.loss_reduction = args.ce_weight, args.mse_weight, args.loss_reduction
    if args.gradient_checkpointing:
        pipe.transformer.activation_checkpointing_enable()
    return pipe
