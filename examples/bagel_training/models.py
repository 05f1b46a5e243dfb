# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The model to train, and the pipeline around it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from transformers.utils import cached_file

from diffusers_bagel import BagelPipeline
from transformers_bagel import BagelConfig, BagelForConditionalGeneration
from transformers_bagel.modeling_bagel import NO_FLEX_BACKWARD


def empty_model(path: str, **hub_kwargs: Any) -> BagelForConditionalGeneration:
    """The model of a pipeline with its weights on the meta device, in diffusers' layout or in the published one."""
    missing = {"_raise_exceptions_for_missing_entries": False}
    in_subfolder = cached_file(path, "transformer/config.json", **missing, **hub_kwargs) is not None
    config = BagelConfig.from_pretrained(path, subfolder="transformer" if in_subfolder else "", **hub_kwargs)
    with init_empty_weights():
        return BagelForConditionalGeneration(config)


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator, dtype: torch.dtype) -> BagelPipeline:
    """The pipeline, its model set for the losses that the arguments ask for, its VAE on the device in float32.

    If the model is to be sharded, the first process reads its weights for all: they would not fit into the machine's
    memory once for each process.
    """
    hub_kwargs = {"revision": args.revision, "cache_dir": args.cache_dir}
    components = {}
    if getattr(args, "fsdp", False) and not accelerator.is_main_process:
        components["transformer"] = empty_model(args.pretrained_model_name_or_path, **hub_kwargs)
    # The VAE stays in float32, since float16 overflows in it.
    pipe = BagelPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        variant=args.variant,
        **hub_kwargs,
        **components,
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
