# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The arguments of all scripts, under the names that diffusers' training scripts gave them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from transformers_bagel.image_processing_bagel import to_rgb
from transformers_bagel.training.collator import CHOICES
from transformers_bagel.training.losses import LOSS_REDUCTIONS

from .data import SOURCES, is_table
from .output import check_output_dir


# What cannot be zero.
COUNTS = (
    "gradient_accumulation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "num_train_epochs",
    "max_train_steps",
    "train_batch_size",
    "max_train_samples",
    "repeats",
    "lr_num_cycles",
    "max_tokens",
    "resolution",
    "noised_copies",
    "validation_inference_steps",
    "num_validation_images",
    "validation_size",
    "rank",
    "num_inference_steps",
    "teacher_steps",
)
# Other numbers, by what they must be. Comparisons leave out NaN.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        ("learning_rate", "ema_decay", "text_dropout", "vit_dropout", "vae_dropout"),
        (lambda value: 0 <= value <= 1, "from 0 to 1"),
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "lora_dropout"), (lambda value: 0 <= value < 1, "at least 0 and below 1")
    ),
    **dict.fromkeys(
        ("adam_epsilon", "timestep_shift", "logit_std", "lora_alpha", "peak_tflops"),
        (lambda value: 0 < value < math.inf, "above 0 and finite"),
    ),
    **dict.fromkeys(
        (
            "adam_weight_decay",
            "ce_weight",
            "mse_weight",
            "lr_power",
            "lr_warmup_steps",
            "lr_decay_steps",
            "validation_steps",
            "max_nonfinite_steps",
            "dataloader_num_workers",
        ),
        (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    ),
    **dict.fromkeys(
        ("logit_mean", "guidance_scale", "teacher_guidance_scale", "teacher_image_guidance_scale"),
        (math.isfinite, "finite"),
    ),
    "max_grad_norm": (lambda value: value > 0, "above 0 (inf for no clipping)"),
}
# What would say something of the data that is not so, how an error puts it, and when that is. Settings of a schedule that others
# outdo are taken, as by the libraries' scripts.
WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], str, Callable[[argparse.Namespace], bool]], ...] = (
    (
        ("instance_prompt", "image_column", "cond_image_column", "messages_column"),
        "with --prompt_file",
        lambda args: bool(getattr(args, "prompt_file", None)),
    ),
    (
        ("caption_column",),
        "with a --prompt_file of lines",
        lambda args: bool(getattr(args, "prompt_file", None)) and not is_table(args.prompt_file),
    ),
    (
        ("instance_prompt", "caption_column", "cond_image_column"),
        "with --question_column",
        lambda args: bool(getattr(args, "question_column", None)),
    ),
    (("answer_column",), "without --question_column", lambda args: not args.question_column),
)
SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "warmup_stable_decay",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
SDPA_BACKENDS = ("math", "flash_attention", "efficient_attention", "cudnn_attention")


