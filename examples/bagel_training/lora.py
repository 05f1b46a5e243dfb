# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Training of a LoRA: its arguments, its layers, its file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_bagel import BagelPipeline
from transformers_bagel import LORA_TARGETS, BagelDataCollator

from .loop import Training, make_loader, make_optimizer
from .models import load_pipeline
from .output import discard_replaced
from .publish import push, write_card
from .settings import fingerprint
from .throughput import StepFlops
from .validation import Validation


logger = get_logger(__name__)


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=16)
    group.add_argument("--lora_alpha", type=float, help="by default the rank")
    group.add_argument("--lora_dropout", type=float, default=0.0)
    group.add_argument("--lora_targets", choices=tuple(LORA_TARGETS), default="both", help="experts to adapt")
    group.add_argument("--lora_layers", help="names of modules instead, separated by commas")


def targets(args: argparse.Namespace) -> str:
    """Pattern of the modules to adapt; never those of the vision tower, which have the same short names."""
    if not args.lora_layers:
        return LORA_TARGETS[args.lora_targets]
    names = "|".join(re.escape(name.strip()) for name in args.lora_layers.split(","))
    return rf".*language_model\.layers\.\d+\.(.*\.)?({names})"


def add_lora(args: argparse.Namespace, transformer: Any) -> None:
    """Add the layers that the arguments name; nothing else of the model is trained."""
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha or args.rank,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=targets(args),
        )
    )
    # Coarser masters lose small updates.
    cast_training_params(transformer, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    share = count / sum(parameter.numel() for parameter in transformer.parameters())
    logger.info(f"Training {count:,} parameters, {share:.2%} of the model")


def train_lora(
    args: argparse.Namespace,
    accelerator: Accelerator,
    samples: Any,
    make_collator: Callable[[argparse.Namespace, BagelPipeline], BagelDataCollator],
    file_settings: Callable[[BagelPipeline], dict[str, Any]] = lambda pipe: {},
) -> None:
    """
    Train a LoRA from its first step, or the one that is resumed, to its card.

    Args:
        args (`argparse.Namespace`): See `arguments.py` and `add_lora_arguments`.
        accelerator (`Accelerator`)
        samples ([`TrainingSamples`]): Or others with a length, items and a `task`.
        make_collator (`Callable`): What makes batches of the samples.
        file_settings (`Callable`): What `save_lora_weights` gets for the file besides the weights.
    """
    # The weights below the adapters are not trained, so they may be as coarse as the computation.
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(args, accelerator, dtype)
    transformer = pipe.transformer
    base = fingerprint(accelerator, transformer)
    own_settings = file_settings(pipe)
    add_lora(args, transformer)
    logger.info(f"{len(samples)} samples: {samples.task}")
    loader = make_loader(args, accelerator, samples, make_collator(args, pipe))
    optimizer = make_optimizer(args, accelerator, transformer)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    validation = Validation(args, accelerator, pipe, on_every_rank=False)

    def save(folder: Path | str) -> None:
        BagelPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
            **own_settings,
        )

    flops = StepFlops(transformer)
    training = Training(args, accelerator, model, optimizer, loader, flops, validation, base, export=save)
    metrics = training.run()
    if accelerator.is_main_process:
        save(args.output_dir)
        discard_replaced(Path(args.output_dir))
    training.validate(int(metrics["step"]))
    if accelerator.is_main_process:
        write_card(
            args,
            f"LoRA of rank {args.rank} for BAGEL, trained for {metrics['step']} steps on {len(samples)} samples "
            f"({samples.task}). {training.summary}".rstrip(),
            f'pipe = BagelPipeline.from_pretrained("{args.pretrained_model_name_or_path}")\n'
            f'pipe.load_lora_weights("{args.hub_model_id or args.output_dir}")',
            # Only the pipeline reads this format.
            "model, processor = pipe.transformer, pipe.processor",
            ["lora", "bagel", "diffusers-training"],
            metrics,
        )
        if args.push_to_hub:
            logger.info(f"Pushed to {push(args)}")
