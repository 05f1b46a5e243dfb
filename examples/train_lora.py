# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Train a LoRA of BAGEL: on pictures, on edits, on questions and answers, or on whole conversations.

    python examples/train_lora.py --pretrained_model_name_or_path ByteDance-Seed/BAGEL-7B-MoT \\
        --instance_data_dir pictures --instance_prompt "a photo of sks dog" --output_dir dog-lora \\
        --mixed_precision bf16 --gradient_checkpointing --max_train_steps 500

`accelerate launch` starts it on several devices. See docs/training.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from bagel_training.arguments import add_shared_arguments, check_shared_arguments
from bagel_training.data import TrainingSamples, load_samples
from bagel_training.loop import Training, end_training, make_accelerator, make_loader, make_optimizer
from bagel_training.models import load_pipeline
from bagel_training.output import discard_replaced
from bagel_training.publish import push, write_card
from bagel_training.settings import fingerprint
from bagel_training.throughput import StepFlops
from bagel_training.validation import Validation
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_bagel import BagelPipeline
from transformers_bagel import LORA_TARGETS


logger = get_logger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, learning_rate=1e-4)
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=16)
    group.add_argument("--lora_alpha", type=float, help="by default the rank")
    group.add_argument("--lora_dropout", type=float, default=0.0)
    group.add_argument("--lora_targets", choices=tuple(LORA_TARGETS), default="both", help="experts to adapt")
    group.add_argument("--lora_layers", help="names of modules instead, separated by commas")
    args = parser.parse_args(arguments)
    try:
        check_shared_arguments(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def targets(args: argparse.Namespace) -> str:
    """Pattern of the modules to adapt; never those of the vision tower, which have the same short names."""
    if not args.lora_layers:
        return LORA_TARGETS[args.lora_targets]
    names = "|".join(re.escape(name.strip()) for name in args.lora_layers.split(","))
    return rf".*language_model\.layers\.\d+\.(.*\.)?({names})"


def main(args: argparse.Namespace) -> None:
    samples = load_samples(args)
    accelerator = make_accelerator(args)
    train(args, accelerator, samples)
    end_training(accelerator)


def train(args: argparse.Namespace, accelerator: Accelerator, samples: TrainingSamples) -> None:
    # The weights below the adapters are not trained, so they may be as coarse as the computation.
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(args, accelerator, dtype)
    transformer = pipe.transformer
    base = fingerprint(accelerator, transformer)
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

    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in parameters)
    share = count / sum(parameter.numel() for parameter in transformer.parameters())
    logger.info(f"Training {count:,} parameters, {share:.2%} of the model, on {len(samples)} samples: {samples.task}")
    loader = make_loader(args, accelerator, samples, pipe)
    optimizer = make_optimizer(args, accelerator, transformer)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    validation = Validation(args, accelerator, pipe, on_every_rank=False)

    def save(folder: Path | str) -> None:
        BagelPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
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


if __name__ == "__main__":
    main(parse_args())