def add_shared_arguments(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """Of every script: everything but what is trained, and what of a sample it learns."""
    _add_model_arguments(parser.add_argument_group("model"))
    _add_data_arguments(parser.add_argument_group("data"))
    group = parser.add_argument_group("loss")
    group.add_argument("--mse_weight", type=float, default=1.0, help="weight of the loss of images")
    group.add_argument("--loss_reduction", choices=tuple(LOSS_REDUCTIONS), default="token")
    _add_training_arguments(parser.add_argument_group("training"), learning_rate)
    _add_output_arguments(parser.add_argument_group("output"))


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of a BAGEL pipeline")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--variant", help="variant of the weight files, e.g. fp16")
    group.add_argument("--cache_dir", help="where downloads are kept")
    group.add_argument(
        "--attn_implementation", help="sdpa, or flex_attention on a GPU; by default what fits the device"
    )
    group.add_argument(
        "--sdpa_backend", choices=SDPA_BACKENDS, help="of sdpa; on a CPU math is the faster one for short samples"
    )


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset_name", help="dataset on the Hub, or a folder that `datasets` can load")
    group.add_argument("--dataset_config_name", help="its configuration")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--train_data_file", nargs="+", help="parquet, jsonl or json files instead")
    group.add_argument(
        "--instance_data_dir", "--train_data_dir", help="folder of images instead; metadata.jsonl may describe them"
    )
    group.add_argument("--max_train_samples", type=int, help="take only so many samples")
    group.add_argument("--repeats", type=int, default=1, help="how often an epoch has each sample")
    group.add_argument("--instance_prompt", help="caption of every image that has none of its own")
    group.add_argument("--image_column", default="image", help="what is drawn")
    group.add_argument("--caption_column", default="text", help="prompt, or instruction of an edit")
    group.add_argument("--cond_image_column", help="image to start from: makes the task editing")
    group.add_argument("--messages_column", default="messages", help="conversations, which need no other column")
    group.add_argument("--resolution", type=int, help="longest side of the images in pixels")
    group.add_argument("--max_tokens", type=int, help="pack samples into sequences of so many tokens")
    group.add_argument(
        "--train_batch_size", type=int, default=None, help="samples a step and device (1 if not packed)"
    )
    group.add_argument("--cache_latents", action="store_true", help="keep encoded images in OUTPUT_DIR/latents")
    group.add_argument("--dataloader_num_workers", type=int, default=0)
    group.add_argument(
        "--on_error", choices=CHOICES["on_error"], default="raise", help="what a sample that cannot be used does"
    )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the scripts that learn samples as they are, texts and pictures."""
    group = parser.add_argument_group("samples")
    group.add_argument("--question_column", help="makes the task understanding, of the --image_column if there is one")
    group.add_argument("--answer_column", default="answer")
    group.add_argument("--text_dropout", type=float, default=0.1, help="rate at which prompts are dropped")
    group.add_argument(
        "--vit_dropout", type=float, default=0.3, help="rate at which conditions' ViT tokens are dropped"
    )
    group.add_argument("--vae_dropout", type=float, default=0.3, help="rate at which conditions' latents are dropped")
    group.add_argument(
        "--next_action",
        choices=CHOICES["next_action"],
        default="text",
        help="learn what follows: each text of an answer that has pictures, all parts of answers, none",
    )
    group.add_argument("--weighting_scheme", choices=("logit_normal", "none"), default="logit_normal")
    group.add_argument("--logit_mean", type=float, default=0.0)
    group.add_argument("--logit_std", type=float, default=1.0)
    group.add_argument("--timestep_shift", type=float, help="by default that of the model's configuration")
    group.add_argument("--noised_copies", type=int, default=1, help="of each drawn image, sharing its context")
    group.add_argument("--ce_weight", type=float, default=1.0, help="weight of the loss of texts")


def _add_training_arguments(group: argparse._ArgumentGroup, learning_rate: float) -> None:
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--num_train_epochs", type=int, default=1)
    group.add_argument("--max_train_steps", type=int, help="instead of the epochs; needed with --max_tokens")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--learning_rate", type=float, default=learning_rate)
    group.add_argument("--scale_lr", action="store_true", help="times devices, accumulation and batch size")
    group.add_argument("--lr_scheduler", choices=SCHEDULERS, default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument(
        "--lr_decay_steps",
        type=int,
        default=0,
        help="last steps of warmup_stable_decay, which fall to 0; none by default",
    )
    group.add_argument("--lr_num_cycles", type=int, default=1)
    group.add_argument("--lr_power", type=float, default=1.0)
    group.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: for the layers' matrices, AdamW for the rest",
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="bitsandbytes' optimizer")
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=1e-4)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument(
        "--max_nonfinite_steps",
        type=int,
        default=10,
        help="how many steps in a row may be left out since their loss or gradient is not finite",
    )
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default accelerate's setting")
    group.add_argument("--allow_tf32", action="store_true")
    group.add_argument("--cpu", action="store_true", help="train on the CPU although there is a GPU")


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", required=True)
    group.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the training that OUTPUT_DIR holds"
    )
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int, help="how many of the latest checkpoints to keep")
    group.add_argument("--resume_from_checkpoint", help="a checkpoint's folder, or `latest`")
    group.add_argument("--validation_prompt", help="draw this, or, with --validation_image, edit that image")
    group.add_argument("--validation_question", help="answer this, about --validation_image if given")
    group.add_argument("--validation_image", help="image of the prompt or the question")
    group.add_argument("--num_validation_images", type=int, default=4)
    group.add_argument("--validation_inference_steps", type=int, default=49)
    group.add_argument("--validation_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    group.add_argument("--validation_steps", type=int, default=500, help="0 for none but the last")
    group.add_argument("--guidance_scale", type=float, default=4.0, help="of the validation pictures")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")
    group.add_argument("--logging_dir", default="logs", help="inside OUTPUT_DIR")
    group.add_argument("--logging_steps", type=int, default=1)
    group.add_argument("--peak_tflops", type=float, help="of one device; by default measured on a matrix product")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_token")
    group.add_argument("--hub_model_id", help="by default the name of OUTPUT_DIR")


def check_shared_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """
    Refuse arguments of any script that cannot work, or that say something of the data that is not so.

    Raises:
        ValueError, OSError: for such arguments, before anything is loaded.
    """
    known = [name for name in SOURCES if name in args]
    sources = [name for name in known if getattr(args, name)]
    if len(sources) != 1:
        choices = ", ".join(f"--{name}" for name in known[:-1])
        raise ValueError(
            f"Pass one of {choices} and --{known[-1]}, got {' and '.join('--' + name for name in sources) or 'none'}."
        )
    if args.max_tokens is not None and args.max_train_steps is None:
        raise ValueError("--max_tokens packs a varying number of samples a step: pass --max_train_steps too.")
    for name in COUNTS:
        given = getattr(args, name, None)
        for count in given if isinstance(given, list) else [given]:
            if count is not None and count < 1:
                raise ValueError(f"--{name} must be at least 1, got {count}.")
    for name, (is_right, wanted) in NUMBERS.items():
        number = getattr(args, name, None)
        if number is not None and not is_right(number):
            raise ValueError(f"--{name} must be {wanted}, got {number}.")
    if args.optimizer == "muon" and (args.use_8bit_adam or getattr(args, "fsdp", False)):
        raise ValueError("--optimizer muon needs whole matrices in float32: leave out --use_8bit_adam and --fsdp.")
    if args.validation_image is not None:
        to_rgb(args.validation_image)
    for names, company, is_so in WITHOUT_EFFECT:
        for name in names:
            if name in args and getattr(args, name) != parser.get_default(name) and is_so(args):
                raise ValueError(f"--{name} has no effect {company}.")
    check_output_dir(args)
