# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Distil a LoRA with which BAGEL draws and edits in a few steps without guidance.

    python examples/train_few_steps.py --pretrained_model_name_or_path ByteDance-Seed/BAGEL-7B-MoT \\
        --prompt_file prompts.txt --output_dir bagel-8-steps --num_inference_steps 8 --mixed_precision bf16 \\
        --gradient_checkpointing --train_batch_size 8 --max_train_steps 2000

Of a dataset only the prompts, the images to edit and the sizes count: the model itself draws what is learned. `accelerate launch`
starts it on several devices. See docs/few_steps.md.
"""

from __future__ import annotations

import argparse
from typing import Any

from bagel_training.arguments import add_shared_arguments, check_shared_arguments
from bagel_training.data import PromptSamples, load_samples
from bagel_training.distillation import Distillation, DistillingCollator
from bagel_training.loop import collator_settings, end_training, make_accelerator
from bagel_training.lora import add_lora_arguments, train_lora

from diffusers_bagel import BagelPipeline
from diffusers_bagel.few_steps import FewSteps


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, learning_rate=1e-4)
    add_lora_arguments(parser)
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--prompt_file",
        help="prompts alone, to be drawn at --resolution: the lines of a text, or the --caption_column of a table",
    )
    group.add_argument("--num_inference_steps", type=int, default=6, help="that the adapter is made for")
    group.add_argument("--teacher_steps", type=int, default=6, help="of the model without it, for each of these")
    group.add_argument("--teacher_guidance_scale", type=float, default=4.0)
    group.add_argument(
        "--teacher_image_guidance_scale", type=float, default=2.0, help="where there is an image to edit"
    )
    # Validation pictures are the adapter's own.
    parser.set_defaults(guidance_scale=1.0, validation_inference_steps=None, lora_targets="gen")
    args = parser.parse_args(arguments)
    if args.validation_inference_steps is None:
        args.validation_inference_steps = args.num_inference_steps
    try:
        check_shared_arguments(parser, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def make_collator(args: argparse.Namespace, pipe: BagelPipeline) -> DistillingCollator:
    distillation = Distillation(
        args.num_inference_steps, args.teacher_steps, args.teacher_guidance_scale, args.teacher_image_guidance_scale
    )
    return DistillingCollator(pipe, distillation, **collator_settings(args, pipe))


def main(args: argparse.Namespace) -> None:
    samples: Any = PromptSamples(args) if args.prompt_file else load_samples(args)
    accelerator = make_accelerator(args)
    train_lora(
        args,
        accelerator,
        samples,
        make_collator,
        lambda pipe: {"few_steps": FewSteps.of(pipe, args.num_inference_steps)},
    )
    end_training(accelerator)


if __name__ == "__main__":
    main(parse_args())
