# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The settings of a training, which a checkpoint keeps and a resumed training compares with its own."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch import nn


logger = get_logger(__name__)

FILE = "settings.json"

# What must be as it was, and why; anything else may change and is said.
FIXED = {
    "script": "its weights are of another kind",
    "freeze": "weights would be dropped, or taken from the base model",
    "rank": "its weights have another size",
    "lora_alpha": "its weights would count for more or less than they were trained to",
    "lora_targets": "weights would be dropped, or start anew",
    "lora_layers": "weights would be dropped, or start anew",
    "num_inference_steps": "its adapter learns another number of steps",
    "optimizer": "its moments are those of another optimizer",
    "use_8bit_adam": "its moments are those of another optimizer",
    "ema": "it holds no average of the weights, or one that would be dropped",
    "fsdp": "its average and random numbers are cut in another way",
    "mixed_precision": "frozen weights and float16's scale would be others",
    "seed": "its place in the data would be another",
    "train_batch_size": "its place in the data would be another",
    "max_tokens": "its place in the data would be another",
}
# No settings of the training, or secret.
LEFT_OUT = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token")


def settings_of(args: argparse.Namespace, mixed_precision: str) -> dict[str, Any]:
    """What a checkpoint keeps: the arguments, with their defaults filled in.

    Args:
        args (`argparse.Namespace`): See `arguments.py`.
        mixed_precision (`str`): The accelerator's.
    """
    settings = {name: value for name, value in vars(args).items() if name not in LEFT_OUT}
    settings["script"] = (
        "train_few_steps" if "teacher_steps" in settings else "train_lora" if "rank" in settings else "train_full"
    )
    settings["mixed_precision"] = mixed_precision
    settings["train_batch_size"] = args.train_batch_size or (1 if args.max_tokens is None else None)
    if "rank" in settings:
        settings["lora_alpha"] = args.lora_alpha or args.rank
    else:
        settings["freeze"] = sorted(args.freeze)
    return json.loads(json.dumps(settings))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """Those that a checkpoint keeps; none if it is older than they are.

    Raises:
        ValueError: if the file is broken.
    """
    file = checkpoint / FILE
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise ValueError(f"'{file}' is broken: {error}. Go on from another checkpoint.") from error
    return settings


def compare_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """
    Say what differs from the settings of a checkpoint.

    Raises:
        ValueError: if its weights would be dropped or taken for something else.
    """
    saved = read_settings(checkpoint)
    if not saved:
        logger.warning(
            f"'{checkpoint}' keeps no settings, as those of earlier versions: whether --lora_alpha and the base model "
            "are the same is not checked."
        )
    differing = [name for name in settings if name in saved and saved[name] != settings[name]]
    for name in (name for name in FIXED if name in differing):
        raise ValueError(
            f"'{checkpoint}' was written with --{name} {_shown(saved[name])}, but this training has "
            f"{_shown(settings[name])}: {FIXED[name]}. Pass the same --{name} to go on, or begin a training in "
            "another --output_dir."
        )
    for name in differing:
        logger.info(f"changed: {name} {_shown(saved[name])} -> {_shown(settings[name])}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


@torch.no_grad()
def fingerprint(accelerator: Accelerator, model: nn.Module) -> str:
    """What tells two models apart whose weights differ: a few values of each weight, of the first process's model."""
    digest = hashlib.sha256()
    if accelerator.is_main_process:
        for name, tensor in sorted(model.state_dict().items()):
            values = tensor.flatten()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values[:: max(1, len(values) // 16)].float().cpu().numpy().tobytes())
    return broadcast_object_list([digest.hexdigest()])[0]


def check_base(checkpoint: Path, base: str) -> None:
    """Refuse to go on from a checkpoint that began with other weights, by their fingerprints.

    Raises:
        ValueError: if they differ.
    """
    saved = read_settings(checkpoint)
    if saved.get("base", base) != base:
        raise ValueError(
            f"--pretrained_model_name_or_path holds other weights than '{saved['pretrained_model_name_or_path']}' did "
            f"when the training of '{checkpoint}' began. Pass that model."
        )
