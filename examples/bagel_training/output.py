# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Whose an output folder is: a training never touches what another one left there."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from .checkpoints import checkpoints
from .settings import read_settings


# What a training leaves, beside its checkpoints.
RESULTS = (
    "README.md",
    "model_index.json",
    "processor",
    "pytorch_lora_weights.safetensors",
    "scheduler",
    "transformer",
    "vae",
)
REPLACED = ".replaced-"


def check_output_dir(args: argparse.Namespace) -> None:
    """
    Refuse an output folder that cannot be written or that holds another training.

    Raises:
        ValueError, OSError: before anything is loaded or written.
    """
    folder = Path(args.output_dir)
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(f"--output_dir must be a folder, but '{existing}' is a file or a broken link.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"--output_dir '{folder}' cannot be written: {error}.") from error
    if folder.is_dir() and Path(args.pretrained_model_name_or_path).resolve() == folder.resolve():
        raise ValueError(
            "--output_dir is the folder of --pretrained_model_name_or_path, which must stay. Pass another."
        )
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise ValueError("Pass --overwrite_output_dir or --resume_from_checkpoint, not both.")
    left = checkpoints(folder) + _results(folder)
    if not left or args.overwrite_output_dir:
        return
    if not args.resume_from_checkpoint:
        raise ValueError(
            f"--output_dir '{folder}' holds a training already ({left[0].name}). Pass --resume_from_checkpoint latest "
            "to go on with it, --overwrite_output_dir to replace it, or another folder."
        )
    if args.resume_from_checkpoint == "latest" and not checkpoints(folder):
        raise ValueError(
            f"--resume_from_checkpoint latest: --output_dir '{folder}' holds a training ({left[0].name}), but no "
            "checkpoint of it. Pass --overwrite_output_dir to replace it, or another folder."
        )


def check_same_training(output_dir: Path, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint into the folder of another training.

    Raises:
        ValueError: if the folder holds something, and the checkpoint is neither there nor of the same training.
    """
    present = checkpoints(output_dir)
    inside = checkpoint.resolve().parent == output_dir.resolve()
    same = present and {training_of(path) for path in present} == {training_of(checkpoint)}
    if not inside and not same and (present or _results(output_dir)):
        raise ValueError(
            f"--output_dir '{output_dir}' holds another training than the one of '{checkpoint}'. Pass an empty folder, "
            "or the one of the checkpoint."
        )


def training_of(checkpoint: Path) -> str | None:
    """The id of a checkpoint's training."""
    return read_settings(checkpoint).get("training")


def set_aside(output_dir: Path) -> None:
    """Take what an earlier training left out of the way, into a hidden folder."""
    left = checkpoints(output_dir) + _results(output_dir)
    left += [path for path in (output_dir / "validation",) if path.exists()]
    if not left:
        return
    number = 1 + max((int(path.name.removeprefix(REPLACED)) for path in replaced(output_dir)), default=0)
    folder = output_dir / f"{REPLACED}{number}"
    folder.mkdir()
    for path in left:
        os.replace(path, folder / path.name)


def discard_replaced(output_dir: Path) -> None:
    """Delete what was set aside; to be called when the new training has saved something."""
    for folder in replaced(output_dir):
        shutil.rmtree(folder)


def replaced(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob(f"{REPLACED}*") if path.name.removeprefix(REPLACED).isdigit()]


def _results(folder: Path) -> list[Path]:
    return [folder / name for name in RESULTS if (folder / name).exists()]
