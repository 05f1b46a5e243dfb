# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Train a LoRA of BAGEL: on pictures, on edits, on questions and answers, or on whole conversations.

    python examples/train_lora.py --pretrained_model_name_or_path ByteDance-Seed/BAGEL-7B-MoT \\
        --instance_data_dir pictures --instance_prompt "a photo of sks dog" --output_dir dog-lora \\
        --mixed_precision bf16 --gradient_checkpointing --max_train_steps 500

`accelerate launch` starts it on several devices. See docs/training.md.
"""

from __future__ import annotations

import argparse

from bagel_training.arguments import add_sample_arguments, add_shared_arguments, check_shared_arguments
from bagel_training.data import load_samples
from bagel_training.loop import end_training, make_accelerator, make_collator
from bagel_training.lora import add_lora_arguments, train_lora


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, learning_rate=1e-4)
    add_sample_arguments(parser)
    add_lora_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        check_shared_arguments(parser, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def main(args: argparse.Namespace) -> None:
    samples = load_samples(args)
    accelerator = make_accelerator(args)
    train_lora(args, accelerator, samples, make_collator)
    end_training(accelerator)


if __name__ == "__main__":
    main(parse_args())
